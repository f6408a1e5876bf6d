"""A rewritten program as nested blocks, one a module call: the records that the pages of `autoseq inspect` are drawn from.

Before and after are one tree: each line holds an operator of the program as it is written and what one rank computes for it. What
the compiler put between them is a row of its own. `html_tree` builds them, and `html_folding` folds repeated layers.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from autoseq.graph_text import short_source
from autoseq.node_traffic import NOTHING_SENT, Sent
from autoseq.passes.shard import Fallback
from autoseq.planner import SitePlan

RowKind = Literal["compute", "attention", "message"]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor: `f32[1, 4096, 256]`, its bytes."""

    text: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter that an operator reads."""

    name: str
    value: Value
    is_trained: bool


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product: two operations for each element of the result and each term of its sum. All else is small beside it."""

    result: tuple[int, ...]
    terms: int

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.result) * self.terms

    @property
    def text(self) -> str:
        """`2 · 16,384 · 688 · 256`."""
        return " · ".join(f"{size:,}" for size in (2, *(size for size in self.result if size != 1), self.terms))


@dataclass(frozen=True, slots=True)
class Line:
    """An operator: its value on one device and on one rank. Without the first the compiler put it there, without the second it left it out.

    `shape_of_call` is the call without the names of values, which differ from layer to layer.
    """

    op: str
    call: str
    shape_of_call: str
    source: str
    before: Value | None
    after: Value | None
    placement: str
    product_before: "Product | None"
    product_after: "Product | None"
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Operators of one module that stand together, or one attention, or one message."""

    kind: RowKind
    lines: tuple[Line, ...]
    sent: Sent = NOTHING_SENT
    site: SitePlan | None = None
    fallback: Fallback | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """One call of a module."""

    path: str
    label: str  # the path as its parent calls it
    kind: str  # the class
    items: tuple["Item", ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """Blocks that come several times in a row and differ in nothing but numbers in their names; the first ones stand for all.

    `paths` are those of all of them. A module that is called again and again has the same path each time.
    """

    times: int
    items: tuple["Item", ...]
    paths: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def period(self) -> int:
        """Blocks of one repetition."""
        return len(self.paths) // self.times

    @property
    def copies(self) -> int:
        """Repetitions with parameters of their own."""
        return len(set(self.paths)) // len(set(self.paths[: self.period]))


Item = Row | Block | Fold


@dataclass(frozen=True, slots=True)
class Gradients:
    """Values that every rank has, mostly parameters, whose gradients are summed over ranks together, and what that sends."""

    num_values: int
    are_parameters: bool
    num_bytes: int
    sent: Sent


@dataclass(frozen=True, slots=True)
class Picture:
    """A program to draw: its blocks, the exchange of its gradients behind them, and how often a step calls it."""

    items: tuple[Item, ...]
    gradients: tuple[Gradients, ...]
    times: int = 1


def rows_of(items: Iterable[Item]) -> Iterable[tuple[Row, int]]:
    """All rows, and how often each comes."""
    for item in items:
        if isinstance(item, Row):
            yield item, 1
        else:
            times = item.times if isinstance(item, Fold) else 1
            for row, count in rows_of(item.items):
                yield row, count * times


def shown_source(line: Line) -> str:
    """`modeling_llama.py:243`."""
    return short_source(line.source) if line.source else ""
