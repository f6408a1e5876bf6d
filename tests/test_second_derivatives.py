"""The gradient of a gradient (a gradient penalty, a Hessian-vector product): exact with inner="eager", an error by name otherwise."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoseq.runtime.errors import UnsupportedError
from ranks import run_ranks

W = 16
TOLERANCE = 2e-6  # relative L2 in float32


class Penalized(nn.Module):
    """A layer with grouped heads, a bias of its own for each distance, and a loss whose gradient depends on the loss."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.q, self.kv, self.o, self.norm = nn.Linear(W, W), nn.Linear(W, 8 * kv_heads), nn.Linear(W, W), nn.LayerNorm(W)
        self.distances = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = (part.unflatten(-1, (self.kv_heads, 4)).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        at = torch.arange(x.shape[1], device=x.device)
        behind = at[:, None] - at
        bias = torch.where(behind >= 0, self.distances[behind.clamp(min=0)], -torch.inf)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=self.kv_heads != 4)
        x = self.norm(x + self.o(attended.transpose(1, 2).flatten(2)))
        return F.cross_entropy(x.flatten(0, 1), targets.flatten()).pow(2) + x.pow(3).mean()


def penalized(model: Penalized, run: Callable[..., Tensor], x: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss with penalties on its gradients of the input and of a weight."""
    leaf = x.clone().requires_grad_()
    loss = run(leaf, targets)
    of_input, of_weight = torch.autograd.grad(loss, (leaf, model.q.weight), create_graph=True)
    (loss + 10 * of_input.pow(2).sum() + of_weight.pow(2).sum()).backward()
    found = {"input": leaf.grad, "first derivative": of_input.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    return {name: grad for name, grad in found.items() if grad is not None}


def penalties(strategy: str, layout: str, kv_heads: int, inner: str) -> float:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x, targets = Penalized(kv_heads), torch.randn(2, 13, W), torch.randint(W, (2, 13))
    oracle = copy.deepcopy(model)
    with sdpa_kernel(SDPBackend.MATH):  # torch's flash kernel has no second derivative
        expected = penalized(oracle, oracle, x, targets)
    compiled = torch.compile(model, backend="autoseq", options={"inner": inner, "strategy": strategy, "layout": layout})
    actual = penalized(model, compiled, x, targets)
    assert actual.keys() == expected.keys()
    return max(((actual[name] - e).norm() / e.norm()).item() for name, e in expected.items())


CASES: list[tuple[str, str, int]] = [
    ("ring", "zigzag", 4), ("ulysses", "contiguous", 4), ("gather_kv", "zigzag", 2), ("bidirectional_ring", "zigzag", 4),
    ("auto", "auto", 2),
]  # fmt: skip


def run_penalties(rank: int, P: int) -> list[float]:
    return [penalties(*case, "eager") for case in CASES]


def test_second_derivatives_are_one_devices() -> None:
    for errors in run_ranks(run_penalties, 2):
        assert max(errors) <= TOLERANCE, dict(zip(CASES, errors, strict=True))


def test_second_derivatives_of_one_rank_are_one_devices() -> None:
    assert penalties("auto", "auto", 2, "eager") <= TOLERANCE


def run_refused(rank: int, P: int) -> None:
    with pytest.raises(UnsupportedError, match=r'gradient of a gradient .*inner=\'aot_eager\' has none. .*"inner": "eager"'):
        penalties("auto", "auto", 4, "aot_eager")


def test_behind_aotautograd_the_error_names_the_inner_that_has_them() -> None:
    run_ranks(run_refused, 2)


class RowsWithoutKeys(nn.Module):
    """Attention whose first two rows see nothing."""

    def forward(self, x: Tensor) -> Any:
        at = torch.arange(x.shape[2], device=x.device)
        bias = torch.zeros(len(at), len(at)).masked_fill((at > at[:, None]) | (at[:, None] < 2), torch.finfo(torch.float32).min)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=bias).pow(2).sum()


def test_rows_without_keys_have_no_second_derivative() -> None:
    x = torch.randn(1, 1, 6, 4, requires_grad=True)
    loss = torch.compile(RowsWithoutKeys(), backend="autoseq", options={"inner": "eager"})(x)
    with pytest.raises(UnsupportedError, match=r"rows that see no key, and its second derivative was asked for"):
        torch.autograd.grad(loss, x, create_graph=True)
