"""Sizes, symbolic ones included: what is provably equal, and a size as an argument of a node.

An int stays an int; a symbolic size becomes the nodes that compute it from the graph's inputs.
"""

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis


def same_shape(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    """Whether two shapes are provably equal (symbolic sizes included)."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are provably equal; adds no guard."""
    return statically_known_true(operator.eq(a, b))


def hint(size: int | torch.SymInt) -> int:
    """A symbolic size's value in this trace: for costs, reports and searches, never for a decision that has to be proven."""
    return size if isinstance(size, int) else int(size.node.hint)


def num_bytes(val: torch.Tensor) -> int:
    """The bytes of a (fake) tensor, at the sizes of this trace."""
    return hint(val.numel()) * val.element_size()


class Sizes:
    """Computes symbolic sizes once each, at the top of the graph (before `anchor`)."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node) -> None:
        self._graph, self._anchor = graph, anchor
        self._symbols: dict[sympy.Symbol, fx.Node] = {}
        self._made: dict[sympy.Expr, Any] = {}

    def bind(self, placeholder: fx.Node) -> None:
        """Learn which symbols an input gives: its own, if it is a size, or those of its dims."""
        val = placeholder.meta.get("val")
        if isinstance(val, torch.SymInt):
            if isinstance(val.node.expr, sympy.Symbol):
                self._symbols[val.node.expr] = placeholder
        elif isinstance(val, torch.Tensor):
            for dim, size in enumerate(val.shape):
                if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol) and size.node.expr not in self._symbols:
                    with self._graph.inserting_before(self._anchor):
                        node = self._graph.call_function(torch.ops.aten.sym_size.int, (placeholder, dim))
                    node.meta["val"] = size
                    self._symbols[size.node.expr] = node

    def argument(self, size: int | torch.SymInt) -> Any:
        """`size` as an argument of a node of this graph."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression.is_Integer:
            return int(expression)
        if expression not in self._made:
            proxies = {symbol: fx.Proxy(node) for symbol, node in self._symbols.items()}
            with self._graph.inserting_before(self._anchor):
                made = sympy_interp(PythonReferenceAnalysis, proxies, expression)
            node = made.node if isinstance(made, fx.Proxy) else made
            if isinstance(node, fx.Node):
                node.meta["val"] = size
            self._made[expression] = node
        return self._made[expression]
