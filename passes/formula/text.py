"""Formulas as text, which is how a node of a graph holds them, and back."""

from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from autoseq.passes.formula.values import SYMBOLS, function
from autoseq.runtime.float_functions import FLOAT_FUNCTIONS

_FLOATS = {name: function(name) for name in (*FLOAT_FUNCTIONS, "const", "to_int")}


def parse(text: str, captures: Sequence[fx.Node]) -> Any:
    """The SymPy formula of a predicate or a score; `True` for none."""
    lookups = {f"c{i}": lookup_function(i, node) for i, node in enumerate(captures)}
    parsed = sympy.sympify(text or "True", locals={**_FLOATS, **SYMBOLS, **lookups})  # pyright: ignore[reportCallIssue]
    return sympy.sympify(parsed)  # a lone `True` comes out of a text as Python's


def lookup_function(number: int, node: fx.Node) -> Any:
    return function(f"c{number}", integer=not node.meta["val"].is_floating_point())
