"""Programs that were written to break the promise, each of which once did: a wrong gradient, a NaN, a crash."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ranks import run_ranks

W = 8
TOLERANCE = 1e-5  # relative L2 in float32, against at least 0.1; sums over rows run in another order
OPTIONS: dict[str, Any] = {"inner": "aot_eager"}


class Parts(nn.Module):
    """Attention over embedded ids, then an end that a test chooses."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.end = end
        scaled = end == "gradients scaled by frequency"
        self.tok = nn.Embedding(16, W, scale_grad_by_freq=scaled)
        self.qkv, self.lin, self.lin2, self.table = nn.Linear(W, 3 * W), nn.Linear(W, W), nn.Linear(W, W), nn.Embedding(64, W)
        self.bn = nn.BatchNorm1d(W)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids.clamp(min=0))
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = hidden_rows(x.shape[1]) if "float mask" in self.end else None
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return ENDS[self.end](self, x + attended.transpose(1, 2).flatten(2), ids)


def hidden_rows(S: int) -> Tensor:
    """Causal, and three rows that see nothing: everything is the least finite float."""
    q, k = torch.arange(S)[:, None], torch.arange(S)
    return torch.zeros(S, S).masked_fill((k > q) | (q < 3), torch.finfo(torch.float32).min)


def rows_whose_weight_is_infinite(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    weights = 1 / torch.arange(x.shape[1] - 1, -1, -1).float()
    return (x[:, :-1] * weights[:-1, None]).sum()


def rows_that_are_zero(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    apart = x - x[:, -1:]
    return torch.sqrt((apart[:, :-1] ** 2).sum(-1))


def under_no_grad(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    with torch.no_grad():
        unseen = m.lin2(x)
    return m.lin(x) + unseen


def after_a_break(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return m.lin2(torch.tanh(x)).sum(1)


ENDS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "a value without its gradient by .data": lambda m, x, ids: m.lin(x) + m.lin2(x.data),
    "dropped rows whose weight is infinite": rows_whose_weight_is_infinite,
    "dropped rows at which sqrt has no gradient": rows_that_are_zero,
    "dropped ids that are no ids": lambda m, x, ids: m.lin(x[:, :-1] + m.table(ids[:, :-1])),
    "no rows at all": lambda m, x, ids: m.lin(x).sum() + x[:, :0].sum(),
    "flattened rows cut inside a batch element": lambda m, x, ids: m.lin(x).flatten(0, 1)[:-3].square().sum(),
    "gradients scaled by frequency": lambda m, x, ids: m.lin(x),
    "a float mask that hides whole rows": lambda m, x, ids: m.lin(x),
    "a parameter used only under no_grad": under_no_grad,
    "a parameter used only behind detach": lambda m, x, ids: m.lin(x) + m.lin2(x).detach(),
    "a matrix times itself": lambda m, x, ids: torch.einsum("bsd,btd->bst", x, x).tanh().sum(2),
    "batch norm over channels": lambda m, x, ids: m.bn(x.transpose(1, 2)).square().sum((1, 2)),
    "a part after a graph break": after_a_break,
}


def run_end(rank: int, P: int, end: str, options: dict[str, Any]) -> dict[str, float]:
    torch.manual_seed(0)
    model = Parts(end)
    oracle = copy.deepcopy(model)
    ids = torch.randint(0, 16, (2, 9))
    if "no ids" in end:
        ids[:, -1] = -1
    actual = torch.compile(model, backend="autoseq", options={**OPTIONS, **options})(ids)
    # Of a row whose keys all have the least of numbers, the CPU's flash kernel takes every probability for 1 in its backward.
    with sdpa_kernel(SDPBackend.MATH):
        expected = oracle(ids)
    weights = torch.randn(expected.shape)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    if options.get("grad_sync") == "none":
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad) if parameter.grad is not None else None
    errors = {"output": relative(actual.detach() + 0, expected.detach())}
    for (name, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            errors[name] = relative(ours.grad, theirs.grad)
    for (name, ours), theirs in zip(model.named_buffers(), oracle.buffers(), strict=True):
        errors[name] = relative(ours.float(), theirs.float())
    return errors


def relative(actual: Tensor, expected: Tensor) -> float:
    assert not actual.isnan().any()
    return ((actual - expected).norm() / expected.norm().clamp(min=0.1)).item()


@pytest.mark.parametrize("end", list(ENDS))
def test_a_program_written_to_break_it_has_one_devices_numbers(end: str) -> None:
    for errors in run_ranks(run_end, 2, end, {}):
        assert max(errors.values()) <= TOLERANCE, errors


def test_unsummed_gradients_of_a_part_without_attention_add_up_too() -> None:
    for errors in run_ranks(run_end, 2, "a part after a graph break", {"grad_sync": "none"}):
        assert max(errors.values()) <= TOLERANCE, errors


class Reversed(torch.autograd.Function):
    """Backward is not the derivative of forward: what only its author knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -3 * grad


class WithReversed(nn.Module):
    """An attention beside a custom autograd function."""

    def forward(self, x: Tensor) -> Tensor:
        return Reversed.apply(F.scaled_dot_product_attention(x, x, x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")  # Dynamo does that
def test_a_custom_backward_is_never_lost() -> None:
    model, x = WithReversed(), torch.randn(1, 1, 4, 4, requires_grad=True)
    compiled = torch.compile(model, backend="autoseq", options=OPTIONS)
    grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (compiled, model)]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch._dynamo.reset()
        assert torch.equal(compiled(x), 2 * F.scaled_dot_product_attention(x, x, x))


def run_other_batches(rank: int, P: int) -> float:
    torch.manual_seed(0)
    model = Parts("a parameter used only behind detach")
    oracle = copy.deepcopy(model)
    compiled = torch.compile(model, backend="autoseq", options={**OPTIONS, "strategy": "ring"})
    worst = 0.0
    for B, S in ((2, 7), (2, 9), (3, 12), (4, 4)):
        ids = torch.randint(0, 16, (B, S))
        actual, expected = compiled(ids), oracle(ids)
        actual.square().sum().backward()
        expected.square().sum().backward()
        pairs = [(p.grad, e.grad) for p, e in zip(model.parameters(), oracle.parameters(), strict=True) if e.grad is not None]
        worst = max(worst, relative(actual.detach() + 0, expected.detach()), *(relative(a, e) for a, e in pairs if a is not None))
    return worst


def test_new_batch_sizes_and_lengths_have_one_devices_numbers() -> None:
    assert max(run_ranks(run_other_batches, 3)) <= TOLERANCE
