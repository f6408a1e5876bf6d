"""The bounds `k - q <= max_ahead` and `q - k <= max_behind` inside a mask's formula: what kernels take as flags."""

from typing import Any

import sympy

from autoseq.passes.formula.values import k, q


def split(formula: Any) -> tuple[int | None, int | None, Any]:
    """Both bounds of a conjunction, and what is left of it."""
    ahead: int | None = None
    behind: int | None = None
    rest = []
    for atom in conjuncts(formula):
        found = bound(atom)
        if found is None:
            rest.append(atom)
        elif found[0] == "ahead":
            ahead = tighter(ahead, found[1])
        else:
            behind = tighter(behind, found[1])
    return ahead, behind, sympy.And(*rest)


def conjuncts(formula: Any) -> list[Any]:
    """The parts of a conjunction, in an order that every process has alike."""
    return sorted(sympy.And.make_args(formula), key=str)


def tighter(a: Any, b: int | None) -> Any:
    """The stricter of two bounds; None bounds nothing."""
    return b if a is None else a if b is None else min(a, b)


def bound(atom: Any) -> tuple[str, int] | None:
    """(`ahead` | `behind`, c) if the atom says k - q <= c or q - k <= c, over integers."""
    if not isinstance(atom, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)) or atom.free_symbols != {q, k}:
        return None
    small, large = (atom.lhs, atom.rhs) if isinstance(atom, (sympy.Le, sympy.Lt)) else (atom.rhs, atom.lhs)
    difference = sympy.expand(small - large)
    strict = 1 if isinstance(atom, (sympy.Lt, sympy.Gt)) else 0
    for kind, sign in (("ahead", 1), ("behind", -1)):
        constant = sympy.expand(difference - sign * (k - q))
        if constant.is_Integer:
            return kind, -int(constant) - strict
    return None
