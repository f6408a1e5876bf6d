"""The value of a tensor of a graph at an index, as a formula.

`read_masks` asks for a mask's value at (b, h, q, k). `arange` is its index, `expand` and `slice` move indices, `diff` of
consecutive positions folds to 1, a gather by index becomes function application. A tensor whose making is not understood
becomes a *capture*: a function `c0(b, k)` that the runtime looks up. So reading always ends; it is only more or less deep.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from autoseq.passes.formula import floats, held, integers, movement
from autoseq.passes.formula.values import (
    FLOAT_NAMES,
    INTEGER_BITS,
    Index,
    Unreadable,
    as_bool,
    as_int,
    capture_number,
    captures_in,
    const,
    convert,
    fits,
    function,
    is_capture,
    k,
    q,
    s,
)
from autoseq.passes.sizes import same_size

_Rule = Callable[["Reader", fx.Node, Index], Any]


@dataclass(frozen=True, slots=True)
class Known:
    """A node whose value is given: at this index, this expression. At any other index it cannot be read."""

    node: fx.Node
    index: Index
    value: Any


class Reader:
    """Reads tensors of one graph; `captures` lists the nodes that the formulas look up, in the order of their names."""

    def __init__(
        self, known: Known | None = None, *, only_movement: bool = False, limits: Mapping[sympy.Symbol, int] | None = None
    ) -> None:
        self.captures: list[fx.Node] = []
        self.limits: dict[sympy.Symbol, int] = dict(limits or {})  # index symbols are below these
        self.known, self._only_movement = known, only_movement
        self._memo: dict[tuple[fx.Node, Index], Any] = {}

    def at(self, node: fx.Node, index: Index) -> Any:
        """The value of tensor `node` at `index`: an integer expression, a Boolean for a bool tensor, a float formula."""
        if (node, index) not in self._memo:
            self._note_limits(node, index)
            self._memo[node, index] = self._read(node, index)
        return self._memo[node, index]

    def _read(self, node: fx.Node, index: Index) -> Any:
        if self.known is not None and node is self.known.node:
            if index != self.known.index:
                raise NotAtItsIndex(node)
            return self.known.value
        dtype = node.meta["val"].dtype
        rule = movement.WITHIN_DIMS.get(node.target) if self._only_movement and dtype.is_floating_point else _rule(node)
        try:
            value = rule(self, node, index) if rule and _is_readable(node, rule) else self.capture(node, index)
        except NotAtItsIndex:
            raise
        except Unreadable:
            return self.capture(node, index)
        if dtype.is_floating_point:
            looked_up = self._is_better_captured(value, index) or self._loses_stop(node, value)
            return self.capture(node, index) if looked_up else value
        if self._is_made_of_a_square(value):
            return self.capture(node, index)
        if dtype == torch.bool:
            return as_bool(value)
        return as_int(value) if dtype not in INTEGER_BITS or fits(as_int(value), dtype, self.limits) else self.capture(node, index)

    def _is_made_of_a_square(self, value: Any) -> bool:
        """Numbers over queries and keys have to be held: then rather what is made of them, at best a truth value."""
        squares = (self.captures[capture_number(x)] for x in captures_in(sympy.sympify(value)) if q in x.args and k in x.args)
        return any(square.meta["val"].dtype != torch.bool for square in squares)

    def _is_better_captured(self, value: Any, index: Index) -> bool:
        """Floats made of data over queries or keys alone are a small tensor: computed once and looked up, unless they are a mask."""
        if not captures_in(value) or is_capture(value) or value.has(s) or {q, k} <= sympy.Tuple(*index).free_symbols:
            return False
        return not floats.may_mask(value) and floats.two_values(value) is None

    def _loses_stop(self, node: fx.Node, value: Any) -> bool:
        """Whether the formula would give a gradient to what the program gives none (read under no_grad)."""
        if floats.requires_grad(node):
            return False
        return any(floats.requires_grad(self.captures[capture_number(lookup)]) for lookup in captures_in(value))

    def capture(self, node: fx.Node, index: Index) -> Any:
        """A lookup of `node` at `index`; of a bool tensor, whether what is looked up is not 0."""
        if self.known is not None and node is self.known.node:
            raise NotAtItsIndex(node)
        dtype = node.meta["val"].dtype
        if node not in self.captures:
            self.captures.append(node)
        looked_up = function(f"c{self.captures.index(node)}", integer=not dtype.is_floating_point)(*index)
        return sympy.Ne(looked_up, 0) if dtype == torch.bool else looked_up

    def operand(self, value: Any, index: Index) -> Any:
        """An operand of a broadcasting operator: a scalar, or a tensor read at the aligned index."""
        if not isinstance(value, fx.Node):
            return scalar(value)
        if not isinstance(value.meta["val"], torch.Tensor):
            raise Unreadable(value)
        return self.at(value, broadcast(index, value.meta["val"].shape))

    def float_operand(self, value: Any, index: Index, dtype: torch.dtype) -> Any:
        """An operand of a float operator, in the type that the operator computes in; a Python number takes that of the others."""
        if not isinstance(value, fx.Node):
            return const(float(value))
        return convert(self.operand(value, index), value.meta["val"].dtype, dtype)

    def _note_limits(self, node: fx.Node, index: Index) -> None:
        for i, size in zip(index, node.meta["val"].shape, strict=True):
            if i.is_Symbol and isinstance(size, int):
                self.limits[i] = max(size, self.limits.get(i, 0))  # pyright: ignore[reportCallIssue]


class NotAtItsIndex(Unreadable):
    """The product of queries and keys is read elsewhere than at its own (b, h, q, k): no score formula."""


def broadcast(index: Index, shape: torch.Size) -> Index:
    """The index of an operand of this shape in a result that is read at `index`."""
    tail = index[len(index) - len(shape):]
    return tuple(sympy.Integer(0) if same_size(size, 1) else i for i, size in zip(tail, shape, strict=True))


def scalar(value: Any) -> Any:
    """A Python number beside an integer tensor. torch compares the two in float32 if it is a float: exact below 2**24."""
    if isinstance(value, float):
        if not value.is_integer() or abs(value) >= 2**24:
            raise Unreadable(value)
        value = int(value)
    return sympy.sympify(value)


def _is_readable(node: fx.Node, rule: _Rule) -> bool:
    """Arithmetic in narrow integers wraps around, so of those only what moves elements is read."""
    dtype = node.meta["val"].dtype
    computes = rule is not held.held and node.target not in movement.RULES
    return dtype == torch.bool or dtype in INTEGER_BITS or dtype in FLOAT_NAMES or (not computes and not dtype.is_complex)


def _rule(node: fx.Node) -> _Rule | None:
    if node.op == "get_attr" or held.CONTENT in node.meta:
        return held.held
    if node.op != "call_function" or node.target is operator.getitem:
        return None
    if node.target in movement.RULES:
        return movement.RULES[node.target]
    table = floats.RULES if floats.has_float(node) else integers.RULES
    return table.get(node.target)
