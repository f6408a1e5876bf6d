"""What the planner and the compiler know of a strategy: whether it can serve an attention, what it sends, what to call.

Costs are SymPy formulas, so that a planner can compare and print them; `cost` evaluates them with the real, padded rows of a
rank, and tests hold the result to counted messages. Conventions of counting: `runtime/traffic.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import sympy
from torch import Tensor

from autoseq.runtime.holdings import Holdings
from autoseq.runtime.layout import Layout, local_length
from autoseq.runtime.mask import Mask
from autoseq.runtime.needs import Needs, NeedTerms, Rows, needs_of
from autoseq.runtime.score_facts import makes_infinity, needs_whole_rows
from autoseq.runtime.tiles import fills_empty_rows
from autoseq.runtime.traffic import Traffic

# B batch, s and t padded local query and key rows, H heads, K KV heads, D head dim, V value dim, P ranks,
# e bytes of an element, a bytes of an accumulator (4, or 8 for float64); on a 2-D mesh N nodes of R ranks, P = N R.
B, s, t, H, K, D, V, P, e, a = sympy.symbols("B s t H K D V P e a", positive=True, integer=True)
N, R = sympy.symbols("N R", positive=True, integer=True)


@dataclass(frozen=True, slots=True)
class Site:
    """One attention of the program, in global sizes, and the mesh it runs on: the sizes of its dims, across nodes first, if it has two."""

    batch: int
    q_len: int
    k_len: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    element_bytes: int
    max_ahead: int | None = None
    max_behind: int | None = None
    predicate: str = ""
    score: str = ""
    learned: tuple[int, ...] = ()  # captures that get a gradient
    has_sinks: bool = False
    dropout_p: float = 0.0
    empty_rows: str = "zero"
    mesh: tuple[int, ...] = ()

    @property
    def mask(self) -> Mask:
        """Which keys a query may see."""
        return Mask(self.max_ahead, self.max_behind, self.predicate)

    @property
    def fills_empty_rows(self) -> bool:
        """Whether a row without keys is worth something that depends on all of them."""
        return fills_empty_rows(self.empty_rows, has_sinks=self.has_sinks)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one rank sends for one attention. A collective is one message, and so is one point-to-point send."""

    forward_bytes: int
    backward_bytes: int
    forward_messages: int
    backward_messages: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, each) + getattr(other, each) for each in self.__dataclass_fields__))

    @property
    def step_bytes(self) -> int:
        """Forward and backward."""
        return self.forward_bytes + self.backward_bytes


NOTHING = Cost(0, 0, 0, 0)


def evaluated(formulas: dict[str, sympy.Expr], sizes: dict[sympy.Symbol, int]) -> Cost:
    """The formulas at some sizes. They have a value where every symbol has one; `subs`, which also simplifies, takes ten times as long."""
    values = {symbol: sympy.Integer(size) for symbol, size in sizes.items()}
    return Cost(**{name: int(formula.xreplace(values)) for name, formula in formulas.items()})


def accumulator_bytes(site: Site) -> int:
    """Bytes of an element of a gradient on its way."""
    return max(4, site.element_bytes)


def terms_of_site(site: Site, heads: range | None = None) -> NeedTerms:
    """What decides who needs what, for some of the heads; of what the predicate looks up, only the names are known."""
    these = range(site.heads) if heads is None else heads
    return NeedTerms(site.mask, None, site.batch, these, site.fills_empty_rows, site.score)


def rows_of_site(site: Site, P: int, layout: Layout, places: tuple[int, ...] = ()) -> Rows:
    """The rows of P participants; `places` are those of `Holdings`."""
    held = Holdings.of(P, layout, places)
    ranks = len(places) or P
    s, t = (local_length(n, ranks, layout) * ranks // P for n in (site.q_len, site.k_len))
    return Rows(held, held, s, t, site.q_len, site.k_len)


def needs_of_site(site: Site, P: int, layout: Layout, places: tuple[int, ...] = (), heads: range | None = None) -> Needs:
    """Which keys the participants need of each other, without what only the values of a tensor tell."""
    return needs_of(terms_of_site(site, heads), rows_of_site(site, P, layout, places), P)


def needs_two_dims(site: Site) -> str | None:
    """Why a strategy of two levels cannot serve, or None."""
    if len(site.mesh) == 2 and min(site.mesh) > 1:
        return None
    found = f"; here the mesh is {site.mesh[0]} x {site.mesh[1]}" if len(site.mesh) == 2 else ""
    return (
        f"it works on two levels and needs several nodes of several ranks{found}: give option mesh a DeviceMesh of two dimensions, "
        "or set ranks_per_node (--ranks-per-node) to a part of the ranks"
    )


class Strategy(ABC):
    """A way to compute attention over a sharded sequence. One instance each, in `runtime/strategies.py`.

    `balanced_by_zigzag` says that a rank's work follows the rows it holds, so that a causal mask wants them in zigzag order.
    """

    name: ClassVar[str]
    merges_partial_softmaxes: ClassVar[bool] = False
    balanced_by_zigzag: ClassVar[bool] = False
    attention: Callable[..., Tensor]

    @abstractmethod
    def formulas(self) -> dict[str, sympy.Expr]:
        """Cost's fields as formulas in this module's symbols, for P > 1 and a mask that leaves nothing out."""

    def cannot_serve(self, site: Site, group_size: int) -> str | None:
        """Why this strategy cannot compute the site exactly on `group_size` ranks, or None."""
        if self.merges_partial_softmaxes and needs_whole_rows(site.score, site.learned):
            return "a float mask may hide a whole row by its least finite value, and partial softmaxes of such a row do not add up"
        if site.empty_rows.startswith("uniform") and makes_infinity(site.score):
            return "a mask of the least finite number beside scores of -inf has rows of which neither decides alone"
        if site.heads % site.kv_heads != 0:
            return f"{site.heads} query heads are not a multiple of {site.kv_heads} key/value heads"
        return None

    def cannot_lay_out(self, layout: Layout) -> str | None:
        """Why this strategy cannot compute on rows in that layout, or None."""
        return None

    def cost(self, site: Site, group_size: int, layout: Layout, rank: int = 0) -> Cost:
        """What `rank` sends, to the byte. What only the values of a tensor rule out is not known here, and counted."""
        return NOTHING if group_size == 1 else self.sent(site, group_size, layout, rank)

    def sent(self, site: Site, group_size: int, layout: Layout, rank: int) -> Cost:
        """What `rank` of several sends; the same as without a mask, for a strategy to which it makes no difference."""
        return self.full_cost(site, group_size, layout, rank)

    def opaque(self, site: Site, group_size: int, layout: Layout) -> dict[str, Traffic]:
        """What rank 0 sends in one step from inside opaque operators, by the kind of message as the counting backend names them.

        What goes through functional collectives, which a dispatcher sees, is not among it.
        """
        cost = self.cost(site, group_size, layout)
        return {"send": Traffic(cost.forward_messages + cost.backward_messages, cost.step_bytes)}

    def full_cost(self, site: Site, group_size: int, layout: Layout, rank: int = 0) -> Cost:
        """What `rank` of several would send without a mask: the formulas at the padded sizes."""
        return evaluated(self.formulas(), self.sizes(site, group_size, layout, rank))

    def sizes(self, site: Site, group_size: int, layout: Layout, rank: int) -> dict[sympy.Symbol, int]:
        """The value of each symbol of the formulas."""
        return {
            B: site.batch,
            s: local_length(site.q_len, group_size, layout),
            t: local_length(site.k_len, group_size, layout),
            H: site.heads,
            K: site.kv_heads,
            D: site.head_dim,
            V: site.value_dim,
            P: group_size,
            e: site.element_bytes,
            a: accumulator_bytes(site),
            **dict(zip((N, R), site.mesh, strict=False)),
        }
