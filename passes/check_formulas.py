"""Check that a formula is what its subgraph computes, before it replaces a tensor: both are computed on small sizes and compared.

A difference is an error of the compiler itself, never a wrong mask.
"""

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from autoseq.passes.formula import Reader
from autoseq.passes.formula.values import Index, h, is_bool
from autoseq.passes.score_structure import Structure
from autoseq.passes.shrink import random_values, shrink
from autoseq.passes.sizes import hint
from autoseq.runtime.formula import Points, evaluate_float

IndexOf = Callable[[Sequence[Any]], Index]
"""The index at (b, h, q, k) of a tensor of a given shape."""


def check_reading(root: fx.Node, reader: Reader, index_of: IndexOf, *, q_len: Any, k_len: Any, batch: Any, heads: int) -> None:
    """Raise AssertionError if what `reader` reads of `root` is not what `root` holds; CannotShrink if that cannot be found out."""
    small = shrink(root, reader.captures, q_len=q_len, k_len=k_len, lanes=max(1, hint(batch) * heads))
    value = small.value(root)
    again = Reader(limits={h: heads})
    read = again.at(small.of[root], index_of(value.shape))
    points = Points.of(small.size(hint(batch)), range(small.size(heads)), torch.arange(small.q_len), torch.arange(small.k_len))
    captured = [node.meta["val"] for node in again.captures]
    actual, expected = _evaluated(read, points, captured, None), _looked_up(value, index_of(value.shape), points)
    compare(f"{root} at short lengths", actual, expected, 0.0 if is_bool(read) else 1e-5)


def check_structure(
    score: Any, predicate: Any, structure: Structure, captures: Sequence[fx.Node], *, heads: int, q_len: Any, k_len: Any
) -> None:
    """Raise AssertionError if a score formula's structure gives other probabilities than the formula: at some positions, on random data."""
    generator = torch.Generator().manual_seed(0)
    points = Points.of(1, range(heads), *(_some_positions(hint(n)) for n in (q_len, k_len)))
    captured = [random_values([hint(size) for size in val.shape], val.dtype, generator) for val in (node.meta["val"] for node in captures)]
    s = torch.randn(1, heads, points.q.numel(), points.k.numel(), generator=generator)
    plain = _masked(_evaluated(score, points, captured, s), predicate, points, captured)
    ours = _masked(_evaluated(structure.score, points, captured, s * structure.scale), structure.predicate, points, captured)
    empty = (ours == -torch.inf).all(-1, keepdim=True)
    expected = torch.softmax(plain, -1)
    fill = 1.0 / ours.shape[-1] if structure.empty_rows.startswith("uniform") else torch.nan
    actual = torch.where(empty, fill, torch.softmax(ours, -1))
    # Random data may hold what the program's own never does, numbers of a mask that is not 0 or 1: such rows say nothing.
    said = ~plain.isnan().any(-1, keepdim=True)
    compare("the attention probability", torch.where(said, actual, 0.0), torch.where(said, expected, 0.0), 1e-5)


def _masked(score: torch.Tensor, predicate: Any, points: Points, captures: list[torch.Tensor]) -> torch.Tensor:
    allowed = _evaluated(predicate, points, captures, None)
    return torch.where(allowed, score, -torch.inf)


def _evaluated(formula: Any, points: Points, captures: list[torch.Tensor], s: torch.Tensor | None) -> torch.Tensor:
    value = evaluate_float(formula, points, captures, s)
    return value.bool() if is_bool(formula) else value


def _looked_up(value: torch.Tensor, index: Index, points: Points) -> torch.Tensor:
    at = [torch.as_tensor(evaluate_float(sympy.sympify(i), points, [])) for i in index]
    return value[tuple(i.long() for i in at)] if at else value


def _some_positions(length: int, most: int = 40) -> torch.Tensor:
    if length <= most:
        return torch.arange(length)
    spread = torch.arange(0, length, max(1, length // (most - 8)))
    return torch.unique(torch.cat([torch.arange(4), spread, torch.arange(length - 4, length)]))


def compare(what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raise AssertionError where values differ."""
    actual, expected = torch.broadcast_tensors(actual, expected)
    same = torch.isclose(actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    if not bool(same.all()):
        at = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(f"{what} is {expected[at].item():g} at {at}, and its formula gives {actual[at].item():g}")
