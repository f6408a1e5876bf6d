"""Evaluates the formulas of an attention with torch, on one block of positions at a time: what a mask allows, what is added to a score.

A formula is text in SymPy's notation, because text survives FX graphs, custom-op schemas and compile caches. Its symbols are the
integers b (batch), h (head), q and k (global positions); `c0(...)` is the tensor captures[0] at that index.

    predicate   a boolean, e.g. `Eq(c0(b, q), c0(b, k)) & Ne(c1(b, k), 0)`
    score       a float over the plain score `s` too, e.g. `f_add(s, f_mul(c0(h), to_float32(k - q)))`

Integers and booleans are SymPy's own. Float arithmetic never is, since SymPy would reorder it and round differently: it is written as
the functions of `FLOAT_FUNCTIONS` and `const(n, d)`, opaque to SymPy and executed in that order by the torch operators of that meaning.

Positions broadcast as [B, H, q, k], so a term that mentions only b and k costs B x k elements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import Tensor

from autoseq.runtime.errors import UnsupportedError
from autoseq.runtime.float_functions import FLOAT_FUNCTIONS, constant

SYMBOLS = {name: sympy.Symbol(name, integer=True) for name in "bhqk"}
SCORE = sympy.Symbol("s", real=True)
NUM_CAPTURES = 64


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
    value = _evaluated(parse(predicate), predicate, _Values(points, captures))
    return torch.as_tensor(value, dtype=torch.bool, device=points.q.device)


@dataclass(frozen=True, slots=True)
class Lookup:
    """What one lookup of a block read: the capture's number, the indices and the values there, which broadcast alike."""

    number: int
    indices: list[int | Tensor]
    values: Tensor


def evaluate_float(
    expression: sympy.Basic,
    points: Points,
    captures: list[Tensor],
    s: Tensor | None = None,
    *,
    learned: Collection[int] = (),
    lookups: list[Lookup] | None = None,
) -> Tensor:
    """A score, or a part of one, on a block: a tensor that broadcasts to [B, H, q, k]. `s` is the plain score [B, H, q, k].

    What is looked up in the `learned` captures becomes leaves that require grad, appended to `lookups`.
    """
    value = _evaluated(expression, str(expression), _Values(points, captures, s, learned, lookups))
    return torch.as_tensor(value, device=points.q.device)


@functools.lru_cache(maxsize=256)
def parse(predicate: str) -> sympy.Basic:
    """The predicate as a SymPy boolean. Raises UnsupportedError when it is none."""
    expression = _parsed(predicate, "mask predicate")
    unknown = expression.free_symbols - set(SYMBOLS.values())
    if not isinstance(expression, sympy.logic.boolalg.Boolean) or unknown:
        raise UnsupportedError(
            f"The mask predicate {predicate!r} must be a boolean over b, h, q, k and captures c0, c1, ...; {_found(expression, unknown)}. "
            "Write a boolean capture as Ne(c0(b, k), 0)."
        )
    return expression


@functools.lru_cache(maxsize=256)
def parse_score(score: str) -> sympy.Basic:
    """The score as a SymPy expression; "" is the plain score. Raises UnsupportedError when it is none."""
    expression = _parsed(score or "s", "score")
    unknown = expression.free_symbols - {*SYMBOLS.values(), SCORE}
    if not isinstance(expression, sympy.Expr) or unknown:
        raise UnsupportedError(
            f"The score {score!r} must be a number over s, b, h, q, k and captures c0, c1, ...; {_found(expression, unknown)}."
        )
    return expression


def capture_number(node: Any) -> int | None:
    """i if the node looks up capture c<i>, else None."""
    name = function_name(node)
    return int(name[1:]) if name[:1] == "c" and name[1:].isdigit() else None


def function_name(node: Any) -> str:
    """The name of a lookup or float function, else nothing."""
    return node.func.__name__ if isinstance(node, AppliedUndef) else ""


@functools.cache
def _names() -> dict[str, Any]:
    names: dict[str, Any] = dict(SYMBOLS) | {"s": SCORE}
    names["FloorDiv"] = lambda a, b: sympy.floor(sympy.sympify(a) / b)
    names["PythonMod"] = sympy.Mod
    # Not `integer`: SymPy would fold a comparison of a float capture with 0.5 to false.
    real = [*(f"c{i}" for i in range(NUM_CAPTURES)), "const", *FLOAT_FUNCTIONS]
    names |= {name: sympy.Function(name, real=True) for name in real}
    names["to_int"] = sympy.Function("to_int", integer=True)
    return names


def _parsed(text: str, what: str) -> sympy.Basic:
    try:
        return sympy.sympify(sympy.parse_expr(text, local_dict=_names()))
    except Exception as error:
        raise UnsupportedError(f"The {what} {text!r} does not parse: {error}.") from error


def _found(expression: sympy.Basic, unknown: set[sympy.Basic]) -> str:
    return f"it mentions {sorted(map(str, unknown))}" if unknown else f"it is a {type(expression).__name__}"


@dataclass(frozen=True, slots=True)
class _Values:
    points: Points
    captures: list[Tensor]
    s: Tensor | None = None
    learned: Collection[int] = ()
    lookups: list[Lookup] | None = None


def _evaluated(expression: sympy.Basic, text: str, values: _Values) -> Any:
    try:
        return _walk(expression, values)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error} In the formula {text!r}.") from error


def _walk(node: Any, values: _Values) -> Any:
    """The value of one node: a tensor that broadcasts to the block, or a Python number."""
    if node in (sympy.true, sympy.false):
        return bool(node)
    if node == SCORE:
        return values.s
    if node.is_Symbol:
        return getattr(values.points, node.name)
    if node.is_Integer:
        return int(node)
    if node.is_Number or node.is_NumberSymbol:
        return float(node)
    if isinstance(node, AppliedUndef):
        return _apply(node, values)
    return _operation(node)(*(_walk(arg, values) for arg in arguments(node)))


def _apply(node: AppliedUndef, values: _Values) -> Any:
    name = function_name(node)
    if name == "const":
        return constant(*map(int, node.args))
    if name in FLOAT_FUNCTIONS:
        return FLOAT_FUNCTIONS[name](*(_walk(arg, values) for arg in node.args))
    return _lookup(node, values)


def _lookup(node: AppliedUndef, values: _Values) -> Tensor:
    number = capture_number(node)
    if number is None:
        raise UnsupportedError(f"{function_name(node)} cannot be evaluated.")
    if number >= len(values.captures):
        raise UnsupportedError(f"{function_name(node)} names no captured tensor: there are {len(values.captures)}.")
    tensor = values.captures[number]
    if len(node.args) != tensor.ndim:
        raise UnsupportedError(f"{node} has {len(node.args)} indices, but the captured tensor has shape {tuple(tensor.shape)}.")
    indices = [_index(_walk(arg, values), tensor.device) for arg in node.args]
    # With at least one dim, an element takes part in type promotion as the tensor it stands in would.
    value = torch.atleast_1d(tensor[tuple(indices)]) if indices else tensor
    if number in values.learned and values.lookups is not None:
        value = value.detach().requires_grad_()
        values.lookups.append(Lookup(number, indices, value))
    return value if value.is_floating_point() else value.to(torch.int64)  # arithmetic on small integers would wrap


def _index(value: Any, device: torch.device) -> int | Tensor:
    # A tensor without dims would be read as a number, for which a GPU waits.
    return torch.atleast_1d(value.to(device, torch.int64)) if isinstance(value, Tensor) else int(value)


def arguments(node: Any) -> tuple[Any, ...]:
    """What an operation is evaluated on: a fraction's numerator and denominator, else the node's own arguments."""
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


def is_true_division(node: Any) -> bool:
    return node.is_Mul and arguments(node) is not node.args


def _operation(node: Any) -> Callable[..., Any]:
    if is_true_division(node):
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
