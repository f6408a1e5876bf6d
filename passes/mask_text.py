"""A site's mask and score as people write them.

    (k <= q) & (k > q - 128) & Eq(doc(b, q), doc(b, k))
    (k <= q), score s + slopes(h)*(k - q)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
from sympy.printing.str import StrPrinter
from torch import fx

from autoseq.passes.formula.text import parse
from autoseq.passes.formula.values import capture_number, const_value, is_capture, name_of, q
from autoseq.passes.mask_bounds import bound, conjuncts

_INFIX = {"f_add": "+", "f_sub": "-", "f_mul": "*", "f_div": "/"}
_RELATIONS = {"f_lt": "<", "f_le": "<=", "f_gt": ">", "f_ge": ">=", "f_eq": "==", "f_ne": "!="}
_TIGHT = ("f_mul", "f_div")


class _Printer(StrPrinter):
    """Float operations in the usual signs, `50*tanh(s/50)`; lookups by the names of what they look up."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names

    def _print_Function(self, expr: Any) -> str:
        name, value = name_of(expr), const_value(expr)
        if not name:
            return super()._print_Function(expr)  # SymPy's own
        if value is not None:
            return f"{value:g}"
        if is_capture(expr):
            return f"{self._names[capture_number(expr)]}({self.stringify(expr.args, ', ')})"
        if name in _RELATIONS:
            return f" {_RELATIONS[name]} ".join(self._print(arg) for arg in expr.args)
        if name in _INFIX:
            return self._infix(expr, name)
        if name.startswith("to_") or name == "mask":
            return self._print(expr.args[0])
        return f"{name.removeprefix('f_')}({self.stringify(expr.args, ', ')})"

    def _print_Piecewise(self, expr: Any) -> str:
        (yes, condition), *rest = ((part.args[0], part.args[1]) for part in expr.args)
        no = rest[0][0] if len(rest) == 1 else sympy.Piecewise(*rest)
        return f"where({self._print(condition)}, {self._print(yes)}, {self._print(no)})"

    def _infix(self, expr: Any, name: str) -> str:
        left, right = (self._operand(arg, name, last) for arg, last in zip(expr.args, (False, True), strict=True))
        sign = _INFIX[name]
        return f"{left}{sign}{right}" if name in _TIGHT else f"{left} {sign} {right}"

    def _operand(self, x: Any, outer: str, last: bool) -> str:
        inner = x.args[0] if name_of(x).startswith("to_") else x
        is_sum = isinstance(inner, sympy.Add) or name_of(inner) in ("f_add", "f_sub")
        is_product = isinstance(inner, sympy.Mul) or name_of(inner) in _TIGHT
        wrap = (is_sum and (outer in _TIGHT or (last and outer == "f_sub"))) or (is_product and last and outer == "f_div")
        return f"({self._print(x)})" if wrap else self._print(x)

    def _print_Relational(self, expr: Any) -> str:
        found = bound(expr)
        if found is None:
            return super()._print_Relational(expr)
        return bounds_text(*((found[1], None) if found[0] == "ahead" else (None, found[1])))[0][1:-1]

    def _print_Unequality(self, expr: Any) -> str:
        return f"({self._print(expr.lhs)})" if name_of(expr.lhs) in _RELATIONS else f"Ne({self._print(expr.lhs)}, {self._print(expr.rhs)})"


def site_text(node: fx.Node) -> str:
    """The formulas of an attention node; `all` if nothing is masked."""
    captures: list[fx.Node] = node.args[3]  # type: ignore[assignment]
    parts = bounds_text(node.kwargs["max_ahead"], node.kwargs["max_behind"])
    if node.kwargs["predicate"]:
        parts.extend(_named(atom, captures) for atom in conjuncts(parse(str(node.kwargs["predicate"]), captures)))
    text = " & ".join(parts) or "all"
    text = text[1:-1] if len(parts) == 1 and text[0] == "(" and text.count("(") == 1 else text
    if node.kwargs["score"]:
        text += f", score {_text(parse(str(node.kwargs['score']), captures), _names(captures))}"
    return text + (f", sinks {capture_name(node.args[4])}" if isinstance(node.args[4], fx.Node) else "")


def bounds_text(ahead: Any, behind: Any) -> list[str]:
    parts = []
    if ahead is not None:
        parts.append(f"(k <= q{_shift(ahead)})")
    if behind is not None:
        parts.append(f"(k > q{_shift(-behind - 1)})")
    return parts


def _shift(by: Any) -> str:
    return "" if by == 0 else f" + {by}" if by > 0 else f" - {-by}"


def _named(atom: Any, captures: Sequence[fx.Node]) -> str:
    names = _names(captures)
    if isinstance(atom, sympy.Eq):
        sides = [side for side in atom.args if is_capture(side)]
        if len(sides) == 2 and sides[0].func == sides[1].func:  # the same lookup at q and at k: a document id
            number = capture_number(sides[0])
            names[number] = "doc" if captures[number].op != "placeholder" else names[number]
            first, second = sorted(atom.args, key=lambda side: q not in side.free_symbols)
            return f"Eq({_text(first, names)}, {_text(second, names)})"
    text = _text(atom, names)
    return text if isinstance(atom, (sympy.Eq, sympy.Ne)) else f"({text})"


def _names(captures: Sequence[fx.Node]) -> dict[int, str]:
    return {i: capture_name(node) for i, node in enumerate(captures)}


def _text(formula: Any, names: Mapping[int, str]) -> str:
    return _Printer(names).doprint(formula)


def capture_name(node: fx.Node) -> str:
    """An input by the user's name for it, a computed tensor by the node's."""
    return str(node.meta.get("source_name", node.name))
