"""Reading operators on floats: opaque calls, in the order written, each made at run time by the same torch operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from autoseq.passes.formula.values import Index, Unreadable, call, const, const_value, convert, is_capture, name_of
from autoseq.runtime.formula import Points, evaluate_float

if TYPE_CHECKING:
    from autoseq.passes.formula.reader import Reader

aten = torch.ops.aten

MASKED = -1e30
"""A term this low, added to a score, rounds the score away: the key takes no probability beside any real score."""

_SUSPECT = 1e3


def has_float(node: fx.Node) -> bool:
    """Whether a node computes in floats: its result is one, or an operand."""
    vals = [node.meta["val"], *(n.meta.get("val") for n in node.all_input_nodes)]
    return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in vals)


def may_mask(value: Any) -> bool:
    """Whether a formula holds a constant so large that it may exclude keys."""
    constants = (const_value(x) for x in value.atoms(AppliedUndef))
    return any(c is not None and abs(c) >= _SUSPECT for c in constants)


def requires_grad(node: fx.Node) -> bool:
    """Whether autograd follows a node: as the trace saw it, or, for a node of our own making, as its operands tell."""
    if "requires_grad" in node.meta:
        return bool(node.meta["requires_grad"])
    traced = node.meta.get("tensor_meta")
    if traced is not None:
        return bool(traced.requires_grad)
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and (val.requires_grad or any(requires_grad(n) for n in node.all_input_nodes))


def _fill(value_of: Callable[[fx.Node], Any]) -> Callable[..., Any]:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Any:
        value = value_of(node)
        if not isinstance(value, (int, float)):
            raise Unreadable(node)
        return const(float(value))

    return rule


def _arange(reader: Reader, node: fx.Node, index: Index) -> Any:
    """Counting in whole numbers and then rounding is what torch does as long as start and step are whole."""
    numbers = (*node.args, None, None)[:3]
    start, step = (0 if numbers[1] is None else numbers[0]), (1 if numbers[2] is None else numbers[2])
    if not all(isinstance(x, (int, float)) and x == int(x) and abs(x) < 2**24 for x in (start, step)):
        raise Unreadable(node)
    return convert(int(start) + index[0] * int(step), torch.int64, node.meta["val"].dtype)  # type: ignore[call-overload]


def _fill_tensor(reader: Reader, node: fx.Node, index: Index) -> Any:
    return reader.float_operand(node.args[1], index, node.meta["val"].dtype)


def _cast(reader: Reader, node: fx.Node, index: Index) -> Any:
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    value = convert(reader.at(source, index), source.meta["val"].dtype, node.meta["val"].dtype)
    return fold(value) if node.meta["val"].dtype == torch.bool else value


def _elementwise(name: str, arity: int = 2) -> Callable[..., Any]:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Any:
        if len(node.args) > arity or node.kwargs.keys() - {"alpha"}:
            raise Unreadable(node)
        dtype = node.meta["val"].dtype
        operands = [reader.float_operand(a, index, dtype) for a in node.args]
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            operands[1] = call("f_mul", operands[1], const(float(alpha)))  # type: ignore[arg-type]
        return call(name, *operands)

    return rule


def _reversed(name: str) -> Callable[..., Any]:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Any:
        if len(node.args) > 2 or node.kwargs:
            raise Unreadable(node)
        x, y = (reader.float_operand(a, index, node.meta["val"].dtype) for a in node.args)
        return call(name, y, x)

    return rule


def _compare(name: str) -> Callable[..., Any]:
    def rule(reader: Reader, node: fx.Node, index: Index) -> Any:
        vals = [a.meta["val"] for a in node.args[:2] if isinstance(a, fx.Node)]
        dtype = vals[0].dtype if len(vals) == 1 else torch.result_type(*vals)
        x, y = (reader.float_operand(a, index, dtype) for a in node.args[:2])
        return fold(sympy.Ne(call(name, x, y), 0))

    return rule


def fold(truth: Any) -> Any:
    """A comparison whose only unknown is one condition, by that condition: `1 - float(m) != 0` is `~m`."""
    condition = _only_condition(truth)
    if condition is None:
        return truth
    yes, no = (_computed(substitute_condition(truth, condition, value)) for value in (True, False))
    return sympy.ITE(condition, sympy.sympify(bool(yes)), sympy.sympify(bool(no)))


def _only_condition(formula: Any) -> Any:
    """The condition of the formula's only choice, if nothing else in it is unknown."""
    conditions: set[Any] = {piece.args[0].args[1] for piece in formula.atoms(sympy.Piecewise)}
    conditions |= {x.args[0] for x in formula.atoms(AppliedUndef) if name_of(x) == "f_where"}
    if len(conditions) != 1:
        return None
    condition = conditions.pop()
    rests = [substitute_condition(formula, condition, value) for value in (True, False)]
    unknown = any(rest.free_symbols or any(is_capture(x) for x in rest.atoms(AppliedUndef)) for rest in rests)
    return None if unknown else condition


def substitute_condition(formula: Any, condition: Any, value: bool) -> Any:
    """The formula where its choices by `condition` are made."""
    def chosen(x: Any) -> Any:
        return x.args[1] if value else x.args[2]

    formula = formula.replace(lambda x: name_of(x) == "f_where" and x.args[0] == condition, chosen)
    return formula.replace(
        lambda x: isinstance(x, sympy.Piecewise) and x.args[0].args[1] == condition,
        lambda x: x.args[0 if value else 1].args[0],
    )


def two_values(formula: Any) -> tuple[Any, float, float] | None:
    """(condition, value where it holds, value elsewhere) of a float formula that has just these two values."""
    condition = _only_condition(formula)
    if condition is None:
        return None
    yes, no = (_computed(substitute_condition(formula, condition, value)) for value in (True, False))
    return condition, yes, no


def _computed(formula: Any) -> float:
    """The value of a formula without unknowns, as the runtime computes it."""
    nowhere = torch.zeros(1, dtype=torch.int64)
    formula = sympy.Piecewise((1, formula), (0, True)) if isinstance(formula, sympy.logic.boolalg.Boolean) else formula
    return float(evaluate_float(formula, Points.of(1, range(1), nowhere, nowhere), []))


def _clamp(reader: Reader, node: fx.Node, index: Index) -> Any:
    dtype = node.meta["val"].dtype
    value = reader.float_operand(node.args[0], index, dtype)
    low, high = (*node.args[1:], None, None)[:2]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    value = value if low is None else call("f_maximum", value, reader.float_operand(low, index, dtype))
    return value if high is None else call("f_minimum", value, reader.float_operand(high, index, dtype))


_UNARY = ("neg", "abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "tanh", "sigmoid", "sin", "cos", "relu", "floor")

RULES: dict[Any, Callable[..., Any]] = {
    aten.full.default: _fill(lambda n: n.args[1]), aten.full_like.default: _fill(lambda n: n.args[1]),
    aten.new_full.default: _fill(lambda n: n.args[2]), aten.scalar_tensor.default: _fill(lambda n: n.args[0]),
    aten.fill.Scalar: _fill(lambda n: n.args[1]), aten.fill.Tensor: _fill_tensor,
    **{op: _fill(lambda n: 1) for op in (aten.ones.default, aten.new_ones.default, aten.ones_like.default)},
    **{op: _fill(lambda n: 0) for op in (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)},
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
    **dict.fromkeys((aten._to_copy.default, aten.to.dtype), _cast),
    **{getattr(getattr(aten, name), form): _elementwise(f"f_{name}") for form in ("Tensor", "Scalar") for name in
       ("add", "mul", "sub", "div")},
    **{getattr(aten, name).default: _elementwise(f"f_{name}", 1) for name in _UNARY},
    aten.pow.Tensor_Scalar: _elementwise("f_pow"), aten.pow.Tensor_Tensor: _elementwise("f_pow"), aten.pow.Scalar: _elementwise("f_pow"),
    aten.reciprocal.default: lambda reader, node, index: call(
        "f_div", const(1.0), reader.float_operand(node.args[0], index, node.meta["val"].dtype)),
    aten.rsub.Scalar: _reversed("f_sub"), aten.square.default: lambda reader, node, index: call(
        "f_pow", reader.float_operand(node.args[0], index, node.meta["val"].dtype), const(2.0)),
    **dict.fromkeys((aten.minimum.default, aten.min.other), _elementwise("f_minimum")),
    **dict.fromkeys((aten.maximum.default, aten.max.other), _elementwise("f_maximum")),
    aten.clamp.default: _clamp, aten.clamp_min.default: _clamp,
    **{getattr(getattr(aten, name), form): _compare(f"f_{name}") for form in ("Tensor", "Scalar")
       for name in ("eq", "ne", "lt", "le", "gt", "ge")},
}  # fmt: skip
