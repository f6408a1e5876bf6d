"""Reading operators that move or choose elements, of any type: views, gathers by index, `where`, `cat`, triangles."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from autoseq.passes.factors import reshape_dims
from autoseq.passes.formula.integers import whole
from autoseq.passes.formula.values import Index, Unreadable, as_bool, as_int, call, convert, divide, join_digits, span
from autoseq.passes.sizes import same_size

if TYPE_CHECKING:
    from autoseq.passes.formula.reader import Reader

aten = torch.ops.aten


def choose(condition: Any, yes: Any, no: Any, dtype: torch.dtype) -> Any:
    """`yes` where the condition holds, else `no`, as values of `dtype`."""
    if condition is sympy.true or condition is sympy.false:
        return yes if condition is sympy.true else no
    if dtype == torch.bool:
        yes, no = as_bool(yes), as_bool(no)
        if no in (sympy.true, sympy.false):
            condition, yes, no = sympy.Not(condition), no, yes
        if yes in (sympy.true, sympy.false):
            return sympy.Or(condition, no) if yes is sympy.true else sympy.And(sympy.Not(condition), no)
        return sympy.ITE(condition, yes, no)
    if dtype.is_floating_point:
        return call("f_where", condition, yes, no)
    return sympy.Piecewise((as_int(yes), condition), (as_int(no), True))


def _typed(reader: Reader, value: Any, index: Index, dtype: torch.dtype) -> Any:
    if dtype.is_floating_point:
        return reader.float_operand(value, index, dtype)
    operand = reader.operand(value, index)
    return operand if not isinstance(value, fx.Node) else convert(operand, value.meta["val"].dtype, dtype)


def _same(reader: Reader, node: fx.Node, index: Index) -> Any:
    return reader.at(node.args[0], index)  # type: ignore[arg-type]


def _detach(reader: Reader, node: fx.Node, index: Index) -> Any:
    """A float that gets no gradient must not be read through to one that does."""
    if node.meta["val"].is_floating_point():
        raise Unreadable(node)
    return reader.at(node.args[0], index)  # type: ignore[arg-type]


def _copy(reader: Reader, node: fx.Node, index: Index) -> Any:
    return _typed(reader, node.args[1], index, node.meta["val"].dtype)


def _expand(reader: Reader, node: fx.Node, index: Index) -> Any:
    return reader.operand(node.args[0], index)


def _unsqueeze(reader: Reader, node: fx.Node, index: Index) -> Any:
    dim = int(node.args[1]) % len(index)  # type: ignore[arg-type]
    return reader.at(node.args[0], index[:dim] + index[dim + 1:])  # type: ignore[arg-type]


def _view(reader: Reader, node: fx.Node, index: Index) -> Any:
    """A reshape whose dims split or merge: an index splits into digits, and digits join."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    old, new = source.meta["val"].shape, node.meta["val"].shape
    old_dims, new_dims, sizes, mixed = reshape_dims(old, new)
    if mixed:
        raise Unreadable(node)
    digits: dict[str, Any] = {}
    for i, names in zip(index, new_dims, strict=True):
        for name in reversed(names[1:]):
            i, digits[name] = divide(i, int(whole(sizes[name])), reader.limits)
        if names:
            digits[names[0]] = i
    return reader.at(source, tuple(
        join_digits([digits[n] for n in names], [int(whole(sizes[n])) if i else 1 for i, n in enumerate(names)]) for names in old_dims))


def _permute(reader: Reader, node: fx.Node, index: Index) -> Any:
    source_index = list(index)
    for i, dim in enumerate(node.args[1]):  # type: ignore[arg-type]
        source_index[dim] = index[i]  # type: ignore[index]
    return reader.at(node.args[0], tuple(source_index))  # type: ignore[arg-type]


def _transpose(reader: Reader, node: fx.Node, index: Index) -> Any:
    swapped = list(index)
    x, y = (int(d) for d in node.args[1:3]) if len(node.args) > 1 else (0, -1)  # type: ignore[arg-type]
    swapped[x], swapped[y] = swapped[y], swapped[x]
    return reader.at(node.args[0], tuple(swapped))  # type: ignore[arg-type]


def _bounds(node: fx.Node, position: int, size: Any) -> tuple[int, int | None, int]:
    """Start, end (None: the whole rest) and step of a slice, counted from the front."""
    start, end, step = ((*node.args, *(None,) * 6)[position + i] for i in range(3))
    start = 0 if start is None else start
    if not all(isinstance(x, int) or x is None for x in (start, end, step)):
        raise Unreadable(node)
    if (start < 0 or (end is not None and end < 0)) and not isinstance(size, int):  # type: ignore[operator]
        raise Unreadable(node)
    start = max(start + size, 0) if start < 0 else start  # type: ignore[operator]
    end = end + size if end is not None and end < 0 else end  # type: ignore[operator]
    return start, end, step or 1  # type: ignore[return-value]


def _slice(reader: Reader, node: fx.Node, index: Index) -> Any:
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    dim = int((*node.args, 0)[1]) % len(index)  # type: ignore[arg-type]
    start, _, step = _bounds(node, 2, source.meta["val"].shape[dim])
    return reader.at(source, index[:dim] + (start + index[dim] * step,) + index[dim + 1:])


def _select(reader: Reader, node: fx.Node, index: Index) -> Any:
    source, dim, at = node.args[:3]
    if not isinstance(at, int) or at < 0:
        raise Unreadable(node)
    dim = int(dim) % (len(index) + 1)  # type: ignore[arg-type]
    return reader.at(source, index[:dim] + (sympy.Integer(at),) + index[dim:])  # type: ignore[arg-type]


def _scatter(position: int, is_slice: bool) -> Callable[..., Any]:
    """`slice_scatter` and `select_scatter`: a tensor with a part of it replaced."""

    def rule(reader: Reader, node: fx.Node, index: Index) -> Any:
        source, part = node.args[:2]
        dim = int((*node.args, 0)[2]) % len(index)  # type: ignore[arg-type]
        i, size = index[dim], source.meta["val"].shape[dim]  # type: ignore[union-attr]
        if is_slice:
            start, end, step = _bounds(node, position, size)
            if step != 1:
                raise Unreadable(node)
            inside = sympy.And(i >= start, sympy.true if end is None else i < end)
            rows = whole(part.meta["val"].shape[dim])  # type: ignore[union-attr]
            at = (sympy.Max(0, sympy.Min(i - start, rows - 1)),)
        else:
            inside, at = sympy.Eq(i, whole(node.args[position])), ()
        replaced = reader.at(part, index[:dim] + at + index[dim + 1:])  # type: ignore[arg-type]
        return choose(inside, replaced, reader.at(source, index), node.meta["val"].dtype)  # type: ignore[arg-type]

    return rule


def _cat(reader: Reader, node: fx.Node, index: Index) -> Any:
    parts, dim = node.args[0], int((*node.args, 0)[1]) % len(index)  # type: ignore[arg-type]
    dtype, i, start = node.meta["val"].dtype, index[dim], sympy.Integer(0)
    read: list[tuple[Any, Any]] = []
    for part in parts:  # type: ignore[union-attr]
        rows = whole(part.meta["val"].shape[dim])
        clamped = sympy.Max(0, sympy.Min(i - start, rows - 1))  # the branch not taken is read all the same
        value = convert(reader.at(part, index[:dim] + (clamped,) + index[dim + 1:]), part.meta["val"].dtype, dtype)
        read.append((value, i < start + rows))
        start += rows
    result = read[-1][0]
    for value, inside in reversed(read[:-1]):
        result = choose(inside, value, result, dtype)
    return result


def _where(reader: Reader, node: fx.Node, index: Index) -> Any:
    condition, dtype = as_bool(reader.operand(node.args[0], index)), node.meta["val"].dtype
    yes, no = (_typed(reader, a, index, dtype) for a in node.args[1:])
    return choose(condition, yes, no, dtype)


def _masked_fill(reader: Reader, node: fx.Node, index: Index) -> Any:
    source, mask, value = node.args
    dtype = node.meta["val"].dtype
    filled, kept = (_typed(reader, a, index, dtype) for a in (value, source))
    return choose(as_bool(reader.operand(mask, index)), filled, kept, dtype)


def _index(reader: Reader, node: fx.Node, index: Index) -> Any:
    """Indices of dims in a row: what they have in common replaces those dims."""
    source, indices = node.args
    given: list[Any] = [i for i in indices if i is not None]  # type: ignore[union-attr]
    first = next(d for d, i in enumerate(indices) if i is not None)  # type: ignore[arg-type]
    if list(indices[first : first + len(given)]) != given or any(i.meta["val"].dtype == torch.bool for i in given):  # type: ignore[index]
        raise Unreadable(node)
    end = first + max(i.meta["val"].dim() for i in given)
    moved = [_position(reader, i, index[first:end]) for i in given]
    return reader.at(source, (*index[:first], *moved, *index[end:]))  # type: ignore[arg-type]


def _position(reader: Reader, at: fx.Node, index: Index) -> Any:
    """A position looked up by another tensor; a negative one would count from the end."""
    position = as_int(reader.operand(at, index))
    if span(position, reader.limits)[0] < 0:
        raise Unreadable(at)
    return position


def _embedding(reader: Reader, node: fx.Node, index: Index) -> Any:
    if any(node.args[3:]) or any(node.kwargs.values()):  # gradients by frequency, sparse gradients
        raise Unreadable(node)
    weight, ids = node.args[:2]
    return reader.at(weight, (as_int(reader.at(ids, index[:-1])), index[-1]))  # type: ignore[arg-type]


def _gather(reader: Reader, node: fx.Node, index: Index) -> Any:
    """`gather`, and `index_select`, whose index has one dim: torch takes no negative index in either."""
    source, dim, at = node.args[:3]
    dim = int(dim) % len(index)  # type: ignore[arg-type]
    where = (index[dim],) if node.target is aten.index_select.default else index
    position = as_int(reader.at(at, where))  # type: ignore[arg-type]
    return reader.at(source, index[:dim] + (position,) + index[dim + 1:])  # type: ignore[arg-type]


def _flip(reader: Reader, node: fx.Node, index: Index) -> Any:
    flipped = list(index)
    for dim in node.args[1]:  # type: ignore[union-attr]
        flipped[dim] = whole(node.meta["val"].shape[dim]) - 1 - index[dim]
    return reader.at(node.args[0], tuple(flipped))  # type: ignore[arg-type]


def _repeat(reader: Reader, node: fx.Node, index: Index) -> Any:
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    shape = source.meta["val"].shape
    tail = index[len(index) - len(shape):]
    return reader.at(source, tuple(
        i if same_size(size, node.meta["val"].shape[d - len(shape)]) else sympy.Mod(i, whole(size))
        for d, (i, size) in enumerate(zip(tail, shape, strict=True))))


def _repeat_interleave(reader: Reader, node: fx.Node, index: Index) -> Any:
    dim = node.args[2] if len(node.args) > 2 else None
    if dim is None:
        raise Unreadable(node)
    dim = int(dim) % len(index)  # type: ignore[arg-type]
    return reader.at(node.args[0], index[:dim] + (sympy.floor(index[dim] / whole(node.args[1])),) + index[dim + 1:])  # type: ignore[arg-type]


def _triangle(keep: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Any:
        dtype = node.meta["val"].dtype
        inside = keep(index[-1] - index[-2], whole(node.args[1] if len(node.args) > 1 else 0))
        zero = convert(sympy.Integer(0), torch.int64, dtype) if not dtype.is_floating_point else call("const", 0, 1)
        return choose(inside, reader.at(node.args[0], index), zero, dtype)  # type: ignore[arg-type]

    return rule


RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.alias.default, aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default), _same),
    aten.detach.default: _detach, aten.copy.default: _copy,
    aten.expand.default: _expand, aten.unsqueeze.default: _unsqueeze, aten.permute.default: _permute,
    **dict.fromkeys((aten.reshape.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims), _view),
    aten.transpose.int: _transpose, aten.t.default: _transpose,
    aten.slice.Tensor: _slice, aten.select.int: _select,
    aten.slice_scatter.default: _scatter(3, True), aten.select_scatter.default: _scatter(3, False),
    aten.cat.default: _cat, aten.flip.default: _flip, aten.repeat.default: _repeat, aten.repeat_interleave.self_int: _repeat_interleave,
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), _where),
    aten.masked_fill.Scalar: _masked_fill, aten.masked_fill.Tensor: _masked_fill,
    aten.index.Tensor: _index, aten.embedding.default: _embedding, aten.gather.default: _gather, aten.index_select.default: _gather,
    aten.tril.default: _triangle(operator.le), aten.triu.default: _triangle(operator.ge),
}  # fmt: skip


def _merging_view(reader: Reader, node: fx.Node, index: Index) -> Any:
    """A reshape that splits no dim: heads stay apart from their features."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    old_dims = reshape_dims(source.meta["val"].shape, node.meta["val"].shape)[0]
    if any(len(names) > 1 for names in old_dims):
        raise Unreadable(node)
    return _view(reader, node, index)


_CUTS = (aten.slice.Tensor, aten.select.int, aten.slice_scatter.default, aten.select_scatter.default, aten.cat.default)
WITHIN_DIMS: dict[Any, Callable[..., Any]] = {
    **{op: rule for op, rule in RULES.items() if op not in _CUTS}, aten.reshape.default: _merging_view,
}  # fmt: skip
"""The rules as far as they keep each dim what it is, and all of it."""
