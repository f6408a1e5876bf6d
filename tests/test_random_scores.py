"""Random programs that write attention out: whatever stands between the product and the softmax, values and gradients are the program's.

A grammar writes the scores: masks of index arithmetic and data, biases, scales, softcaps, in any order and in several spellings.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoseq.passes.find_attention import find_attention, is_attention
from autoseq.passes.normalize import drop_noops
from autoseq.passes.read_masks import read_masks
from autoseq.program import mark_trainable
from autoseq.runtime.errors import StrategyError
from graphs import trace
from ranks import run_ranks

B, H, S, D = 2, 2, 11, 4
MIN = torch.finfo(torch.float32).min

CONDITIONS = st.sampled_from([
    "(k <= q)", "(k > q - 3)", "(k // 4 == q // 4)", "(k < 2)", "(docs[:, None, :, None] == docs[:, None, None])",
    "keep[:, None, None]", "((q - k) % 3 != 1)", "~(k > q)", "(torch.ones(11, 11).tril() > 0).expand(2, 2, 11, 11)",
])  # fmt: skip
MASKS = st.recursive(
    CONDITIONS, lambda inner: st.tuples(inner, st.sampled_from("&|"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"), max_leaves=3
)
STEPS = st.one_of(
    MASKS.map(lambda m: f"x.masked_fill(~({m}), -torch.inf)"),
    MASKS.map(lambda m: f"x.masked_fill(~({m}), {MIN})"),
    MASKS.map(lambda m: f"x.masked_fill(~({m}), -1e9)"),
    MASKS.map(lambda m: f"x + torch.where({m}, 0.0, {MIN})"),
    MASKS.map(lambda m: f"torch.where({m}, x, -torch.inf)"),
    MASKS.map(lambda m: f"x + (1.0 - ({m}).float()) * {MIN}"),
    st.sampled_from([
        "x * 0.5", "x / 3.0", "torch.tanh(x / 5.0) * 5.0", "x + slopes[:, None, None] * (k - q)",
        "slopes[:, None, None] * (k - q).float() + x",
        "x + table[(q - k).clamp(-4, 4) + 4].permute(2, 0, 1)", "x - table[(q - k).abs().clamp(max=8), 0]", "x.float()", "x + dense",
        "x.reshape(4, 11, 11).view(2, 2, 11, 11)", "x * slopes.abs()[:, None, None]", "x + 1.5", "2 * x",
    ]),
)  # fmt: skip


def attention(code: list[str]) -> Callable[..., Tensor]:
    """The program that the grammar wrote."""
    lines = [
        "def program(q_, k_, v, slopes, table, dense, docs, keep):",
        "q, k, x = torch.arange(11)[:, None], torch.arange(11), q_ @ k_.mT",
        *(f"x = {step}" for step in code), "return torch.softmax(x, -1) @ v",
    ]  # fmt: skip
    made: dict[str, Any] = {"torch": torch}
    exec("\n    ".join(lines), made)
    return made["program"]


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    floats = [torch.randn(shape, generator=generator) for shape in [(B, H, S, D)] * 3 + [(H,), (9, H), (S, S)]]
    docs = torch.tensor([[0] * 4 + [1] * 7, [0] * 8 + [1] * 3])
    return [*(x.requires_grad_() for x in floats[:5]), floats[5], docs, torch.rand(B, S, generator=generator) > 0.3]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(code=st.lists(STEPS, min_size=1, max_size=4))
def test_random_scores_keep_values_and_gradients(code: list[str]) -> None:
    actual, expected = inputs(), inputs()
    traced = trace(attention(code), *actual)
    gm = traced.normal
    mark_trainable(gm, traced.inputs)
    drop_noops(gm)
    found, left = find_attention(gm)
    read_masks(gm)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert found + len(left) == 1 and found == sum(is_attention(node) for node in gm.graph.nodes)
    (out,) = gm(*traced.inputs)
    wanted = attention(code)(*expected)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    # A row of NaN would hide every gradient behind it: such rows get none.
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) * ~wanted.detach().isnan()
    for result in (out, wanted):
        torch.where(weight != 0, result * weight, 0.0).sum().backward()
    for mine, one in zip(actual[:5], expected[:5], strict=True):
        if one.grad is not None and not one.grad.isnan().any():
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad, one.grad, rtol=1e-3, atol=1e-4)


def worst_on_rank(rank: int, world_size: int, code: list[str], strategy: str) -> float | str:
    """The largest difference from one device, or the reason why a strategy does not serve the program."""
    actual, expected = inputs(), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(attention(code), backend="autoseq", options={"inner": "eager", "strategy": strategy})
    try:
        out = compiled(*actual)
    except StrategyError as refused:
        return str(refused)
    wanted = attention(code)(*expected)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)) * ~wanted.detach().isnan()
    for result in (out, wanted):
        torch.where(weight != 0, result * weight, 0.0).sum().backward()
    pairs = [(out.detach() + 0, wanted.detach()), *((a.grad, e.grad) for a, e in zip(actual[:5], expected[:5], strict=True))]
    return max(difference(a, e) for a, e in pairs if e is not None and not e.isnan().any())


def difference(actual: Tensor | None, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-3)).item() if actual is not None else float("inf")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(code=st.lists(STEPS, min_size=1, max_size=3), P=st.integers(2, 3), strategy=st.sampled_from(["ulysses", "ring", "gather_kv"]))
def test_random_scores_on_ranks_have_one_devices_numbers(code: list[str], P: int, strategy: str) -> None:
    for worst in run_ranks(worst_on_rank, P, code, strategy):
        if isinstance(worst, str):
            assert "cannot serve" in worst or "no attention can be split" in worst
        else:
            assert worst <= 1e-4
