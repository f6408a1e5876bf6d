"""What the planner and the compiler know of a strategy: whether it can serve an attention, what it sends, what to call.

`exchanges` say what a rank sends for the rows that a mask leaves, and `cost` is their sum; SymPy formulas say it without a mask, for
people to compare. Tests hold both to counted messages. Conventions of counting: `runtime/traffic.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import sympy
from torch import Tensor

from autoseq.runtime import blocks
from autoseq.runtime.blocks import Chunk
from autoseq.runtime.extrapolation import Case, Part, cases_of, weighted, weighted_crossings, weighted_work
from autoseq.runtime.formula import SYMBOLS, parse
from autoseq.runtime.holdings import Holdings
from autoseq.runtime.layout import Layout, local_length
from autoseq.runtime.mask import Mask
from autoseq.runtime.needs import Needs, NeedTerms, Rows, needs_of
from autoseq.runtime.score_facts import makes_infinity, needs_whole_rows
from autoseq.runtime.tiles import fills_empty_rows
from autoseq.runtime.timeline import ONE, WAYS, Crossing, Exchanges, Phase, Step, Way, Work, steps
from autoseq.runtime.traffic import Traffic
from autoseq.runtime.work_counts import Task, work_of_all

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


def evaluated(formulas: dict[str, sympy.Expr], sizes: dict[sympy.Symbol, int]) -> Cost:
    """The formulas of a cost at some sizes."""
    return Cost(**values_of(formulas, sizes))


def values_of(formulas: dict[str, sympy.Expr], sizes: dict[sympy.Symbol, int]) -> dict[str, int]:
    """They have a value where every symbol has one; `subs`, which also simplifies, takes ten times as long."""
    values = {symbol: sympy.Integer(size) for symbol, size in sizes.items()}
    return {name: int(formula.xreplace(values)) for name, formula in formulas.items()}


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
    these = range(site.heads) if heads is None else heads
    if these and site.predicate and SYMBOLS["h"] not in parse(site.predicate).free_symbols:
        these = range(1)  # the same for all heads
    return _needs_of_site(site, P, layout, places, these, blocks.TILE)


@lru_cache(maxsize=256)
def _needs_of_site(site: Site, P: int, layout: Layout, places: tuple[int, ...], heads: range, tile: int) -> Needs:
    """All ranks and both ways ask for the same. It is proven in tiles of that size."""
    return needs_of(terms_of_site(site, heads), rows_of_site(site, P, layout, places), P)


def saved_bytes(site: Site, s: int, t: int) -> int:
    """q, out and lse of s rows, and k and v of t rows, of all heads of a site."""
    queries = site.heads * s * ((site.head_dim + site.value_dim) * site.element_bytes + accumulator_bytes(site))
    return site.batch * (queries + site.kv_heads * t * (site.head_dim + site.value_dim) * site.element_bytes)


def saved_formula(heads: sympy.Expr, kv_heads: sympy.Expr, queries: sympy.Expr, keys: sympy.Expr) -> sympy.Expr:
    """The same in symbols, of so many heads and rows."""
    return B * (heads * queries * ((D + V) * e + a) + kv_heads * keys * (D + V) * e)


def task_of(
    rows: Rows, participant: int, keys: Iterable[Sequence[Chunk]], heads: range, kv_heads: int, came_home: int = 0
) -> Task:
    """A participant's own queries, and what comes of the keys."""
    spans = rows.q_holdings.spans(participant, rows.s, rows.q_len)
    padded = sum(valid < all_of_it for *_, valid, all_of_it in spans)
    grid = tuple(chunk for holder in range(len(rows.k_holdings.chunks)) for chunk in rows.keys(holder))
    return Task(tuple(rows.queries(participant)), tuple(map(tuple, keys)), heads, kv_heads, grid, padded, came_home)


MESH_ADVICE = "give option mesh a DeviceMesh of two dimensions, or set ranks_per_node (--ranks-per-node) to a part of the ranks"
"""How to plan for two levels."""


def needs_two_dims(site: Site) -> str | None:
    """Why a strategy of two levels cannot serve, or None."""
    if len(site.mesh) == 2 and min(site.mesh) > 1:
        return None
    found = f"; here the mesh is {site.mesh[0]} x {site.mesh[1]}" if len(site.mesh) == 2 else ""
    return f"it works on two levels and needs several nodes of several ranks{found}: {MESH_ADVICE}"


def cost_in(ways: Sequence[Way], exchanges: Callable[[Way], Exchanges]) -> Cost:
    """All exchanges of these ways together, and none of another."""
    return cost_of(*(exchanges(way) if way in ways else {} for way in WAYS))


def cost_of(forward: Exchanges, backward: Exchanges) -> Cost:
    """All exchanges of both ways together."""
    ways = [list(of_way.values()) for of_way in (forward, backward)]
    return Cost(*(sum(each.bytes for each in of_way) for of_way in ways), *(sum(each.messages for each in of_way) for of_way in ways))


@lru_cache(maxsize=64)
def _phases_of(strategy: Strategy, way: Way) -> tuple[tuple[Phase, ...], frozenset[sympy.Basic]]:
    """With the symbols that are in them."""
    phases = strategy.phases(way)
    formulas = [formula for phase in phases for formula in (phase.work, phase.times, *(share for _, share in phase.sends))]
    return phases, frozenset[sympy.Basic]().union(*(formula.free_symbols for formula in formulas))


@lru_cache(maxsize=1024)
def _steps_of(strategy: Strategy, way: Way, sizes: frozenset[tuple[sympy.Symbol, int]]) -> tuple[Step, ...]:
    """A plan asks for few different ones, and evaluating formulas takes long."""
    return steps(_phases_of(strategy, way)[0], dict(sizes))


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

    def work_formulas(self) -> dict[str, sympy.Expr]:
        """The pairs of a pass, and the bytes kept for the backward, as `formulas`: of own rows and all keys, if nothing better is known."""
        return {"pairs": B * H * s * P * t, "kept_bytes": saved_formula(H, K, s, t)}

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
        return cost_of(*(self.exchanges(site, group_size, layout, rank, way) for way in WAYS))

    def opaque(self, site: Site, group_size: int, layout: Layout, ways: Sequence[Way] = WAYS) -> dict[str, Traffic]:
        """What rank 0 sends in these passes from inside opaque operators, by the kind of message as the counting backend names them.

        What goes through functional collectives, which a dispatcher sees, is not among it.
        """
        cost = cost_in(ways, lambda way: self.exchanges(site, group_size, layout, 0, way))
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

    def exchanges(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Exchanges:
        """What `rank` sends in one pass, by the names that `phases` uses. Nothing on one rank."""
        return weighted(self.parts(site, group_size, layout, rank, way)) if group_size > 1 else {}

    def crossings(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way, ranks_per_node: int) -> dict[str, Crossing]:
        """What of the exchanges of `rank` crosses between nodes of so many ranks, of which the group has several whole ones."""
        return weighted_crossings(self.parts(site, group_size, layout, rank, way, ranks_per_node), ranks_per_node)

    def parts(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way, together: int = 1) -> list[Part]:
        """The exchanges in one case, or in several that stand for it, in which so many ranks stay `together`."""
        cases = self.cases(site, group_size, layout, rank, together)
        return [Part(case.weight, case.rank, self.exchanged(*case.asked, way)) for case in cases]

    def cases(self, site: Site, group_size: int, layout: Layout, rank: int, together: int = 1) -> tuple[Case, ...]:
        """What is asked, or the smaller cases that tell it: for who needs what of whom, many ranks take too long."""
        return cases_of(Case(site, group_size, layout, rank), together)

    def exchanged(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Exchanges:
        """The exchanges of one case, of several ranks. Who serves several says so here, or overrides `parts`."""
        raise NotImplementedError(f"{self.name} does not say what it sends")

    def phases(self, way: Way) -> tuple[Phase, ...]:
        """Which messages travel under which work, in the symbols of `sizes`, for P > 1. Who serves several ranks says so here."""
        raise NotImplementedError(f"{self.name} does not say what goes on side by side")

    def steps(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> tuple[Step, ...]:
        """The phases in numbers; on one rank there is only work."""
        if group_size == 1:
            return steps([Phase(ONE)], {})
        symbols = _phases_of(self, way)[1]
        sizes = self.sizes(site, group_size, layout, rank).items()
        return _steps_of(self, way, frozenset((symbol, size) for symbol, size in sizes if symbol in symbols))

    def work(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Work:
        """What `rank` computes in one pass. Rows that the mask leaves without keys may cost more, and padding is not among the pairs."""
        if group_size == 1:
            return work_of_all(site, Strategy.tasks(self, site, 1, layout, 0, way), way)
        cases = self.cases(site, group_size, layout, rank)
        found = weighted_work([(case.weight, work_of_all(case.site, self.tasks(*case.asked, way), way)) for case in cases])
        return found + Work(0, 0, 0, packed_bytes=self.packed_bytes(site, group_size, layout, rank, way))

    def packed_bytes(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> int:
        """Of `Work`, besides those of tasks: of heads that are traded."""
        return 0

    def tasks(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Iterable[Task]:
        """Which queries meet which keys on `rank`: its own and those of everybody, if a strategy does not know better."""
        rows = rows_of_site(site, group_size, layout)
        return [task_of(rows, rank, map(rows.keys, range(group_size)), range(site.heads), site.kv_heads)]

    def kept_bytes(self, site: Site, group_size: int, layout: Layout, rank: int) -> int:
        """What the attention saves for its backward: q, k, v, out and lse of this rank's rows, if a strategy does not know better."""
        s, t = (local_length(n, group_size, layout) for n in (site.q_len, site.k_len))
        return saved_bytes(site, s, t)

    def buffer_bytes(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> int:
        """The most that buffers of messages hold at once, beside inputs and results: all that is sent, if nothing better is known."""
        return sum(exchange.bytes for exchange in self.exchanges(site, group_size, layout, rank, way).values())
