"""Random programs around an attention: whatever the chain of operators, outputs and gradients are one device's.

hypothesis draws the steps, the lengths, the heads, the layout and the number of ranks. The steps mix operators that keep
rows, move dims, contract the sequence, and that no rule covers.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranks import run_ranks

WIDTH = 8
TOLERANCE = 1e-5  # relative L2 in float32; sums over rows in another order

STEPS: dict[str, Callable[[nn.ModuleDict, Tensor], Tensor]] = {
    "linear": lambda m, x: m["linear"](x),
    "norm": lambda m, x: m["norm"](x),
    "gelu": lambda m, x: F.gelu(x),
    "rows flattened into one dim": lambda m, x: m["linear"](x.reshape(-1, WIDTH)).reshape(x.shape),
    "sequence first": lambda m, x: m["linear"](x.transpose(0, 1)).transpose(0, 1),
    "channels before the sequence": lambda m, x: torch.tanh(x.permute(0, 2, 1)).permute(0, 2, 1),
    "minus the mean over the sequence": lambda m, x: x - x.mean(1, keepdim=True),
    "the sum over everything": lambda m, x: x + x.sum() / x.numel(),
    "sequence contracted (linear attention)": lambda m, x: x @ torch.softmax(x.transpose(1, 2) @ x / x.shape[1], -1),
    "sequence contracted by einsum": lambda m, x: x + torch.einsum("bse,bsf->bef", x, x).mean(1, keepdim=True) / x.shape[1],
    "no rule: roll": lambda m, x: x + x.roll(1, 1),
    "no rule: reversed": lambda m, x: x + torch.flip(x, [1]),
    "whole: cumulative sum": lambda m, x: x + x.cumsum(1) / x.shape[1],
    "whole: the maximum": lambda m, x: x - x.amax(1, keepdim=True),
    "first row": lambda m, x: x + x[:, :1],
    "last row dropped and put back": lambda m, x: torch.cat([x[:, :-1], x[:, -1:]], 1),
    "scaled by position": lambda m, x: x * (1 + torch.arange(x.shape[1], device=x.device) / x.shape[1])[:, None],
    "a parameter added per position": lambda m, x: x + m["table"].weight[: x.shape[1]],  # pyright: ignore[reportIndexIssue]
    "a parameter used alone": lambda m, x: x + m["linear"].weight.sum(),
    "in place": lambda m, x: x.clone().mul_(0.5).add_(1),
    "channels split and joined": lambda m, x: torch.cat([t * i for i, t in enumerate(x.chunk(2, -1), 1)], -1),
    "a cube repeated": lambda m, x: x + x[:, :, None].expand(-1, -1, 2, -1).mean(2) ** 3 / 10,
    "where": lambda m, x: torch.where(x > 0, x, 0.1 * x),
    "stacked and summed": lambda m, x: torch.stack([x, -0.5 * x]).sum(0),
}


class RandomProgram(nn.Module):
    """Steps, an attention, steps, and one of several ends."""

    def __init__(self, before: list[str], after: list[str], heads: int, end: str) -> None:
        super().__init__()
        self.steps = (before, after)
        self.heads, self.end = heads, end
        self.parts = nn.ModuleDict({
            "linear": nn.Linear(WIDTH, WIDTH), "norm": nn.LayerNorm(WIDTH), "table": nn.Embedding(64, WIDTH),
            "qkv": nn.Linear(WIDTH, 3 * WIDTH),
        })  # fmt: skip
        self.tokens = nn.Embedding(16, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for name in self.steps[0]:
            x = STEPS[name](self.parts, x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.parts["qkv"](x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        for name in self.steps[1]:
            x = STEPS[name](self.parts, x)
        if self.end == "loss":
            return F.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten() % WIDTH)
        if self.end == "loss of flattened rows":
            return F.cross_entropy(x.flatten(0, 1)[: -len(ids)], ids.flatten()[len(ids) :] % WIDTH)
        return x if self.end == "rows" else x.mean(1)


def run_program(rank: int, P: int, case: dict[str, Any]) -> list[tuple[str, float]]:
    torch.manual_seed(case["seed"])
    model = RandomProgram(case["before"], case["after"], case["heads"], case["end"])
    oracle = copy.deepcopy(model)
    ids = torch.randint(0, 16, (case["batch"], case["length"]))
    options = {"inner": "eager", "strategy": case["strategy"], "layout": case["layout"]}
    actual, expected = torch.compile(model, backend="autoseq", options=options)(ids), oracle(ids)
    weights = torch.randn(expected.shape)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [("output", actual.detach() + 0, expected.detach())]
    expected_grads = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        if expected_grads[name].grad is not None:
            pairs.append((name, parameter.grad, expected_grads[name].grad))
    # Where the true value is nearly nothing (a mean of centred rows), rounding is measured against 0.1 instead of it.
    return [(name, ((a - e).norm() / e.norm().clamp(min=0.1)).item()) for name, a, e in pairs]


programs = st.fixed_dictionaries({
    "before": st.lists(st.sampled_from(sorted(STEPS)), max_size=3),
    "after": st.lists(st.sampled_from(sorted(STEPS)), max_size=3),
    "heads": st.sampled_from([1, 2, 4]),
    "end": st.sampled_from(["loss", "loss of flattened rows", "rows", "pooled"]),
    "batch": st.integers(1, 3),
    "length": st.integers(4, 19),
    "strategy": st.sampled_from(["auto", "ulysses", "ring", "gather_kv"]),
    "layout": st.sampled_from(["auto", "contiguous", "zigzag"]),
    "seed": st.integers(0, 99),
})  # fmt: skip


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(case=programs, P=st.sampled_from([2, 3]))
def test_a_random_program_has_one_devices_numbers(case: dict[str, Any], P: int) -> None:
    for errors in run_ranks(run_program, P, case):
        assert max(error for _, error in errors) <= TOLERANCE, sorted(errors, key=lambda item: -item[1])[:3]
