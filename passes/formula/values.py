"""What formulas are made of: index symbols, whole numbers, truth values, and floats as opaque function calls.

Whole numbers and truth values are SymPy's own, which simplify. Floats must not: SymPy would reorder a sum, and the sum would round
otherwise. So float arithmetic is a call such as `f_add(x, y)` that the runtime makes by the torch operator of that meaning,
in the order written, and a float constant is `const(n, d)`, the exact ratio.
"""

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from autoseq.runtime.float_functions import constant
from autoseq.runtime.formula import capture_number as _number_of
from autoseq.runtime.formula import function_name as name_of

Index = tuple[sympy.Expr, ...]

b, h, q, k = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "bhqk")
s = sympy.Symbol("s", real=True)
SYMBOLS = {symbol.name: symbol for symbol in (b, h, q, k, s)}

INTEGER_BITS = {torch.int32: 31, torch.int64: 63}
"""SymPy's integers have no size, so a formula stands for a tensor only as long as the tensor's own integers do not wrap around."""

FLOAT_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_UNKNOWN = 2**31  # how large a symbolic length or a looked-up value is taken to be


class Unreadable(Exception):
    """A tensor that has no formula; the caller decides what to do with it whole."""


def function(name: str, *, integer: bool = False) -> Any:
    """An opaque function: a float operation, a constant, or a lookup."""
    return sympy.Function(name, **({"integer": True} if integer or name == "to_int" else {"real": True}))


def call(name: str, *args: Any) -> Any:
    """A float operation, left as it is."""
    return function(name)(*args)


def const(value: float) -> Any:
    """A Python float, exactly."""
    if math.isnan(value):
        return call("const", 0, 0)
    if math.isinf(value):
        return call("const", 1 if value > 0 else -1, 0)
    return call("const", *value.as_integer_ratio())


def const_value(x: Any) -> float | None:
    """The float that a `const` call stands for, None for anything else."""
    return constant(*map(int, x.args)) if name_of(x) == "const" else None


def is_capture(x: Any) -> bool:
    """Whether an expression is a lookup `c0(...)`."""
    return _number_of(x) is not None


def captures_in(x: Any) -> list[Any]:
    """The lookups of a formula, in an order that every process has alike."""
    return sorted((lookup for lookup in x.atoms(AppliedUndef) if is_capture(lookup)), key=str)


def capture_number(lookup: Any) -> int:
    return int(name_of(lookup)[1:])


def as_bool(x: Any) -> Any:
    return x if is_bool(x) else sympy.Ne(x, 0)


def as_int(x: Any) -> Any:
    return sympy.Piecewise((1, x), (0, True)) if is_bool(x) else x


def is_bool(x: Any) -> bool:
    """Whether an expression is a truth value; a plain Symbol could be either to SymPy, here it is an integer."""
    return isinstance(x, Boolean) and not isinstance(x, sympy.Symbol)


def convert(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """A value of dtype `old` as one of dtype `new`. What holds the score `s` stays in the wide type that the score is computed in."""
    if new == torch.bool:
        return sympy.Ne(call("f_ne", value, const(0.0)), 0) if old.is_floating_point else as_bool(value)
    if not new.is_floating_point:
        return call("to_int", value) if old.is_floating_point else as_int(value)
    if not old.is_floating_point:
        return call(f"to_{FLOAT_NAMES[new]}", as_int(value))
    return value if old == new or value.has(s) or name_of(value) == "const" else call(f"to_{FLOAT_NAMES[new]}", value)


def fits(value: Any, dtype: torch.dtype, limits: dict[sympy.Symbol, int]) -> bool:
    """Whether a computed integer is one that `dtype` holds without wrapping around."""
    return isinstance(value, AppliedUndef) or magnitude(value, limits) < 2 ** INTEGER_BITS[dtype]


def magnitude(x: Any, limits: dict[sympy.Symbol, int]) -> float | int:
    """No value of `x` is further from 0, when its symbols are below `limits`."""
    if x.is_Symbol or isinstance(x, AppliedUndef):
        return limits.get(x, _UNKNOWN)  # pyright: ignore[reportCallIssue]
    if x.is_Rational:
        return abs(x.p)
    if isinstance(x, sympy.Piecewise):
        return max(magnitude(value, limits) for value, _ in x.args)  # pyright: ignore[reportGeneralTypeIssues]
    if isinstance(x, sympy.Mod):
        return magnitude(x.args[1], limits)
    combine = {sympy.Add: sum, sympy.Mul: math.prod, sympy.Min: max, sympy.Max: max, sympy.Abs: sum, sympy.floor: lambda of: sum(of) + 1}
    return combine[x.func]([magnitude(arg, limits) for arg in x.args]) if x.func in combine else math.inf


def span(x: Any, limits: dict[sympy.Symbol, int]) -> tuple[float | int, float | int]:
    """The least and the greatest value of an integer expression, when its symbols are below `limits`; infinite where that is not known."""
    if x.is_Integer:
        return int(x), int(x)
    if x.is_Symbol:
        return 0 if x.is_nonnegative else -math.inf, limits.get(x, math.inf) - 1  # pyright: ignore[reportCallIssue]
    if x.is_Mul:
        factor, rest = x.as_coeff_Mul()
        low, high = sorted(int(factor) * end for end in span(rest, limits)) if factor.is_Integer and rest != x else _ANYTHING
        return low, high
    combine = {sympy.Add: sum, sympy.Min: min, sympy.Max: max}
    if x.func in combine:
        lows, highs = zip(*(span(arg, limits) for arg in x.args), strict=True)
        return combine[x.func](lows), combine[x.func](highs)
    return (0 if x.is_nonnegative else -math.inf), math.inf


_ANYTHING = (-math.inf, math.inf)


def divide(x: Any, n: int, limits: dict[sympy.Symbol, int]) -> tuple[Any, Any]:
    """Quotient and remainder of an index by `n`: `b*H + h` by `H` is (b, h) when h is known to be below H."""
    terms = sympy.Add.make_args(sympy.expand(x))
    multiples = [term for term in terms if (term / n).is_integer]
    rest = sympy.Add(*(term for term in terms if term not in multiples))
    below = sum(_highest(term, limits) for term in sympy.Add.make_args(rest))
    if rest.is_nonnegative and below < n:
        return sympy.Add(*multiples) / n, rest
    return sympy.floor(x / n), sympy.Mod(x, n)


def _highest(term: Any, limits: dict[sympy.Symbol, int]) -> float | int:
    factor, symbol = term.as_coeff_Mul()
    if symbol == 1:
        return int(factor)
    return int(factor) * (limits[symbol] - 1) if symbol in limits and factor > 0 else math.inf  # pyright: ignore[reportCallIssue]


def join_digits(digits: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The row-major index of digits of these sizes."""
    index: Any = sympy.Integer(0)
    for digit, size in zip(digits, sizes, strict=True):
        index = index * size + digit
    return sympy.expand(index)
