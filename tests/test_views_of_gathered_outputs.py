"""Outputs that are views of each other, of rows, or of what was gathered: values and gradients of one device, gathered or deferred."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranks import run_ranks

LENGTH = 6


def _gathered_and_views(y: Tensor) -> Any:
    picked = y[:, torch.tensor([3, 1, 4])]
    return picked, picked[:, 1:], picked.transpose(1, 2)


VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "an output and its last rows": lambda y: (y, y[:, 1:]),
    "rows alone": lambda y: y[:, 1:],
    "two ranges of rows": lambda y: (y[:, 1:], y[:, :-1]),
    "the first and the last row": lambda y: (y[:, 0], y[:, -1]),
    "a transposed output": lambda y: (y.transpose(1, 2), y),
    "some of a batch": lambda y: (y[1:], y),
    "other sizes": lambda y: (y.flatten(0, 1), y.unflatten(1, (2, 3))),
    "windows": lambda y: (windows := y.unfold(1, 3, 1), windows[:, 1:]),
    "what was gathered": _gathered_and_views,
    "an output three times": lambda y: (y, y[:, 1:], y),
}


SETTINGS = {"eager": [("deferred", "zigzag")], "aot_eager": [("full", "contiguous"), ("full", "zigzag")]}
"""By the inner compiler: what becomes of outputs, and the layout."""


class Attention(nn.Module):
    def __init__(self, views: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.qkv, self.views = nn.Linear(8, 24), views

    def forward(self, x: Tensor) -> Any:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.views(x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def train(call: Callable[[Tensor], Any], model: nn.Module) -> list[Tensor]:
    """Outputs and gradients."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(3, LENGTH, 8, generator=drawn, dtype=torch.float64).requires_grad_()
    outputs = call(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((out * torch.randn(out.shape, generator=drawn, dtype=out.dtype)).sum() for out in outputs).backward()  # type: ignore[union-attr]
    return [*(out.detach() + 0 for out in outputs), x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


def largest_errors(rank: int, P: int, inner: str) -> dict[str, float]:
    errors = {}
    for name, views in VIEWS.items():
        torch.manual_seed(0)
        model = Attention(views).double()
        oracle = copy.deepcopy(model)
        expected = train(oracle, oracle)
        for outputs, layout in SETTINGS[inner]:
            torch._dynamo.reset()
            options = {"inner": inner, "outputs": outputs, "layout": layout, "strategy": "ulysses"}
            found = train(torch.compile(model, backend="autoseq", options=options), model)
            model.zero_grad()
            assert [x.shape for x in found] == [x.shape for x in expected], (name, options)
            pairs = zip(found, expected, strict=True)
            errors[f"{name}, {outputs}, {layout}"] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return errors


@pytest.mark.parametrize("inner", SETTINGS)
def test_views_have_one_devices_values_and_gradients(inner: str) -> None:
    for errors in run_ranks(largest_errors, 2, inner, timeout_s=500):
        assert max(errors.values()) < 1e-12, {name: error for name, error in errors.items() if error >= 1e-12}
