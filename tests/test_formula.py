"""Scores: each float function is torch's, numbers are weak, and what a score says about itself is read off its text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from autoseq.runtime.errors import UnsupportedError
from autoseq.runtime.float_functions import FLOAT_FUNCTIONS
from autoseq.runtime.formula import Points, evaluate_float, parse_score
from autoseq.runtime.score import CaptureGradients, Score
from autoseq.runtime.score_facts import additive_terms, needs_whole_rows

X, Y = torch.tensor([-2.5, -0.5, 0.0, 0.5, 2.0]), torch.tensor([1.5, -0.5, 3.0, 2.0, -1.0])
POINTS = Points.of(1, range(1), torch.arange(1), torch.arange(5))


def value(score: str, *captures: Tensor, s: Tensor | None = None) -> Tensor:
    """A score at 5 keys, of which `c0(k)`, `c1(k)` are looked up."""
    return evaluate_float(parse_score(score), POINTS, list(captures), s)


UNARY = {
    "f_neg": torch.neg, "f_abs": torch.abs, "f_exp": torch.exp, "f_exp2": torch.exp2, "f_log": torch.log, "f_log2": torch.log2,
    "f_sqrt": torch.sqrt, "f_rsqrt": torch.rsqrt, "f_tanh": torch.tanh, "f_sigmoid": torch.sigmoid, "f_sin": torch.sin,
    "f_cos": torch.cos, "f_relu": torch.relu, "f_floor": torch.floor, "to_float32": torch.Tensor.float,
    "to_float64": torch.Tensor.double, "to_float16": torch.Tensor.half, "to_bfloat16": torch.Tensor.bfloat16, "to_int": torch.Tensor.long,
    "mask": torch.Tensor.clone,
}  # fmt: skip
BINARY = {
    "f_add": torch.add, "f_sub": torch.sub, "f_mul": torch.mul, "f_div": torch.div, "f_pow": torch.pow, "f_minimum": torch.minimum,
    "f_maximum": torch.maximum, "f_eq": torch.eq, "f_ne": torch.ne, "f_lt": torch.lt, "f_le": torch.le, "f_gt": torch.gt,
    "f_ge": torch.ge,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"])
def test_each_function_is_torchs(dtype: torch.dtype) -> None:
    x, y = X.to(dtype), Y.to(dtype)
    for name, function in UNARY.items():
        torch.testing.assert_close(value(f"{name}(c0(k))", x), function(x), rtol=0, atol=0, equal_nan=True)
    for name, function in BINARY.items():
        torch.testing.assert_close(value(f"{name}(c0(k), c1(k))", x, y), function(x, y), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(value("f_where(k < 2, c0(k), c1(k))", x, y), torch.where(torch.arange(5) < 2, x, y))
    assert {*UNARY, *BINARY, "f_where"} == set(FLOAT_FUNCTIONS)


# What a Python number does beside a tensor, in a dtype that cannot hold it.
WEAK: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "a sum": ("f_add(c0(k), const(1, 10))", lambda x: x + 0.1),
    "a number first": ("f_sub(const(1, 10), c0(k))", lambda x: 0.1 - x),
    "a quotient": ("f_div(c0(k), const(3, 1))", lambda x: x / 3),
    "a power": ("f_pow(c0(k), const(2, 1))", lambda x: x**2),
    "a bound": ("f_maximum(c0(k), const(1, 10))", lambda x: x.clamp(min=0.1)),
    "a comparison": ("f_le(c0(k), const(1, 2))", lambda x: x <= 0.5),
    "a choice": ("f_where(k < 2, c0(k), const(-1, 0))", lambda x: x.masked_fill(torch.arange(5) >= 2, -math.inf)),
    "a choice of numbers": ("f_where(k < 2, const(1, 2), const(1, 0))", lambda x: torch.where(torch.arange(5) < 2, 0.5, math.inf)),
    "an integer made float": ("f_mul(c0(k), to_float32(2*k - 1))", lambda x: x * (2 * torch.arange(5) - 1).float()),
    "a condition made float": ("to_float32(Piecewise((1, k < 2), (0, True)))", lambda x: (torch.arange(5) < 2).float()),
    "a float made index": ("c0(to_int(f_floor(f_div(to_float32(k), const(2, 1)))))", lambda x: x[torch.arange(5) // 2]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("score", "expected"), WEAK.values(), ids=WEAK)
def test_numbers_are_weak(score: str, expected: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    torch.testing.assert_close(value(score, X.to(dtype)), expected(X.to(dtype)), rtol=0, atol=0)


def test_constants_are_exact() -> None:
    for number in (0.1, -2.5e-300, torch.finfo(torch.float32).min, 1e308):
        numerator, denominator = number.as_integer_ratio()
        assert value(f"f_mul(c0(k), const({numerator}, {denominator}))", torch.ones(5).double())[0].item() == number
    assert [value(f"f_neg(const({n}, 0))").item() for n in (1, -1)] == [-math.inf, math.inf]
    assert math.isnan(value("f_neg(const(0, 0))").item())


TERMS: dict[str, tuple[str, list[str] | None]] = {
    "the plain score": ("", []),
    "one term": ("f_add(s, c0(h))", ["c0(h)"]),
    "s on the right": ("f_add(c0(h), s)", ["c0(h)"]),
    "two, in order": ("f_add(f_add(s, c0(h)), c1(k))", ["c0(h)", "c1(k)"]),
    "a sum that is a term": ("f_add(s, f_add(c0(h), c1(k)))", ["f_add(c0(h), c1(k))"]),
    "a factor": ("f_mul(s, c0(h))", None),
    "s twice": ("f_add(s, s)", None),
    "s within a term": ("f_add(f_tanh(s), c0(h))", None),
    "no s": ("c0(h)", None),
}


@pytest.mark.parametrize(("score", "terms"), TERMS.values(), ids=TERMS)
def test_additive_terms(score: str, terms: list[str] | None) -> None:
    found = additive_terms(score)
    assert (None if found is None else [*map(sympy.sstr, found)]) == terms


WHOLE_ROWS = {
    "the plain score": ("", False),
    "a softcap": ("f_mul(f_tanh(f_div(s, const(50, 1))), const(50, 1))", False),
    "a distance": ("f_add(s, f_mul(c0(h), to_float32(k - q - 4095)))", False),
    "a table of distances": ("f_add(s, c0(c1(k - q + 4095), h))", False),
    "one number a pair": ("f_add(s, c0(b, 0, q, k))", True),
    "one number a distance": ("f_add(s, c0(h, k - q + 4095))", True),
    "one number a key": ("f_add(s, c0(b, k))", False),
    "a number a key that is given": ("f_add(s, mask(c0(b, k)))", True),
    "-inf": ("f_where(k <= q, s, const(-1, 0))", False),
    "a large constant": ("f_where(k <= q, s, const(-10000, 1))", True),
    "a dense condition": ("f_where(Ne(c0(q, k), 0), s, const(-1, 0))", False),
    "a large integer choice": ("f_add(s, to_float32(Piecewise((0, k <= q), (-10000, True))))", True),
    "a large integer factor": ("f_add(s, to_float32(-10000*c0(b, k)))", True),
}


@pytest.mark.parametrize(("score", "expected"), WHOLE_ROWS.values(), ids=WHOLE_ROWS)
def test_scores_that_may_hide_a_row(score: str, expected: bool) -> None:
    assert needs_whole_rows(score) == expected


def test_what_learns_hides_no_row() -> None:
    """A parameter starts small; a mask is given."""
    assert not needs_whole_rows("f_add(s, c0(0, h, q, k))", (0,))
    assert needs_whole_rows("f_add(f_add(s, c0(0, h, q, k)), c1(b, 0, q, k))", (0,))
    assert needs_whole_rows("f_add(s, f_mul(c0(h), const(-10000, 1)))", (0,))


REFUSED = {
    "not a formula": ("f_add(s,", "does not parse"),
    "a boolean": ("k <= q", "must be a number over s, b, h, q, k and captures.*it is a LessThan"),
    "an unknown symbol": ("f_add(s, bias)", r"it mentions \['bias'\]"),
    "an unknown function": ("f_gamma(s)", "f_gamma cannot be evaluated.*In the formula"),
    "a capture that was not given": ("f_add(s, c3(h))", "c3 names no captured tensor: there are 1"),
}


@pytest.mark.parametrize(("score", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_scores(score: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        value(score, X, s=X)


def test_gradients_of_captures_are_summed_where_they_were_looked_up() -> None:
    """An element that a block looks up twice, from either end, gets both shares; gradients work under no_grad."""
    table, gradients = X, CaptureGradients([X], [0], torch.float32)
    with torch.no_grad():
        score, pull = Score("f_mul(s, c0(Mod(k, 3) - 2))", [table]).with_gradient(Y, POINTS, gradients)
        grad = pull(torch.ones(5))
    at = torch.arange(5) % 3 - 2
    assert torch.equal(score, Y * X[at])
    assert torch.equal(grad, X[at])
    expected = torch.zeros(5).index_put_((at % 5,), Y, accumulate=True)
    torch.testing.assert_close(gradients.totals()[0].float(), expected)
