"""Reading operators on whole numbers and truth values: SymPy's own arithmetic, which simplifies."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from autoseq.passes.formula.floats import fold
from autoseq.passes.formula.values import INTEGER_BITS, Index, Unreadable, as_bool, as_int
from autoseq.passes.sizes import same_size

if TYPE_CHECKING:
    from autoseq.passes.formula.reader import Reader

aten = torch.ops.aten


def whole(value: Any) -> Any:
    """An integer argument of a node as SymPy; a symbolic size has no place in a formula yet."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, torch.SymInt) or value != int(value):
        raise Unreadable(value)
    return sympy.Integer(value)


def _arange(reader: Reader, node: fx.Node, index: Index) -> Any:
    start = whole(node.args[0]) if len(node.args) > 1 else 0
    step = whole(node.args[2]) if len(node.args) > 2 else 1
    return start + index[0] * step


def _fill(value_of: Callable[[fx.Node], Any]) -> Callable[..., Any]:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Any:
        value = value_of(node)
        if isinstance(value, fx.Node):
            raise Unreadable(value)
        return sympy.sympify(bool(value)) if node.meta["val"].dtype == torch.bool else whole(value)

    return rule


def _fill_tensor(reader: Reader, node: fx.Node, index: Index) -> Any:
    return reader.operand(node.args[1], index)


def _cast(reader: Reader, node: fx.Node, index: Index) -> Any:
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    value = reader.at(source, index)
    integers = {source.meta["val"].dtype, node.meta["val"].dtype}
    if integers == set(INTEGER_BITS) and value.has(AppliedUndef):
        raise Unreadable(value)  # what is looked up may be cut off, or computed with in the wrong width
    return fold(as_bool(value)) if node.meta["val"].dtype == torch.bool else value


def _elementwise(combine: Callable[..., Any], *, booleans: bool = False) -> Callable[..., Any]:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Any:
        if node.kwargs.get("alpha", 1) != 1 or node.args[2:] not in ((), (1,)):  # `.Scalar` forms take alpha by position
            raise Unreadable(node)
        read = as_bool if booleans else as_int
        return combine(*(read(reader.operand(a, index)) for a in node.args[:2]))

    return rule


def _divide(reader: Reader, node: fx.Node, index: Index) -> Any:
    if node.kwargs.get("rounding_mode") != "floor":
        raise Unreadable(node)
    x, y = (as_int(reader.operand(a, index)) for a in node.args[:2])
    return sympy.floor(x / y)


def _clamp(reader: Reader, node: fx.Node, index: Index) -> Any:
    value = as_int(reader.operand(node.args[0], index))
    low, high = (*node.args[1:], None, None)[:2]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    value = value if low is None else sympy.Max(value, as_int(reader.operand(low, index)))
    return value if high is None else sympy.Min(value, as_int(reader.operand(high, index)))


def _diff(reader: Reader, node: fx.Node, index: Index) -> Any:
    source, n, dim, prepend, append = (*node.args, *(None,) * 5)[:5]
    n, dim = (1 if n is None else n), int(-1 if dim is None else dim) % len(index)  # type: ignore[arg-type]
    if n != 1 or append is not None:
        raise Unreadable(node)

    def read(x: fx.Node, i: Any) -> Any:
        return as_int(reader.at(x, index[:dim] + (i,) + index[dim + 1:]))

    at = index[dim]
    if prepend is None:
        return read(source, at + 1) - read(source, at)  # type: ignore[arg-type]
    if not same_size(prepend.meta["val"].shape[dim], 1):  # type: ignore[union-attr]
        raise Unreadable(node)
    first = read(source, sympy.Integer(0)) - read(prepend, sympy.Integer(0))  # type: ignore[arg-type]
    return sympy.Piecewise((first, at < 1), (read(source, at) - read(source, at - 1), True))  # type: ignore[arg-type]


def _cumsum(reader: Reader, node: fx.Node, index: Index) -> Any:
    """Only a sum of one constant has a closed form here; any other running sum is looked up."""
    dim = int(node.args[1]) % max(len(index), 1)  # type: ignore[arg-type]
    generic = sympy.Symbol("i", integer=True, nonnegative=True)
    probe = type(reader)()
    term = as_int(probe.at(node.args[0], index[:dim] + (generic,) + index[dim + 1:]))  # type: ignore[arg-type]
    if not term.is_Integer:
        raise Unreadable(node)
    return term * (index[dim] + 1)


def either(x: Any, y: Any) -> Any:
    """Exclusive or, in the words `&`, `|`, `~`: SymPy writes its own Xor so that it cannot be parsed again."""
    return sympy.Or(sympy.And(x, sympy.Not(y)), sympy.And(sympy.Not(x), y))


def _compare(relation: Callable[..., Any]) -> Callable[..., Any]:
    """A comparison in whole numbers: SymPy turns `floor(q/3) >= 2` into `q/3 >= 2`, which would be computed in floats."""

    def rule(x: Any, y: Any) -> Any:
        compared = relation(x, y)
        if not isinstance(compared, sympy.core.relational.Relational):
            return compared
        numerator, denominator = (compared.lhs - compared.rhs).as_numer_denom()
        return fold(compared if denominator == 1 else compared.func(numerator, 0))

    return rule


def _bitwise(op: Callable[..., Any]) -> Callable[..., Any]:
    """`&`, `|`, `^`, `~` are logic on bool tensors; on integers they are not read."""

    def rule(reader: Reader, node: fx.Node, index: Index) -> Any:
        if node.meta["val"].dtype != torch.bool:
            raise Unreadable(node)
        return op(*(as_bool(reader.operand(a, index)) for a in node.args))

    return rule


def _logical(op: Callable[..., Any]) -> Callable[..., Any]:
    return _elementwise(op, booleans=True)


RULES: dict[Any, Callable[..., Any]] = {
    aten.arange.default: _arange, aten.arange.start: _arange, aten.arange.start_step: _arange,
    aten.full.default: _fill(lambda n: n.args[1]), aten.full_like.default: _fill(lambda n: n.args[1]),
    aten.new_full.default: _fill(lambda n: n.args[2]), aten.scalar_tensor.default: _fill(lambda n: n.args[0]),
    aten.fill.Scalar: _fill(lambda n: n.args[1]), aten.fill.Tensor: _fill_tensor,
    **{op: _fill(lambda n: 1) for op in (aten.ones.default, aten.new_ones.default, aten.ones_like.default)},
    **{op: _fill(lambda n: 0) for op in (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)},
    **dict.fromkeys((aten._to_copy.default, aten.to.dtype), _cast),
    **{getattr(getattr(aten, name), form): _elementwise(op) for form in ("Tensor", "Scalar") for name, op in {
        "add": sympy.Add, "mul": sympy.Mul, "sub": lambda x, y: x - y}.items()},
    **{getattr(getattr(aten, name), form): _elementwise(_compare(op)) for form in ("Tensor", "Scalar") for name, op in {
        "eq": sympy.Eq, "ne": sympy.Ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}.items()},
    aten.rsub.Scalar: _elementwise(lambda x, y: y - x),
    aten.neg.default: _elementwise(lambda x: -x), aten.abs.default: _elementwise(sympy.Abs),
    aten.minimum.default: _elementwise(sympy.Min), aten.maximum.default: _elementwise(sympy.Max),
    aten.min.other: _elementwise(sympy.Min), aten.max.other: _elementwise(sympy.Max),
    aten.clamp.default: _clamp, aten.clamp_min.default: _clamp,
    aten.floor_divide.default: _elementwise(lambda x, y: sympy.floor(x / y)),
    aten.div.Tensor_mode: _divide, aten.div.Scalar_mode: _divide,
    aten.remainder.Scalar: _elementwise(sympy.Mod), aten.remainder.Tensor: _elementwise(sympy.Mod),
    aten.logical_and.default: _logical(sympy.And), aten.logical_or.default: _logical(sympy.Or),
    aten.logical_not.default: _logical(sympy.Not), aten.logical_xor.default: _logical(either),
    aten.bitwise_and.Tensor: _bitwise(sympy.And), aten.__and__.Tensor: _bitwise(sympy.And),
    aten.bitwise_or.Tensor: _bitwise(sympy.Or), aten.__or__.Tensor: _bitwise(sympy.Or),
    aten.bitwise_xor.Tensor: _bitwise(either), aten.__xor__.Tensor: _bitwise(either),
    aten.bitwise_not.default: _bitwise(sympy.Not),
    aten.diff.default: _diff, aten.cumsum.default: _cumsum,
}  # fmt: skip
