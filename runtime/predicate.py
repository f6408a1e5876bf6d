"""Evaluates a mask's predicate with torch, on one block of positions at a time.

A predicate is a SymPy boolean written as text, because text survives FX graphs, custom-op schemas and compile caches, e.g.
`Eq(c0(b, q), c0(b, k)) & Ne(c1(b, k), 0)`. Its symbols are the integers b (batch), h (head), q and k (global positions);
`c0(...)` is the tensor captures[0] at that index. Positions broadcast as [B, H, q, k], so a term that mentions only b and k
costs B x k elements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef, UndefinedFunction
from torch import Tensor

from autoseq.runtime.errors import UnsupportedError

_SYMBOLS = {name: sympy.Symbol(name, integer=True) for name in "bhqk"}


@dataclass(frozen=True, slots=True)
class Points:
    """The index of every element of a block: integer tensors of shapes [B,1,1,1], [1,H,1,1], [1,1,q,1] and [1,1,1,k]."""

    b: Tensor
    h: Tensor
    q: Tensor
    k: Tensor

    @classmethod
    def of(cls, batch: int, heads: range, q: Tensor, k: Tensor) -> Points:
        """From positions q and k of shape [n]; `heads` are the global head indices of the block."""
        b = torch.arange(batch, device=q.device)
        h = torch.arange(heads.start, heads.stop, device=q.device)
        return cls(b[:, None, None, None], h[:, None, None], q[:, None], k)


def evaluate(predicate: str, points: Points, captures: list[Tensor]) -> Tensor:
    """The predicate on a block: a boolean tensor that broadcasts to [B, H, q, k].

    Raises UnsupportedError for text that is no SymPy boolean over b, h, q, k and c<i>, or that uses an unknown function.
    """
    expression = parse(predicate)
    try:
        value = _walk(expression, points, captures)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error} In the mask predicate {predicate!r}.") from error
    return torch.as_tensor(value, dtype=torch.bool, device=points.q.device)


@functools.lru_cache(maxsize=256)
def parse(predicate: str) -> sympy.Basic:
    """The predicate as a SymPy boolean. Raises UnsupportedError when it is none."""
    names: dict[str, Any] = dict(_SYMBOLS)
    names["FloorDiv"] = lambda a, b: sympy.floor(sympy.sympify(a) / b)
    names["PythonMod"] = sympy.Mod
    for i in range(64):
        # Not `integer`: SymPy would fold a comparison of a float capture with 0.5 to false.
        names[f"c{i}"] = sympy.Function(f"c{i}", real=True)
    try:
        expression = sympy.sympify(sympy.parse_expr(predicate, local_dict=names))
    except Exception as error:
        raise UnsupportedError(f"The mask predicate {predicate!r} does not parse: {error}.") from error
    unknown = expression.free_symbols - set(_SYMBOLS.values())
    if not isinstance(expression, sympy.logic.boolalg.Boolean) or unknown:
        found = f"it mentions {sorted(map(str, unknown))}" if unknown else f"it is a {type(expression).__name__}"
        raise UnsupportedError(
            f"The mask predicate {predicate!r} must be a boolean over b, h, q, k and captures c0, c1, ...; {found}. "
            "Write a boolean capture as Ne(c0(b, k), 0)."
        )
    return expression


def _walk(node: Any, points: Points, captures: list[Tensor]) -> Any:
    """The value of one node: a tensor that broadcasts to the block, or a Python number."""
    if node in (sympy.true, sympy.false):
        return bool(node)
    if node.is_Symbol:
        return getattr(points, node.name)
    if node.is_Integer:
        return int(node)
    if node.is_Number or node.is_NumberSymbol:
        return float(node)
    if isinstance(node, AppliedUndef):
        return _capture(node, points, captures)
    values = [_walk(arg, points, captures) for arg in _arguments(node)]
    return _operation(node)(*values)


def _capture(node: AppliedUndef, points: Points, captures: list[Tensor]) -> Tensor:
    name = node.func.name
    index = int(name[1:]) if isinstance(node.func, UndefinedFunction) and name[1:].isdigit() else len(captures)
    if index >= len(captures):
        raise UnsupportedError(f"{name} names no captured tensor: there are {len(captures)}.")
    tensor = captures[index].detach()
    if len(node.args) != tensor.ndim:
        raise UnsupportedError(f"{node} has {len(node.args)} indices, but the captured tensor has shape {tuple(tensor.shape)}.")
    indices = [torch.as_tensor(_walk(arg, points, captures), device=tensor.device).long() for arg in node.args]
    value = tensor[tuple(indices)] if indices else tensor
    return value if value.is_floating_point() else value.to(torch.int64)  # arithmetic on small integers would wrap


def _arguments(node: Any) -> tuple[Any, ...]:
    # floor(q/3) and q/3 arrive as products with a Rational. One division of two integers rounds at most once, so Eq and
    # floor stay exact; a product with the float 1/3 would not.
    if isinstance(node, sympy.floor | sympy.ceiling):
        return node.args[0].as_numer_denom()
    if node.is_Mul and not all(arg.is_integer for arg in node.args):
        numerator, denominator = node.as_numer_denom()
        if denominator != 1:
            return numerator, denominator
    if isinstance(node, sympy.Piecewise):
        return tuple(part for pair in node.args for part in pair.args)
    return node.args


def _operation(node: Any) -> Callable[..., Any]:
    if node.is_Mul and _arguments(node) is not node.args:
        return _true_divide
    for kind, operation in _OPERATIONS.items():
        if isinstance(node, kind):
            return operation
    raise UnsupportedError(f"{type(node).__name__} cannot be evaluated.")


def _fold(binary: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda *values: functools.reduce(lambda a, b: binary(*_tensors(a, b)), values)


def _tensors(*values: Any) -> list[Tensor]:
    like = next((value.device for value in values if isinstance(value, Tensor)), None)
    return [value if isinstance(value, Tensor) else torch.as_tensor(value, device=like) for value in values]


def _true_divide(a: Any, b: Any) -> Tensor:
    a, b = _tensors(a, b)
    return torch.true_divide(a.double(), b.double())


def _floor_divide(a: Any, b: Any) -> Tensor:
    return torch.div(*_tensors(a, b), rounding_mode="floor")


def _ceil_divide(a: Any, b: Any) -> Tensor:
    a, b = _tensors(a, b)
    return -torch.div(-a, b, rounding_mode="floor")


def _where(condition: Any, a: Any, b: Any) -> Tensor:
    condition, a, b = _tensors(condition, a, b)
    return torch.where(condition.bool(), a, b)


def _piecewise(*parts: Any) -> Any:
    """Value and condition in turn; the first condition that holds wins. Without a match the mask forbids: false."""
    result: Any = False if isinstance(parts[0], bool) or _is_bool(parts[0]) else 0
    for value, condition in reversed(list(zip(parts[::2], parts[1::2], strict=True))):
        result = _where(condition, value, result)
    return result


def _is_bool(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    sympy.And: _fold(torch.logical_and),
    sympy.Or: _fold(torch.logical_or),
    sympy.Xor: _fold(torch.logical_xor),
    sympy.Not: lambda a: torch.logical_not(*_tensors(a)),
    sympy.ITE: _where,
    sympy.Piecewise: _piecewise,
    sympy.Eq: _fold(torch.eq),
    sympy.Ne: _fold(torch.ne),
    sympy.Lt: _fold(torch.lt),
    sympy.Le: _fold(torch.le),
    sympy.Gt: _fold(torch.gt),
    sympy.Ge: _fold(torch.ge),
    sympy.Add: _fold(torch.add),
    sympy.Mul: _fold(torch.mul),
    sympy.Pow: _fold(torch.pow),
    sympy.Mod: _fold(torch.remainder),
    sympy.Max: _fold(torch.maximum),
    sympy.Min: _fold(torch.minimum),
    sympy.Abs: lambda a: torch.abs(*_tensors(a)),
    sympy.floor: _floor_divide,
    sympy.ceiling: _ceil_divide,
}
