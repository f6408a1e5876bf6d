"""Operators that lay rows elsewhere along one dim: `cat`, `slice`, `split`, `pad`, `slice_scatter`. What each result is made of.

    cat([a, b], 1)        rows 0..10 of a at 0, rows 0..25 of b at 11
    x[:, 1:]              rows 1..28 of x at 0
    pad(x, (0, 0, 1, 0))  rows 0..28 of x at 1, zeros before

Along the sequence such an operator is one exchange of the rows that change rank (`runtime.moves`), if sizes are plain ints.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoseq.passes.factors import Size
from autoseq.passes.rules.rule import argument, as_dim, first_val, operand_shapes, result_shapes
from autoseq.runtime.moves import Piece

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Move:
    """One result: the dim along which rows move, its length, the pieces it is made of, and what is where no piece is."""

    dim: int
    length: int
    pieces: tuple[Piece, ...]
    fill: float = 0.0


def moves_of(node: fx.Node) -> list[Move] | None:
    """The moves of each result of a node, or None if it is no such operator or has a symbolic size along the dim."""
    how = _MOVES.get(node.target)
    return how(node) if how else None


def keeps_most(part: int, whole: int) -> bool:
    """Whether a part has so many of the rows that the ranks' shares of the whole are fair shares of it too."""
    return 4 * part >= 3 * whole


def _static(*sizes: Size) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _cat(node: fx.Node) -> list[Move] | None:
    shapes = [s for s in operand_shapes(node) if s is not None]
    rank = len(result_shapes(node)[0])
    dim = as_dim(argument(node, 1, "dim", 0), rank)
    if any(len(s) != rank for s in shapes) or not _static(*(s[dim] for s in shapes)):
        return None
    ends = list(itertools.accumulate(int(s[dim]) for s in shapes))
    pieces = tuple((part, 0, end - int(s[dim]), int(s[dim])) for part, (s, end) in enumerate(zip(shapes, ends, strict=True)))
    return [Move(dim, ends[-1], pieces)]


def _slice(node: fx.Node) -> list[Move] | None:
    shape, result = first_val(node).shape, result_shapes(node)[0]
    dim = as_dim(argument(node, 1, "dim", 0), len(shape))
    start = argument(node, 2, "start") or 0
    if argument(node, 4, "step", 1) != 1 or not _static(shape[dim], result[dim], start):
        return None
    first = min(max(start + shape[dim] if start < 0 else start, 0), shape[dim])
    return [Move(dim, int(result[dim]), ((0, first, 0, int(result[dim])),))]


def _part_written(node: fx.Node) -> list[Move] | None:
    """`slice_scatter`: rows of the first operand around those of the second."""
    shape, part = first_val(node).shape, operand_shapes(node)[1]
    assert part is not None
    dim = as_dim(argument(node, 2, "dim", 0), len(shape))
    start = argument(node, 3, "start") or 0
    if argument(node, 5, "step", 1) != 1 or not _static(shape[dim], part[dim], start):
        return None
    length, count = int(shape[dim]), int(part[dim])
    first = min(max(start + length if start < 0 else start, 0), length)
    end = first + count
    return [Move(dim, length, ((0, 0, 0, first), (1, 0, first, count), (0, end, end, length - end)))]


def _cut_up(node: fx.Node) -> list[Move] | None:
    shape, results = first_val(node).shape, result_shapes(node)
    dim = as_dim(argument(node, 2, "dim", 0), len(shape))
    if not _static(*(r[dim] for r in results)):
        return None
    ends = itertools.accumulate(int(r[dim]) for r in results)
    return [Move(dim, int(r[dim]), ((0, end - int(r[dim]), 0, int(r[dim])),)) for r, end in zip(results, ends, strict=True)]


def _pad(node: fx.Node) -> list[Move] | None:
    """One padded (or cut) dim, filled with a number."""
    shape, result = first_val(node).shape, result_shapes(node)[0]
    amounts: list[Any] = list(node.args[1])  # type: ignore[arg-type]  # (before, after) of the last dim first
    padded = {len(shape) - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}
    mode, value = ("constant", argument(node, 2, "value", 0)) if node.target is aten.constant_pad_nd.default else (
        argument(node, 2, "mode", "constant"), argument(node, 3, "value", None))  # fmt: skip
    if mode != "constant" or len(padded) != 1:
        return None
    (dim,) = padded
    before = amounts[2 * (len(shape) - 1 - dim)]
    if not _static(before, shape[dim], result[dim]):
        return None
    start, at = max(0, -before), max(0, before)
    count = min(int(shape[dim]) - start, int(result[dim]) - at)
    return [Move(dim, int(result[dim]), ((0, start, at, count),), float(value or 0.0))] if count > 0 else None


_MOVES = {
    aten.cat.default: _cat, aten.slice.Tensor: _slice, aten.slice_scatter.default: _part_written,
    aten.pad.default: _pad, aten.constant_pad_nd.default: _pad,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default), _cut_up),
}  # fmt: skip
