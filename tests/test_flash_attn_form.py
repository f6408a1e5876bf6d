"""flash-attn's operators are opened: each argument's meaning, packed sequences, the backward around them, one device's numbers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from autoseq.passes.autograd_functions import AUTOGRAD_FUNCTION
from autoseq.passes.find_attention import find_attention, is_attention
from autoseq.passes.keep_meaning import keep_meaning
from autoseq.passes.normalize import drop_noops, normalize
from autoseq.passes.open_regions import open_regions
from autoseq.passes.read_masks import read_masks
from autoseq.passes.specialize_floats import specialize_floats
from autoseq.program import fake_inputs
from flash_attn_stand_in import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")  # Dynamo does that

TOLERANCE = 1e-5  # relative L2 in float32 against a reference in float64
B, S, H, K, D = 2, 11, 4, 2, 8
Program = Callable[[Tensor, Tensor, Tensor], Any]


def leaves(s: int = S, t: int = S, H: int = H, K: int = K, D: int = D) -> list[Tensor]:
    generator = torch.Generator().manual_seed(s * t)
    return [torch.randn(B, n, h, D, generator=generator).requires_grad_() for n, h in ((s, H), (t, K), (t, K))]


def opened(fn: Program, *args: Tensor, dynamic: bool | None = False) -> tuple[fx.GraphModule, list[Any]]:
    """The normal graph of a program and the inputs of that graph."""
    seen: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        open_regions(gm, inputs)
        keep_meaning(gm)
        specialize_floats(gm, inputs)
        seen.extend([normalize(gm, fake_inputs(gm, inputs)), [x.node.hint if isinstance(x, torch.SymInt) else x for x in inputs]])
        return gm

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return seen[0], seen[1]


def check_opened(fn: Program, args: list[Tensor], dynamic: bool = False) -> list[str]:
    """The opened program has the operator's values and gradients; returns the formula of each attention that is found in it."""
    heads = [x.shape[2] for x in args]

    def called(*rows: Tensor) -> Any:
        return fn(*(x.unflatten(-1, (h, x.shape[-1] // h)) for x, h in zip(rows, heads, strict=True)))

    args = [x.detach().flatten(2).requires_grad_() for x in args]
    for x in args if dynamic else []:
        torch._dynamo.mark_dynamic(x, 1)
    gm, inputs = opened(called, *args, dynamic=None if dynamic else False)
    targets = {node.target for node in gm.graph.nodes}
    assert AUTOGRAD_FUNCTION not in targets and not any("flash_attn" in str(target) for target in targets)
    actual, expected = fx.Interpreter(gm).run(*inputs)[0], called(*args)
    weights = torch.linspace(-1, 1, expected.numel()).reshape(expected.shape)
    grads = [torch.autograd.grad((y * weights).sum(), args[:3]) for y in (actual, expected)]
    for a, e in zip((actual, *grads[0]), (expected, *grads[1]), strict=True):
        assert (a - e).norm() <= TOLERANCE * e.norm()
    drop_noops(gm)
    gm.graph.eliminate_dead_code()
    found, left = find_attention(gm)
    read_masks(gm)
    assert found == 1 and not left
    return [node.meta["attention"]["mask"] for node in gm.graph.nodes if is_attention(node)]


# Fixed lengths --------------------------------------------------------------------------------------------------------

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
FIXED = [
    pytest.param({}, {}, "all", id="every key"),
    pytest.param({"causal": True}, {}, "k <= q", id="causal"),
    pytest.param({"causal": True}, {"s": 5}, "k <= q + 6", id="causal, aligned to the last key"),
    pytest.param({"causal": True}, {"t": 6}, "k <= q - 5", id="causal, rows without a key"),
    pytest.param({"causal": True, "window_size": (3, 0)}, {}, "(k <= q) & (k > q - 4)", id="a causal window"),
    pytest.param({"window_size": (3, 2)}, {}, "(k <= q + 2) & (k > q - 4)", id="a window"),
    pytest.param({"window_size": (-1, 2)}, {"s": 5}, "k <= q + 8", id="a window to the right alone"),
    pytest.param({"softmax_scale": 0.7}, {}, "all", id="a scale"),
    pytest.param({"causal": True, "softcap": 2.0}, {}, "k <= q", id="softcap"),
    pytest.param({"causal": True, "alibi_slopes": SLOPES}, {}, "k <= q", id="ALiBi"),
    pytest.param({"alibi_slopes": torch.stack([SLOPES, -SLOPES])}, {"s": 5}, "all", id="ALiBi of each batch, both ways"),
    pytest.param({"alibi_slopes": SLOPES, "softcap": 1.5, "window_size": (4, 4)}, {}, None, id="ALiBi, softcap and a window"),
    pytest.param({"causal": True}, {"D": 6}, "k <= q", id="a head dimension that is padded"),
    pytest.param({"causal": True}, {"H": 4, "K": 4}, "k <= q", id="as many heads of keys"),
    pytest.param({"deterministic": True}, {"K": 1}, "all", id="one head of keys"),
]


@pytest.mark.parametrize(("keywords", "shapes", "formula"), FIXED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_each_argument_means_what_it_means_to_the_operator(
    keywords: dict[str, Any], shapes: dict[str, int], formula: str | None, dynamic: bool
) -> None:
    (read,) = check_opened(lambda q, k, v: flash_attn_func(q, k, v, **keywords), leaves(**shapes), dynamic)
    assert dynamic or formula is None or read.split(", score")[0] == formula


def test_the_packed_call_gives_gradients_through_its_detaches() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), causal=True)

    assert check_opened(fn, leaves(K=H)) == ["k <= q"]


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_dropout_of_the_weights_is_read(softcap: float) -> None:
    gm, _ = opened(lambda q, k, v: flash_attn_func(q, k, v, dropout_p=0.25, causal=True, softcap=softcap), *leaves())
    drop_noops(gm)
    gm.graph.eliminate_dead_code()
    assert find_attention(gm) == (1, [])
    (site,) = (node for node in gm.graph.nodes if is_attention(node))
    assert site.kwargs["dropout_p"] == 0.25 and site.args[5] is not None, "the seed"


def test_without_gradients_the_operator_alone_is_opened() -> None:
    with torch.no_grad():
        gm, inputs = opened(lambda q, k, v: flash_attn_func(q, k, v, causal=True), *leaves())
        assert not any("flash_attn" in str(node.target) for node in gm.graph.nodes)
        expected = flash_attn_func(*inputs, causal=True)
        torch.testing.assert_close(fx.Interpreter(gm).run(*inputs)[0], expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("t", [S, 6])
def test_a_log_sum_exp_that_is_used_is_computed_beside(t: int) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        return out + torch.where(lse.isinf(), 0, lse).transpose(1, 2).unsqueeze(-1)

    check_opened(fn, leaves(t=t))


def with_its_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, _, S_dmask = flash_attn_func(q, k, v, return_attn_probs=True)
    return out.sum() + S_dmask.sum()


def with_its_lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, alibi_slopes=SLOPES, return_attn_probs=True)[1].transpose(1, 2).unsqueeze(-1)


KEPT = [
    pytest.param(with_its_mask, id="the dropout's mask is used"),
    pytest.param(lambda q, k, v: with_its_lse(q, k, v).mean() + q.sum(), id="the log-sum-exp of ALiBi is used"),
]


@pytest.mark.parametrize("fn", KEPT)
def test_a_call_with_other_results_in_use_is_kept_with_its_backward(fn: Program) -> None:
    args = leaves()
    gm, inputs = opened(fn, *args)
    assert gm.graph.find_nodes(op="call_function", target=AUTOGRAD_FUNCTION)
    actual, expected = fx.Interpreter(gm).run(*inputs)[0], fn(*args)
    grads = [torch.autograd.grad(y, args[:1])[0] for y in (actual, expected)]
    torch.testing.assert_close((actual, grads[0]), (expected, grads[1]), rtol=1e-6, atol=1e-6)  # float32; sums in another order


# Packed sequences -----------------------------------------------------------------------------------------------------


def ends(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def packed(cu_q: Tensor, cu_k: Tensor | None, **keywords: Any) -> Program:
    """Without `cu_k` keys are divided as queries are; Dynamo does not take one tensor twice, so programs give a copy."""
    longest_q, longest_k = (int(cu.diff().max()) for cu in (cu_q, cu_q if cu_k is None else cu_k))

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        other = cu_q.clone() if cu_k is None else cu_k
        return flash_attn_varlen_func(q[0], k[0], v[0], cu_q, other, longest_q, longest_k, **keywords)

    return fn


PACKED = [
    pytest.param(packed(ends(4, 5, 2), None), (11, 11), id="documents"),
    pytest.param(packed(ends(4, 5, 2), None, causal=True), (11, 11), id="causal documents"),
    pytest.param(packed(ends(4, 5, 2), None, causal=True, window_size=(2, 0)), (11, 11), id="a window in each"),
    pytest.param(packed(ends(4, 0, 7), None, causal=True), (11, 11), id="an empty document"),
    pytest.param(packed(ends(11), None, causal=True), (11, 11), id="one document"),
    pytest.param(packed(ends(4, 5, 2), ends(4, 5, 2), causal=True), (11, 11), id="equal lengths in two tensors"),
    pytest.param(packed(ends(3, 5), ends(6, 4)), (8, 10), id="other lengths of keys"),
    pytest.param(packed(ends(3, 5), ends(6, 4), causal=True), (8, 10), id="causal, each document aligned to its last key"),
    pytest.param(packed(ends(3, 5), ends(6, 4), window_size=(2, 1)), (8, 10), id="a window, aligned"),
    pytest.param(packed(ends(3, 5), ends(6, 4), causal=True, softcap=2.0), (8, 10), id="softcap"),
    pytest.param(packed(ends(3, 5), ends(6, 4), causal=True, alibi_slopes=SLOPES), (8, 10), id="ALiBi"),
    pytest.param(packed(ends(3, 5), ends(6, 4), alibi_slopes=torch.stack([SLOPES, -SLOPES])), (8, 10), id="ALiBi of each document"),
]


@pytest.mark.parametrize(("fn", "lengths"), PACKED)
def test_packed_sequences(fn: Program, lengths: tuple[int, int]) -> None:
    check_opened(fn, leaves(*lengths))


def test_documents_of_queries_and_keys_are_known_to_be_the_same() -> None:
    (read,) = check_opened(packed(ends(4, 5, 2), None, causal=True), leaves())
    assert read == "(k <= q) & Eq(searchsorted(q) - 1, searchsorted(k) - 1)"


def test_an_argument_that_is_not_read_keeps_the_call() -> None:
    used = torch.tensor([4, 5, 2], dtype=torch.int32)
    gm, _ = opened(packed(ends(4, 5, 2), None, seqused_k=used), *leaves())
    assert gm.graph.find_nodes(op="call_function", target=AUTOGRAD_FUNCTION)


# Other versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "opens"),
    [
        pytest.param({"causal": True, "window_size_left": 3}, True, id="arguments by name"),
        pytest.param({"causal": True, "num_splits": 4}, True, id="an argument without an effect on values"),
        pytest.param({"causal": True, "attention_chunk": 4}, False, id="an argument that is not read"),
    ],
)
def test_version_3_has_its_arguments_in_another_order(keywords: dict[str, Any], opens: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.flash_attn_3._flash_attn_forward(q, k, v, **keywords)[0]

    with torch.no_grad():
        gm, inputs = opened(fn, *leaves())
        assert opens != any("flash_attn" in str(node.target) for node in gm.graph.nodes)
        torch.testing.assert_close(fx.Interpreter(gm).run(*inputs)[0], fn(*inputs), rtol=TOLERANCE, atol=TOLERANCE)


# Ranks ----------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """One layer around a call of flash-attn."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.call, self.qkv, self.out = call, nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (8, 8)).split([4, 2, 2], 2)
        return self.out(CALLS[self.call](q, k, v).flatten(-2)).square().mean()


CALLS: dict[str, Program] = {
    "causal": lambda q, k, v: flash_attn_func(q, k, v, causal=True),
    "a window with ALiBi": lambda q, k, v: flash_attn_func(q, k, v, causal=True, window_size=(4, 0), alibi_slopes=SLOPES),
    "documents": packed(ends(4, 5, 2), None, causal=True),
    "one is kept": lambda q, k, v: flash_attn_func(q, k, v) + with_its_lse(q, k, v),
}


def train(rank: int, P: int, call: str, strategy: str) -> list[float]:
    torch.manual_seed(0)
    model, x = Model(call), torch.randn(B, S, 16)
    oracle = copy.deepcopy(model)
    compiled = torch.compile(model, backend="autoseq", options={"inner": "eager", "strategy": strategy})
    losses = compiled(x), oracle(x)
    for loss in losses:
        loss.backward()
    pairs = [losses, *((a.grad, e.grad) for a, e in zip(model.parameters(), oracle.parameters(), strict=True))]
    return [((a - e).norm() / e.norm()).item() for a, e in pairs]


@pytest.mark.parametrize("strategy", ["ulysses", "ring"])
@pytest.mark.parametrize("call", list(CALLS))
def test_flash_attention_is_split_with_one_devices_numbers(call: str, strategy: str) -> None:
    for errors in run_ranks(train, 2, call, strategy):
        assert max(errors) <= TOLERANCE, errors
