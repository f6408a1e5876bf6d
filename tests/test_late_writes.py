"""A write that reaches what a backward keeps, after the program that keeps it ran.

One device's autograd computes with the new values, or refuses where the version counter tells of the write. Behind a compiled program
the kept rows are others than those that are written, so the backward refuses by name; a write to what nothing keeps is one device's.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoseq
from autoseq.runtime.errors import UnsupportedError
from autoseq.runtime.whole_value import WholeValue
from ranks import run_ranks

W = 8


def by_data(y: Tensor) -> None:
    y.data.mul_(2)


def by_a_view_of_data(y: Tensor) -> None:
    y.data[:, 3:].mul_(2)


def under_no_grad(y: Tensor) -> None:
    with torch.no_grad():
        y.mul_(2)


def by_a_detached_alias(y: Tensor) -> None:
    y.detach().add_(1)


def by_a_list(y: Tensor) -> None:
    torch._foreach_mul_([y.data], 2.0)


def by_nothing(y: Tensor) -> None:
    assert y[:, 3:].isfinite().all() and y.data.isfinite().all() and y.detach().view(2, -1).numpy().shape[0] == 2


class Block(nn.Module):
    """An attention and a projection; `write` is called where `at` says, outside of what is compiled."""

    def __init__(self, at: str = "", write: Callable[[Tensor], None] = by_data) -> None:
        super().__init__()
        self.qkv, self.f, self.g = nn.Linear(W, 3 * W), nn.Linear(W, W), nn.Linear(W, W)
        self.at, self.write = at, write

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Any:
        if self.at == "attention":
            return self.attend(x)
        if self.at == "projection":
            return self.f(self.attend(x))
        if self.at == "hidden":
            hidden = self.f(self.attend(x))
            return hidden, self.g(hidden)
        hidden = self.attend(x) if self.at == "inside the next part" else self.f(self.attend(x))
        if self.at == "before the next part":
            outside(self.write, hidden)
        else:
            torch._dynamo.graph_break()
        if self.at == "inside the next part":
            hidden.data.mul_(2)
        made = hidden + self.f.bias if self.at == "what adds" else hidden + self.attend(hidden)
        if self.at in ("behind the next part", "what adds"):
            outside(self.write, hidden)
        return hidden, made


@torch._dynamo.disable
def outside(write: Callable[[Tensor], None], y: Tensor) -> None:
    write(y)


def step(model: Any, x: Tensor, write: Callable[[Tensor], None] | None, through: int) -> list[Tensor]:
    """The outputs and gradients of a step; the loss reads the output of number `through`, or all for -1."""
    model.zero_grad()
    outputs = model(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if write is not None:
        write(outputs[0])
    read = outputs if through == -1 else [outputs[through]]
    torch.stack([y.square().sum() for y in read]).sum().backward()
    return [*(y.detach() * 1 for y in outputs), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def both(at: str, write: Callable[[Tensor], None], outside_model: bool, through: int, inner: str) -> tuple[str, float]:
    """What a compiled step raises, if it does, and its worst relative L2 error against one device."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Block(at, write), torch.randn(2, 9, W)
    oracle = copy.deepcopy(model)
    compiled = autoseq.parallelize(model, inner=inner)
    given = write if outside_model else None
    try:
        mine = step(compiled, x, given, through)
    except UnsupportedError as error:
        return str(error), 0.0
    expected = step(oracle, x, given, through)
    return "", max(((a - b).norm() / b.norm()).item() for a, b in zip(mine, expected, strict=True))


KEPT = {
    "an attention's output": ("attention", by_data, True, 0),
    "part of it": ("attention", by_a_view_of_data, True, 0),
    "under no_grad": ("attention", under_no_grad, True, 0),
    "through an alias": ("attention", by_a_detached_alias, True, 0),
    "in a list": ("attention", by_a_list, True, 0),
    "an output that another one is made of": ("hidden", by_data, True, 1),
    "both are read": ("hidden", by_data, True, -1),
    "an output of a part that the next one writes to": ("inside the next part", by_data, False, 1),
    "an output of a part that the next one keeps": ("behind the next part", by_data, False, 1),
}
NOT_KEPT = {
    "a projection's output": ("projection", by_data, True, 0),
    "a projection's output in a list": ("projection", by_a_list, True, 0),
    "an attention's output that is read": ("attention", by_nothing, True, 0),
    "the made one of two": ("before the next part", by_data, False, -1),
    "an output of a part that the next one adds to": ("what adds", by_data, False, -1),
}


def check(rank: int, P: int, inner: str) -> None:
    for name, case in KEPT.items():
        message, error = both(*case, inner)
        is_one_memory = P == 1 and not case[2]  # one rank's parts pass on the tensor itself
        assert is_one_memory or ("is kept for the backward of" in message and "test_late_writes.py" in message), (name, message, error)
        assert error <= 1e-5, (name, error)
    for name, case in NOT_KEPT.items():
        message, error = both(*case, inner)
        assert not message and error <= 1e-5, (name, message, error)  # float32; sums over rows run in another order


@pytest.mark.parametrize(("P", "inner"), [(1, "eager"), (2, "eager"), (2, "aot_eager")])
def test_a_late_write_is_refused_where_it_reaches_what_is_kept(P: int, inner: str) -> None:
    run_ranks(check, P, inner)


class Masked(Block):
    """Its second part reads a buffer as a mask, and hands on nothing if the buffer has changed."""

    def __init__(self) -> None:
        super().__init__("a mask")
        self.register_buffer("mask", torch.ones(9, 9, dtype=torch.bool).tril())
        self.made: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.attend(x)
        outside(self.made.append, hidden)
        q, k, v = self.qkv(hidden).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2).flatten(2)


def check_after_a_refused_call(rank: int, P: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = autoseq.parallelize(Masked(), inner="eager"), torch.randn(2, 9, W)
    model(x).sum().backward()
    model.mask.zero_().fill_diagonal_(True)
    with pytest.raises(UnsupportedError, match="the buffer mask was read as a mask"):
        model(x)
    hidden = model.made[-1]
    by_a_view_of_data(hidden)
    with pytest.raises(UnsupportedError, match="is kept for the backward of"):
        hidden.square().sum().backward()


def test_a_late_write_is_seen_after_a_part_that_refused_its_inputs() -> None:
    run_ranks(check_after_a_refused_call, 2)


def values_that_stay(rank: int, P: int, inner: str) -> int:
    """How many gathered values live, besides those of traces, when each step of models in parts is over."""
    torch._dynamo.reset()
    for at, through in (("hidden", -1), ("behind the next part", 0), ("what adds", -1)):
        model, x = autoseq.parallelize(Block(at, by_nothing), inner=inner), torch.randn(2, 9, W)
        for _ in range(3):
            outputs = model(x)
            by_nothing(outputs[0])
            by_nothing(outputs[1])
            outputs[through].square().sum().backward()
            del outputs
    gc.collect()
    return sum(isinstance(each, WholeValue) and each.name != "compiled input" for each in gc.get_objects())


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_no_value_outlives_its_step(inner: str) -> None:
    assert run_ranks(values_that_stay, 2, inner) == [0, 0]
