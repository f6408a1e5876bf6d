"""The value of an index-arithmetic tensor at an index, as a SymPy expression.

`read_masks` asks for a mask's value at (b, h, q, k). `arange` is its index, `expand` and `slice` move indices, `diff` of
consecutive positions folds to 1, a gather by index becomes function application. A tensor whose making is not understood
becomes a *capture*: a function `c0(b, k)` that the runtime looks up. So reading always ends; it is only more or less deep.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from autoseq.passes.sizes import same_size

aten = torch.ops.aten
Index = tuple[sympy.Expr, ...]

b, h, q, k = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "bhqk")


# SymPy's integers have no size, so a formula stands for a tensor only as long as the tensor's own integers do not wrap around.
_BITS = {torch.int32: 31, torch.int64: 63}
_UNKNOWN = 2**31  # how large a symbolic length or a looked-up value is taken to be


class Unreadable(Exception):
    """A tensor that has no formula; the caller decides what to do with it whole."""


class Reader:
    """Reads tensors of one graph; `captures` lists the nodes that the formulas look up, in the order of their names."""

    def __init__(self) -> None:
        self.captures: list[fx.Node] = []
        self._memo: dict[tuple[fx.Node, Index], Any] = {}
        self._limits: dict[sympy.Symbol, int] = {}  # index symbols are below these

    def at(self, node: fx.Node, index: Index) -> Any:
        """The value of tensor `node` at `index`: a SymPy integer expression, or a Boolean for a bool tensor."""
        key, val = (node, index), node.meta["val"]
        if val.dtype != torch.bool and val.dtype not in _BITS:
            raise _OtherNumbers(node)
        for i, size in zip(index, val.shape, strict=True):
            if i.is_Symbol and isinstance(size, int):
                self._limits[i] = max(size, self._limits.get(i, 0))  # pyright: ignore[reportCallIssue]
        if key not in self._memo:
            rule = _RULES.get(node.target) if node.op == "call_function" else None
            try:
                self._memo[key] = self._fitting(rule(self, node, index), val.dtype) if rule else self.capture(node, index)
            except Unreadable:
                self._memo[key] = self.capture(node, index)
        return self._memo[key]

    def _fitting(self, value: Any, dtype: torch.dtype) -> Any:
        """`value` as a value of `dtype`: a truth value, or an integer that the dtype holds without wrapping around."""
        if dtype == torch.bool:
            return as_bool(value)
        value = as_int(value)
        is_computed = not isinstance(value, sympy.core.function.AppliedUndef)
        if is_computed and _magnitude(value, self._limits) >= 2 ** _BITS[dtype]:
            raise Unreadable(value)
        return value

    def capture(self, node: fx.Node, index: Index) -> Any:
        if node not in self.captures:
            self.captures.append(node)
        looked_up = sympy.Function(f"c{self.captures.index(node)}", integer=True)(*index)
        return sympy.Ne(looked_up, 0) if node.meta["val"].dtype == torch.bool else looked_up

    def operand(self, value: Any, index: Index, of: fx.Node) -> Any:
        """An operand of a broadcasting operator with result `of`: a scalar, or a tensor read at the aligned index."""
        if not isinstance(value, fx.Node):
            return _scalar(value)
        if not isinstance(value.meta["val"], torch.Tensor):
            raise Unreadable(value)
        return self.at(value, broadcast(index, value.meta["val"].shape))


class _OtherNumbers(Unreadable):
    """Floats, and integers that wrap around early, are no index arithmetic: not read, and not captured as such either."""


def broadcast(index: Index, shape: torch.Size) -> Index:
    tail = index[len(index) - len(shape):]
    return tuple(sympy.Integer(0) if same_size(size, 1) else i for i, size in zip(tail, shape, strict=True))


def _scalar(value: Any) -> Any:
    """A Python number beside an integer tensor. torch compares the two in float32 if it is a float: exact below 2**24."""
    if isinstance(value, float):
        if not value.is_integer() or abs(value) >= 2**24:
            raise Unreadable(value)
        value = int(value)
    return sympy.sympify(value)


def _magnitude(x: Any, limits: dict[sympy.Symbol, int]) -> float | int:
    """No value of `x` is further from 0."""
    if x.is_Symbol or isinstance(x, sympy.core.function.AppliedUndef):
        return limits.get(x, _UNKNOWN)  # pyright: ignore[reportCallIssue]
    if x.is_Rational:
        return abs(x.p)
    if isinstance(x, sympy.Piecewise):
        return max(_magnitude(value, limits) for value, _ in x.args)  # pyright: ignore[reportGeneralTypeIssues]
    if isinstance(x, sympy.Mod):
        return _magnitude(x.args[1], limits)
    combine = {sympy.Add: sum, sympy.Mul: math.prod, sympy.Min: max, sympy.Max: max, sympy.Abs: sum, sympy.floor: lambda of: sum(of) + 1}
    return combine[x.func]([_magnitude(arg, limits) for arg in x.args]) if x.func in combine else math.inf


def as_bool(x: Any) -> Any:
    return x if is_bool(x) else sympy.Ne(x, 0)


def as_int(x: Any) -> Any:
    return sympy.Piecewise((1, x), (0, True)) if is_bool(x) else x


def is_bool(x: Any) -> bool:
    """Whether an expression is a truth value; a plain Symbol could be either to SymPy, here it is an integer."""
    return isinstance(x, Boolean) and not isinstance(x, sympy.Symbol)


def _size(value: Any) -> Any:
    """An integer argument of a node as SymPy; a symbolic size has no place in a formula yet."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, torch.SymInt) or value != int(value):
        raise Unreadable(value)
    return sympy.Integer(value)


def _dim(node: fx.Node, position: int, default: int = -1) -> int:
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    return int(dim) % max(node.meta["val"].dim(), 1)  # type: ignore[arg-type]


def _arange(reader: Reader, node: fx.Node, index: Index) -> Any:
    start = _size(node.args[0]) if len(node.args) > 1 else 0
    step = _size(node.args[2]) if len(node.args) > 2 else 1
    return start + index[0] * step


def _fill(value_of: Callable[[fx.Node], Any]) -> Callable[..., Any]:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Any:
        value = value_of(node)
        if isinstance(value, fx.Node):
            raise Unreadable(value)
        return sympy.sympify(bool(value)) if node.meta["val"].dtype == torch.bool else _size(value)

    return rule


def _same(reader: Reader, node: fx.Node, index: Index) -> Any:
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    value = reader.at(source, index)
    integers = {source.meta["val"].dtype, node.meta["val"].dtype}
    if integers == set(_BITS) and value.has(sympy.core.function.AppliedUndef):
        raise Unreadable(value)  # what is looked up may be cut off, or computed with in the wrong width
    return value


def _expand(reader: Reader, node: fx.Node, index: Index) -> Any:
    source = node.args[0]
    return reader.at(source, broadcast(index, source.meta["val"].shape))  # type: ignore[arg-type,union-attr]


def _unsqueeze(reader: Reader, node: fx.Node, index: Index) -> Any:
    dim = _dim(node, 1)
    return reader.at(node.args[0], index[:dim] + index[dim + 1:])  # type: ignore[arg-type]


def _view(reader: Reader, node: fx.Node, index: Index) -> Any:
    """A reshape that only adds or drops dims of size 1."""
    source = node.args[0]
    kept = [i for i, size in zip(index, node.meta["val"].shape, strict=True) if not same_size(size, 1)]
    sizes = [s for s in node.meta["val"].shape if not same_size(s, 1)]
    old = [s for s in source.meta["val"].shape if not same_size(s, 1)]  # type: ignore[union-attr]
    if len(sizes) != len(old) or not all(same_size(x, y) for x, y in zip(sizes, old, strict=True)):
        raise Unreadable(node)
    rest = iter(kept)
    return reader.at(source, tuple(sympy.Integer(0) if same_size(s, 1) else next(rest) for s in source.meta["val"].shape))  # type: ignore


def _permute(reader: Reader, node: fx.Node, index: Index) -> Any:
    source_index = list(index)
    for i, dim in enumerate(node.args[1]):  # type: ignore[arg-type]
        source_index[dim] = index[i]  # type: ignore[index]
    return reader.at(node.args[0], tuple(source_index))  # type: ignore[arg-type]


def _transpose(reader: Reader, node: fx.Node, index: Index) -> Any:
    swapped = list(index)
    x, y = (int(d) for d in node.args[1:3])  # type: ignore[arg-type]
    swapped[x], swapped[y] = swapped[y], swapped[x]
    return reader.at(node.args[0], tuple(swapped))  # type: ignore[arg-type]


def _slice(reader: Reader, node: fx.Node, index: Index) -> Any:
    _, dim, start, _, step = (*node.args, *(None,) * 5)[:5]
    dim, start = int(dim or 0) % len(index), start or 0  # type: ignore[arg-type]
    if isinstance(start, fx.Node) or start < 0:  # type: ignore[operator]
        raise Unreadable(node)
    moved = start + index[dim] * (step or 1)
    return reader.at(node.args[0], index[:dim] + (moved,) + index[dim + 1:])  # type: ignore[arg-type]


def _select(reader: Reader, node: fx.Node, index: Index) -> Any:
    source, dim, at = node.args[:3]
    if not isinstance(at, int) or at < 0:
        raise Unreadable(node)
    dim = int(dim) % (len(index) + 1)  # type: ignore[arg-type]
    return reader.at(source, index[:dim] + (sympy.Integer(at),) + index[dim:])  # type: ignore[arg-type]


def _elementwise(combine: Callable[..., Any], *, booleans: bool = False) -> Callable[..., Any]:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Any:
        operands = node.args[:2]
        if node.kwargs.get("alpha", 1) != 1 or node.args[2:] not in ((), (1,)):  # `.Scalar` forms take alpha by position
            raise Unreadable(node)
        convert = as_bool if booleans else as_int
        return combine(*(convert(reader.operand(a, index, node)) for a in operands))

    return rule


def _where(reader: Reader, node: fx.Node, index: Index) -> Any:
    condition, yes, no = (reader.operand(a, index, node) for a in node.args)
    if node.meta["val"].dtype == torch.bool:
        return sympy.ITE(as_bool(condition), as_bool(yes), as_bool(no))
    return sympy.Piecewise((as_int(yes), as_bool(condition)), (as_int(no), True))


def _masked_fill(reader: Reader, node: fx.Node, index: Index) -> Any:
    source, mask, value = (reader.operand(a, index, node) for a in node.args)
    if node.meta["val"].dtype == torch.bool:
        return sympy.ITE(as_bool(mask), as_bool(value), as_bool(source))
    return sympy.Piecewise((as_int(value), as_bool(mask)), (as_int(source), True))


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
    dim = _dim(node, 1)
    generic = sympy.Symbol("i", integer=True, nonnegative=True)
    probe = Reader()
    term = as_int(probe.at(node.args[0], index[:dim] + (generic,) + index[dim + 1:]))  # type: ignore[arg-type]
    if not term.is_Integer:
        raise Unreadable(node)
    return term * (index[dim] + 1)


def _index(reader: Reader, node: fx.Node, index: Index) -> Any:
    source, indices = node.args
    if any(i is None or i.meta["val"].dtype == torch.bool for i in indices):  # type: ignore[union-attr]
        raise Unreadable(node)
    moved = [as_int(reader.at(i, broadcast(index, i.meta["val"].shape))) for i in indices]  # type: ignore
    if not all(i.is_nonnegative for i in moved):  # a negative index counts from the end
        raise Unreadable(node)
    trailing = node.meta["val"].dim() - max(i.meta["val"].dim() for i in indices)  # type: ignore[union-attr]
    if trailing:
        raise Unreadable(node)
    return reader.at(source, tuple(moved))  # type: ignore[arg-type]


def _triangle(keep: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Any:
        diagonal = node.args[1] if len(node.args) > 1 else 0
        inside = keep(index[-1] - index[-2], _size(diagonal))
        value = reader.at(node.args[0], index)  # type: ignore[arg-type]
        return sympy.And(inside, value) if is_bool(value) else sympy.Piecewise((value, inside), (0, True))

    return rule


def _bool_op(op: Callable[..., Any]) -> Callable[..., Any]:
    return _elementwise(op, booleans=True)


def _either(x: Any, y: Any) -> Any:
    """Exclusive or, in the words `&`, `|`, `~`: SymPy writes its own Xor so that it cannot be parsed again."""
    return sympy.Or(sympy.And(x, sympy.Not(y)), sympy.And(sympy.Not(x), y))


def _compare(relation: Callable[..., Any]) -> Callable[..., Any]:
    """A comparison in whole numbers: SymPy turns `floor(q/3) >= 2` into `q/3 >= 2`, which would be computed in floats."""

    def rule(x: Any, y: Any) -> Any:
        compared = relation(x, y)
        if not isinstance(compared, sympy.core.relational.Relational):
            return compared
        numerator, denominator = (compared.lhs - compared.rhs).as_numer_denom()
        return compared if denominator == 1 else compared.func(numerator, 0)

    return rule


_RULES: dict[Any, Callable[..., Any]] = {
    aten.arange.default: _arange, aten.arange.start: _arange, aten.arange.start_step: _arange,
    aten.full.default: _fill(lambda n: n.args[1]), aten.full_like.default: _fill(lambda n: n.args[1]),
    aten.new_full.default: _fill(lambda n: n.args[2]), aten.scalar_tensor.default: _fill(lambda n: n.args[0]),
    **{op: _fill(lambda n: 1) for op in (aten.ones.default, aten.new_ones.default, aten.ones_like.default)},
    **{op: _fill(lambda n: 0) for op in (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)},
    **dict.fromkeys((aten.alias.default, aten.clone.default, aten._to_copy.default, aten.detach.default,
                     aten.contiguous.default, aten.to.dtype, aten.lift_fresh_copy.default), _same),
    aten.expand.default: _expand, aten.unsqueeze.default: _unsqueeze, aten.permute.default: _permute,
    **dict.fromkeys((aten.reshape.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims), _view),
    aten.transpose.int: _transpose, aten.slice.Tensor: _slice, aten.select.int: _select,
    **{getattr(getattr(aten, name), form): _elementwise(op) for form in ("Tensor", "Scalar") for name, op in {
        "add": sympy.Add, "mul": sympy.Mul, "sub": lambda x, y: x - y}.items()},
    **{getattr(getattr(aten, name), form): _elementwise(_compare(op)) for form in ("Tensor", "Scalar") for name, op in {
        "eq": sympy.Eq, "ne": sympy.Ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}.items()},
    aten.rsub.Scalar: _elementwise(lambda x, y: y - x),
    aten.neg.default: _elementwise(lambda x: -x), aten.abs.default: _elementwise(sympy.Abs),
    aten.minimum.default: _elementwise(sympy.Min), aten.maximum.default: _elementwise(sympy.Max),
    aten.floor_divide.default: _elementwise(lambda x, y: sympy.floor(x / y)),
    aten.remainder.Scalar: _elementwise(sympy.Mod), aten.remainder.Tensor: _elementwise(sympy.Mod),
    **{op: _bool_op(sympy.And) for op in (aten.logical_and.default,)},
    **{op: _bool_op(sympy.Or) for op in (aten.logical_or.default,)},
    **{op: _bool_op(sympy.Not) for op in (aten.logical_not.default,)},
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), _where),
    aten.masked_fill.Scalar: _masked_fill, aten.masked_fill.Tensor: _masked_fill,
    aten.diff.default: _diff, aten.cumsum.default: _cumsum, aten.index.Tensor: _index,
    aten.tril.default: _triangle(operator.le), aten.triu.default: _triangle(operator.ge),
}


def _bitwise(op: Callable[..., Any]) -> Callable[..., Any]:
    """`&`, `|`, `^`, `~` are logic on bool tensors; on integers they are not read."""

    def rule(reader: Reader, node: fx.Node, index: Index) -> Any:
        if node.meta["val"].dtype != torch.bool:
            raise Unreadable(node)
        return op(*(as_bool(reader.operand(a, index, node)) for a in node.args))

    return rule


_RULES.update({
    aten.bitwise_and.Tensor: _bitwise(sympy.And), aten.__and__.Tensor: _bitwise(sympy.And),
    aten.bitwise_or.Tensor: _bitwise(sympy.Or), aten.__or__.Tensor: _bitwise(sympy.Or),
    **{op: _bitwise(_either) for op in (aten.bitwise_xor.Tensor, aten.__xor__.Tensor)},
    aten.bitwise_not.default: _bitwise(sympy.Not),
})
