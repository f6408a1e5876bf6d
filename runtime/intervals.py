"""Proves, tile by tile of the score matrix, that a predicate holds everywhere or nowhere, by interval arithmetic.

Each number of the formula becomes its least and greatest value over a tile, each boolean what is certain of it; a lookup becomes the
least and greatest of the captured values it can meet. What cannot be bounded is unknown, and then nothing is claimed of the tile. All
tiles are decided at once, on the CPU, before the blocks of an attention run: on a GPU that is one wait for the captures, not one a tile.

The grid of tiles is [B, H, query tiles, key tiles]: b and h are exact, q and k are ranges. Values are float64, which holds every
integer that indexes anything; beyond 2^53 a value is unknown. Unknown is NaN: it goes through all arithmetic, and no comparison
holds of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import Tensor

from autoseq.runtime.float_functions import constant
from autoseq.runtime.formula import arguments, capture_number, is_true_division, parse

_EXACT = 2.0**53
_EXACT_IN_ANY_FLOAT = 256  # the integers that every float dtype holds
_LARGEST_CAPTURE = 2**22  # elements of a capture that is copied and searched
_LONGEST_SEARCH = 2**25  # elements that one lookup of all tiles may search


def prove(
    predicate: str, captures: list[Tensor], batch: int, heads: range, q_spans: Sequence[tuple[int, int]], k_spans: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Where the predicate is proven to hold and proven not to: two bool [len(heads) or 1, len(q_spans), len(k_spans)], on the CPU.

    A span is (first position, how many); `heads` are global.
    """
    b, h = torch.arange(batch).double(), torch.arange(heads.start, heads.stop).double()
    (q_low, q_high), (k_low, k_high) = (_ends(spans) for spans in (q_spans, k_spans))
    symbols = {
        "b": Range(b[:, None, None, None], b[:, None, None, None], exact=True),
        "h": Range(h[:, None, None], h[:, None, None], exact=True),
        "q": Range(q_low[:, None], q_high[:, None]),
        "k": Range(k_low, k_high),
    }
    verdict = _Prover(symbols, captures).boolean(parse(predicate))
    tiles = len(q_spans), len(k_spans)
    return _over_batch(verdict.always, *tiles), _over_batch(verdict.never, *tiles)


def _ends(spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    low = torch.tensor([start for start, _ in spans], dtype=torch.float64)
    return low, low + torch.tensor([rows - 1 for _, rows in spans], dtype=torch.float64)


def _over_batch(claim: Tensor, q_tiles: int, k_tiles: int) -> Tensor:
    claim = claim[(None,) * (4 - claim.ndim)].all(0)
    return claim.expand(-1, q_tiles, k_tiles)


@dataclass(frozen=True, slots=True)
class Range:
    """The least and greatest value over each tile. `exact` says that they are one and the same value by construction."""

    low: Tensor
    high: Tensor
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is certain of a boolean over each tile."""

    always: Tensor
    never: Tensor


UNKNOWN = Range(torch.tensor(torch.nan, dtype=torch.float64), torch.tensor(torch.nan, dtype=torch.float64))
UNDECIDED = Verdict(torch.tensor(False), torch.tensor(False))


@dataclass(frozen=True, slots=True)
class _Prover:
    symbols: dict[str, Range]
    captures: list[Tensor]
    copied: dict[int, Tensor] = field(default_factory=dict)  # captures on the CPU

    def boolean(self, node: Any) -> Verdict:
        if node in (sympy.true, sympy.false):
            return Verdict(torch.tensor(node == sympy.true), torch.tensor(node == sympy.false))
        if isinstance(node, sympy.core.relational.Relational):
            return _RELATIONS.get(type(node), lambda a, b: UNDECIDED)(*(self._compared(arg, node) for arg in node.args))
        if isinstance(node, sympy.Piecewise):
            return self._first_that_holds(node, self.boolean, Verdict(torch.tensor(False), torch.tensor(True)), _choose_boolean)
        connective = _CONNECTIVES.get(type(node))
        return connective(*(self.boolean(arg) for arg in node.args)) if connective else UNDECIDED

    def number(self, node: Any) -> Range:
        if node.is_Symbol:
            return self.symbols[node.name]
        if node.is_Integer:
            return _point(float(int(node)))
        if isinstance(node, AppliedUndef):
            return self._applied(node)
        if isinstance(node, sympy.Piecewise):
            return self._first_that_holds(node, self.number, _point(0.0), _choose_number)
        operation = _divide if is_true_division(node) else _OPERATIONS.get(node.func)
        return _without_rounded(operation(*(self.number(arg) for arg in arguments(node)))) if operation else UNKNOWN

    def _compared(self, node: Any, relation: Any) -> Range:
        """A side of a relation. A float capture counts only beside what its dtype holds exactly: nothing here rounds as it does."""
        if isinstance(node, sympy.logic.boolalg.Boolean) and not node.is_Symbol:  # to SymPy a symbol may be either
            verdict = self.boolean(node)
            return Range(verdict.always.double(), (~verdict.never).double())
        if self._is_float_lookup(node):
            others = [arg for arg in relation.args if not self._is_float_lookup(arg)]
            plain = all(arg.is_Integer and abs(int(arg)) <= _EXACT_IN_ANY_FLOAT for arg in others)
            return self._lookup(node) if plain else UNKNOWN
        return self.number(node)

    def _applied(self, node: AppliedUndef) -> Range:
        if capture_number(node) is not None:
            return UNKNOWN if self._is_float_lookup(node) else self._lookup(node)
        if node.func.__name__ == "const":
            return _point(constant(*map(int, node.args)))
        return UNKNOWN

    def _is_float_lookup(self, node: Any) -> bool:
        number = capture_number(node)
        return number is not None and number < len(self.captures) and self.captures[number].is_floating_point()

    def _lookup(self, node: AppliedUndef) -> Range:
        number = capture_number(node)
        if number is None or number >= len(self.captures) or self.captures[number].ndim != len(node.args):
            return UNKNOWN  # evaluating it raises, with the reason
        indices = [self.number(arg) for arg in node.args]
        if self.captures[number].numel() > _LARGEST_CAPTURE or sum(not index.exact for index in indices) > 1:
            return UNKNOWN
        if number not in self.copied:
            self.copied[number] = _on_cpu(self.captures[number])
        return _looked_up(self.copied[number], indices)

    def _first_that_holds(self, node: Any, value: Callable[[Any], Any], default: Any, choose: Callable[..., Any]) -> Any:
        result = default
        for branch, condition in reversed(node.args):
            result = choose(self.boolean(condition), value(branch), result)
        return result


def _on_cpu(capture: Tensor) -> Tensor:
    values = capture.detach().cpu()
    return values if values.is_floating_point() else values.to(torch.int64)


def _looked_up(values: Tensor, indices: list[Range]) -> Range:
    """The range of values[indices], of which at most one is a range."""
    if values.numel() == 0:
        return UNKNOWN
    wide = _without_rounded(Range(values.double(), values.double())).low
    ranged = next((axis for axis, index in enumerate(indices) if not index.exact), None)
    inside = functools.reduce(torch.logical_and, [_inside(i, n) for i, n in zip(indices, values.shape, strict=True)], torch.tensor(True))
    others = [_position(index.low, inside) for axis, index in enumerate(indices) if axis != ranged]
    if ranged is None:
        near = wide[tuple(others)], wide[tuple(others)]
    else:
        span = torch.broadcast_tensors(_position(indices[ranged].low, inside), _position(indices[ranged].high, inside))
        if int((span[1] - span[0] + 1).sum()) > _LONGEST_SEARCH:
            return UNKNOWN
        along = wide.movedim(ranged, -1)
        near = _over_runs(np.minimum, along, others, *span), _over_runs(np.maximum, along, others, *span)
    # An index that may lie outside is an overestimate of one that does not, or counts from the end: then it can be any element.
    low, high = (torch.where(inside, at, anywhere) for at, anywhere in zip(near, (wide.amin(), wide.amax()), strict=True))
    return Range(low, high, exact=ranged is None and bool(inside.all()))


def _without_rounded(x: Range) -> Range:
    low, high = (torch.where(end.abs() < _EXACT, end, torch.where(end.isinf(), end, torch.nan)) for end in (x.low, x.high))
    return Range(low, high, x.exact)


def _inside(index: Range, size: int) -> Tensor:
    return (index.low >= 0) & (index.high < size)


def _position(index: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside, index, 0.0).long()


def _over_runs(extreme: np.ufunc, values: Tensor, others: list[Tensor], first: Tensor, last: Tensor) -> Tensor:
    """The extreme of values[*others, first..last]."""
    ends = torch.stack([first, last + 1], -1).reshape(-1).numpy()
    # `reduceat` reduces between each two ends, of which every other pair is a run; a run may end where the values do.
    padded = np.concatenate([values.numpy(), values[..., :1].numpy()], -1)
    runs = torch.from_numpy(extreme.reduceat(padded, ends, axis=-1)[..., ::2])
    return runs[(*others, torch.arange(first.numel()).view(first.shape))]


def _point(value: float) -> Range:
    at = torch.tensor(value, dtype=torch.float64)
    return Range(at, at, exact=True)


def _exact(*ranges: Range) -> bool:
    return all(each.exact for each in ranges)


def _of_corners(operation: Callable[[Tensor, Tensor], Tensor], a: Range, b: Range) -> Range:
    """For an operation that is monotone in each argument on its own."""
    corners = torch.stack(torch.broadcast_tensors(*(operation(x, y) for x in (a.low, a.high) for y in (b.low, b.high))))
    return Range(corners.amin(0), corners.amax(0), _exact(a, b))


def _quotient(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Range, Range], Range]:
    def divide(a: Range, b: Range) -> Range:
        result, spans_zero = _of_corners(operation, a, b), (b.low <= 0) & (b.high >= 0)
        return Range(*(torch.where(spans_zero, torch.nan, end) for end in (result.low, result.high)), exact=result.exact)

    return divide


_divide = _quotient(torch.div)


def _fold(binary: Callable[[Range, Range], Range]) -> Callable[..., Range]:
    return lambda *ranges: functools.reduce(binary, ranges)


def _remainder(a: Range, b: Range) -> Range:
    """Of one positive divisor: the ends' remainders within one period, else anything below the divisor."""
    divisor = torch.where((b.low == b.high) & (b.low > 0), b.low, torch.nan)
    one_period = torch.floor(a.low / divisor) == torch.floor(a.high / divisor)
    low = torch.where(one_period, torch.remainder(a.low, divisor), 0 * a.low)
    return Range(low, torch.where(one_period, torch.remainder(a.high, divisor), divisor + 0 * a.high), _exact(a, b))


def _absolute(a: Range) -> Range:
    ends = torch.stack([a.low.abs(), a.high.abs()])
    return Range(torch.where((a.low <= 0) & (a.high >= 0), 0.0, ends.amin(0)), ends.amax(0), a.exact)


def _choose_number(condition: Verdict, a: Range, b: Range) -> Range:
    low = torch.where(condition.always, a.low, torch.where(condition.never, b.low, torch.minimum(a.low, b.low)))
    high = torch.where(condition.always, a.high, torch.where(condition.never, b.high, torch.maximum(a.high, b.high)))
    return Range(low, high)


def _choose_boolean(condition: Verdict, a: Verdict, b: Verdict) -> Verdict:
    return Verdict(*(
        (condition.always & first) | (condition.never & second) | (first & second)
        for first, second in ((a.always, b.always), (a.never, b.never))
    ))  # fmt: skip


def _not(a: Verdict) -> Verdict:
    return Verdict(a.never, a.always)


def _and(*parts: Verdict) -> Verdict:
    always = functools.reduce(torch.logical_and, [part.always for part in parts])
    return Verdict(always, functools.reduce(torch.logical_or, [part.never for part in parts]))


def _xor(a: Verdict, b: Verdict) -> Verdict:
    return Verdict((a.always & b.never) | (a.never & b.always), (a.always & b.always) | (a.never & b.never))


def _equal(a: Range, b: Range) -> Verdict:
    same = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    return Verdict(same, (a.high < b.low) | (b.high < a.low))


def _less(a: Range, b: Range) -> Verdict:
    return Verdict(a.high < b.low, a.low >= b.high)


def _less_or_equal(a: Range, b: Range) -> Verdict:
    return Verdict(a.high <= b.low, a.low > b.high)


_RELATIONS: dict[Any, Callable[[Range, Range], Verdict]] = {
    sympy.Eq: _equal,
    sympy.Ne: lambda a, b: _not(_equal(a, b)),
    sympy.Lt: _less,
    sympy.Le: _less_or_equal,
    sympy.Gt: lambda a, b: _less(b, a),
    sympy.Ge: lambda a, b: _less_or_equal(b, a),
}

_CONNECTIVES: dict[Any, Callable[..., Verdict]] = {
    sympy.And: _and,
    sympy.Or: lambda *parts: _not(_and(*map(_not, parts))),
    sympy.Xor: lambda *parts: functools.reduce(_xor, parts),
    sympy.Not: _not,
    sympy.ITE: _choose_boolean,
}

_OPERATIONS: dict[Any, Callable[..., Range]] = {
    sympy.Add: _fold(lambda a, b: Range(a.low + b.low, a.high + b.high, _exact(a, b))),
    sympy.Mul: _fold(functools.partial(_of_corners, torch.mul)),
    sympy.Max: _fold(lambda a, b: Range(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high), _exact(a, b))),
    sympy.Min: _fold(lambda a, b: Range(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high), _exact(a, b))),
    sympy.Abs: _absolute,
    sympy.Mod: _remainder,
    sympy.floor: _quotient(lambda a, b: torch.div(a, b, rounding_mode="floor")),
    sympy.ceiling: _quotient(lambda a, b: -torch.div(-a, b, rounding_mode="floor")),
}
