"""Hybrid: heads are traded along one dim of the mesh and rows along the other (Fang and Zhao, "USP", arXiv:2405.07719).

    mesh of nodes x ranks      heads inside a node       each rank: all rows of its node, a share of the heads
                               rows across nodes         a ring, or a gather, among the ranks that have the same heads

An all-to-all among few ranks needs few heads, and sends little over the links it uses; the ring's keys are those of a share of the
heads. `_outer` is the other order of placement: heads across nodes, rows inside.

The exchange is that of `ulysses`, uneven and grouped heads included; a rank without heads is in a ring with others that have none. The
rest is the op of `ring` or `gather_kv`, whose participants hold the shards of several ranks (`Holdings`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from math import lcm
from typing import Any, ClassVar

import sympy
from torch import Tensor

from autoseq.runtime import gather_kv, ring, strategy
from autoseq.runtime.attention_call import Terms, attention_function
from autoseq.runtime.extrapolation import Case, Part, cases_of, weighted_work
from autoseq.runtime.gather_kv import GatherKV
from autoseq.runtime.groups import group_of
from autoseq.runtime.head_costs import HEADS, OWN_HEADS, OWN_KV_HEADS, ROWS, SENT_KV_HEADS, head_buffers, head_exchanges, packed_bytes
from autoseq.runtime.head_exchange import Exchange
from autoseq.runtime.lanes import lanes_exchanges, lanes_task, ring_buffers
from autoseq.runtime.layout import Layout, local_length
from autoseq.runtime.local import whole_attention
from autoseq.runtime.ring import Ring
from autoseq.runtime.stages import STAGES, num_heads
from autoseq.runtime.strategy import Cost, Site, Strategy, cost_in, needs_two_dims, saved_bytes
from autoseq.runtime.timeline import WAYS, Exchanges, Phase, Scope, Way, Work, alone, substituted
from autoseq.runtime.traffic import Traffic
from autoseq.runtime.ulysses import Ulysses, head_shares, num_heads_of_ranks
from autoseq.runtime.work_counts import Task, work_of_all

ACROSS, INSIDE = 0, 1
"""The dims of a mesh."""


@dataclass(frozen=True, slots=True)
class RowTrade:
    """What trades rows: how, the strategy whose formulas it has, what a rank sends, and by which kind of message.

    `attend` takes q, k, v, the terms, groups, places and the first head.
    """

    attend: Callable[..., Tensor]
    strategy: Strategy
    kinds: Callable[[Site, Cost], dict[str, Traffic]]
    exchanges: Callable[[Share, Way, Scope], Exchanges]
    tasks: Callable[[Share, Way], list[Task]]
    buffers: Callable[[Share, Way, Exchanges], int]
    kept: Callable[[Share], int]


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank trades rows for: a site of its share of the heads, among so many participants, of which it has that number."""

    site: Site
    participants: int
    layout: Layout
    number: int
    places: tuple[int, ...]
    heads: range  # global
    heads_per_kv: int
    ranks: range  # of the participants

    @property
    def rows(self) -> tuple[int, int]:
        """Padded local rows of queries and of keys."""
        ranks = len(self.places)
        s, t = (local_length(n, ranks, self.layout) * ranks // self.participants for n in (self.site.q_len, self.site.k_len))
        return s, t


def places(mesh: tuple[int, int], heads_along: int) -> tuple[int, ...]:
    """The ranks whose shards each participant holds that trades rows, participant by participant."""
    nodes, ranks = mesh
    if heads_along == INSIDE:
        return tuple(range(nodes * ranks))
    return tuple(node * ranks + place for place in range(ranks) for node in range(nodes))


def _compute(trade: RowTrade, heads_along: int, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """Sends what `ulysses` does along one dim, and along the other what the op does for all rows there and its share of the heads."""
    axes = terms.two_axes
    if axes is None:
        return terms.call_on_all_rows(whole_attention, q, k, v)
    across, inside = (group_of(name) for name in axes)
    along = (across, inside)[heads_along]
    heads, kv_heads = head_shares(along.size, q.shape[1], k.shape[1])
    here = Exchange([heads, kv_heads, kv_heads], terms.layout, along).to_rows(q, k, v)
    held = places((across.size, inside.size), heads_along)
    out = trade.attend(*here, terms, groups=[axes[1 - heads_along]], places=held, first_head=heads[along.rank][0])
    return Exchange([heads], terms.layout, along).to_heads(out)[0]


class _Hybrid(Strategy):
    """Heads along one dim of the mesh, rows along the other."""

    trade: ClassVar[RowTrade]
    heads_along: ClassVar[int]
    merges_partial_softmaxes = True
    balanced_by_zigzag = True

    def cannot_serve(self, site: Site, group_size: int) -> str | None:
        return needs_two_dims(site) or super().cannot_serve(site, group_size)

    def formulas(self) -> dict[str, sympy.Expr]:
        """Those of `ulysses` along one dim, and of what trades rows along the other; h, g and n as there."""
        along = (strategy.N, strategy.R)[self.heads_along]
        others = (strategy.R, strategy.N)[self.heads_along]
        ours = {strategy.P: others, strategy.t: strategy.t * along, strategy.K: OWN_KV_HEADS}
        traded = {name: formula.xreplace(ours) for name, formula in self.trade.strategy.formulas().items()}
        # Who has no heads sends nothing.
        traded |= {name: traded[name] * sympy.Min(1, OWN_KV_HEADS) for name in ("forward_messages", "backward_messages")}
        return {name: formula + traded[name] for name, formula in _exchange_formulas(along).items()}

    def work_formulas(self) -> dict[str, sympy.Expr]:
        """Those of what trades rows, for a share of the heads and the rows of all ranks that this one trades heads with."""
        along = (strategy.N, strategy.R)[self.heads_along]
        whole = {strategy.s: strategy.s * along, strategy.t: strategy.t * along, strategy.P: (strategy.R, strategy.N)[self.heads_along]}
        ours = whole | {strategy.H: OWN_HEADS, strategy.K: OWN_KV_HEADS}
        found: dict[str, Any] = {name: formula.xreplace(ours) for name, formula in self.trade.strategy.work_formulas().items()}
        return found

    def opaque(self, site: Site, group_size: int, layout: Layout, ways: Sequence[Way] = WAYS) -> dict[str, Traffic]:
        """Of the rows; heads go through functional collectives."""
        share = self._share(site, layout, 0)
        return self.trade.kinds(site, cost_in(ways, lambda way: self.trade.exchanges(share, way, "flat")))

    def sizes(self, site: Site, group_size: int, layout: Layout, rank: int) -> dict[sympy.Symbol, int]:
        return super().sizes(site, group_size, layout, rank) | self._head_sizes(site, rank) | {
            # A gather of all keys is one message a stage; there are none in a ring's formulas.
            STAGES: max(1, self._stages(site, group_size, layout, rank)),
        }

    def _stages(self, site: Site, group_size: int, layout: Layout, rank: int) -> int:
        unmasked = replace(site, max_ahead=None, max_behind=None, predicate="")
        _, share = self._shares(unmasked, group_size, layout, rank)[-1]
        return sum(each.messages for each in self.trade.exchanges(share, "forward", "flat").values())

    def _sizes_along(self, site: Site, group_size: int, layout: Layout, rank: int) -> dict[sympy.Symbol, int]:
        """As if the ranks that trade heads were all."""
        sizes = Strategy.sizes(self, site, group_size, layout, rank) | self._head_sizes(site, rank)
        return sizes | {strategy.P: sizes[(strategy.N, strategy.R)[self.heads_along]]}

    def _head_sizes(self, site: Site, rank: int) -> dict[sympy.Symbol, int]:
        heads, kv_heads = head_shares(site.mesh[self.heads_along], site.heads, site.kv_heads)
        number = divmod(rank, site.mesh[INSIDE])[self.heads_along]
        return {
            OWN_HEADS: num_heads(heads[number]),
            OWN_KV_HEADS: num_heads(kv_heads[number]),
            SENT_KV_HEADS: sum(map(num_heads, kv_heads)) - num_heads(kv_heads[number]),
        }

    def _share(self, site: Site, layout: Layout, rank: int, smaller: Site | None = None, place: int | None = None) -> Share:
        """Of the heads as `rank` has them on the site's mesh, and of the rows as `place` of a smaller site has them, if that is given."""
        number = divmod(rank, site.mesh[INSIDE])[self.heads_along]
        heads, kv_heads = (each[number] for each in head_shares(site.mesh[self.heads_along], site.heads, site.kv_heads))
        part = replace(smaller or site, heads=num_heads(heads), kv_heads=num_heads(kv_heads))
        at, (nodes, ranks) = divmod(rank if place is None else place, part.mesh[INSIDE]), part.mesh
        others, held = 1 - self.heads_along, places((nodes, ranks), self.heads_along)
        of_others = _along(at, part.mesh, others)
        return Share(part, part.mesh[others], layout, at[others], held, range(*heads), site.heads // site.kv_heads, of_others)

    def _shares(self, site: Site, group_size: int, layout: Layout, rank: int, together: int = 1) -> list[tuple[Case, Share]]:
        """What is asked, or what stands for it among fewer nodes: with the same heads, of which many nodes would have other shares."""
        cases = self.cases(site, group_size, layout, rank, together)
        return [(case, self._share(site, layout, rank, case.site, case.rank)) for case in cases]

    def cases(self, site: Site, group_size: int, layout: Layout, rank: int, together: int = 1) -> tuple[Case, ...]:
        """Rows that are traded inside a node are those of all nodes."""
        asked = Case(site, group_size, layout, rank)
        return cases_of(asked, lcm(site.mesh[INSIDE], together), quadratic=self.heads_along == ACROSS)

    def parts(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way, together: int = 1) -> list[Part]:
        """Heads go by `rows` and `heads`, of which all is known, and rows by the names that what trades them has."""
        scopes: tuple[Scope, Scope] = ("across", "inside")
        at, mesh = divmod(rank, site.mesh[INSIDE]), site.mesh
        sizes = Strategy.sizes(self, site, group_size, layout, rank) | {STAGES: 1}
        shares = num_heads_of_ranks(mesh[self.heads_along], site.heads, site.kv_heads)
        ranks = _along(at, mesh, self.heads_along)
        heads = head_exchanges(way, sizes, shares, at[self.heads_along], ranks, scopes[self.heads_along])
        traded = [
            Part(case.weight, case.rank, self.trade.exchanges(share, way, scopes[1 - self.heads_along]))
            for case, share in self._shares(site, group_size, layout, rank, together)
        ]
        return [Part(Fraction(1), rank, heads), *traded]

    def phases(self, way: Way) -> tuple[Phase, ...]:
        """The heads are exchanged before and after, with nothing to compute beside; the rows as what trades them does."""
        others = (strategy.R, strategy.N)[self.heads_along]
        traded = substituted(self.trade.strategy.phases(way), {strategy.P: others})
        return (*alone(ROWS), *traded, *alone(HEADS))

    def work(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Work:
        if group_size == 1:
            return super().work(site, group_size, layout, rank, way)
        found = [
            (case.weight, work_of_all(replace(share.site, heads=site.heads, kv_heads=site.kv_heads), self.trade.tasks(share, way), way))
            for case, share in self._shares(site, group_size, layout, rank)
        ]
        heads = self.packed_bytes(site, group_size, layout, rank, way)
        return weighted_work(found) + Work(0, 0, 0, packed_bytes=heads)

    def packed_bytes(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> int:
        return packed_bytes(way, self._sizes_along(site, group_size, layout, rank))

    def kept_bytes(self, site: Site, group_size: int, layout: Layout, rank: int) -> int:
        if group_size == 1:
            return super().kept_bytes(site, group_size, layout, rank)
        return self.trade.kept(self._share(site, layout, rank))

    def buffer_bytes(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> int:
        if group_size == 1:
            return 0
        heads = head_buffers(way, self._sizes_along(site, group_size, layout, rank))
        sent = self.exchanges(site, group_size, layout, rank, way)
        return max(*map(sum, heads), self.trade.buffers(self._share(site, layout, rank), way, sent))


def _along(at: tuple[int, int], mesh: tuple[int, ...], dim: int) -> range:
    """The ranks along a dim of the mesh that one at this place of it is among."""
    ranks = mesh[INSIDE]
    return range(at[INSIDE], mesh[ACROSS] * ranks, ranks) if dim == ACROSS else range(at[ACROSS] * ranks, (at[ACROSS] + 1) * ranks)


def _exchange_formulas(along: sympy.Symbol) -> dict[str, sympy.Expr]:
    """Those of `ulysses` in one stage, among the ranks along one dim."""
    here = {strategy.P: along, STAGES: sympy.Integer(1)}
    exchanged: dict[str, Any] = {name: formula.xreplace(here) for name, formula in Ulysses().formulas().items()}
    return exchanged


def _attend_by_ring(q: Tensor, k: Tensor, v: Tensor, terms: Terms, **where: Any) -> Tensor:
    return terms.call(ring.ring_attention, q, k, v, **where)


def _sends(_: Site, cost: Cost) -> dict[str, Traffic]:
    return {"send": Traffic(cost.forward_messages + cost.backward_messages, cost.step_bytes)}


def _ring_exchanges(share: Share, way: Way, scope: Scope) -> Exchanges:
    asked = (share.site, share.participants, share.layout, share.number)
    return lanes_exchanges(ring.one_lane, *asked, way, share.places, share.heads, scope, share.ranks)


def _ring_tasks(share: Share, way: Way) -> list[Task]:
    asked = (share.site, share.participants, share.layout, share.number)
    return [lanes_task(ring.one_lane, *asked, way, share.places, share.heads)]


def _ring_keys(share: Share) -> tuple[int, int]:
    elements = share.site.batch * share.site.kv_heads * share.rows[1] * (share.site.head_dim + share.site.value_dim)
    return elements * share.site.element_bytes, elements * strategy.accumulator_bytes(share.site)


def _ring_buffers(share: Share, way: Way, _: Exchanges) -> int:
    return ring_buffers(*_ring_keys(share), share.participants, way)


def _ring_kept(share: Share) -> int:
    return saved_bytes(share.site, *share.rows) + _ring_keys(share)[0]


def _gather_exchanges(share: Share, way: Way, scope: Scope) -> Exchanges:
    asked = (share.site, share.participants, share.layout, share.number)
    return gather_kv.gather_exchanges(*asked, way, share.places, share.heads.start, share.heads_per_kv, scope, share.ranks)


def _gather_tasks(share: Share, way: Way) -> list[Task]:
    asked = (share.site, share.participants, share.layout, share.number)
    return gather_kv.gather_tasks(*asked, way, share.places, share.heads.start, share.heads_per_kv)


def _gather_buffers(share: Share, _: Way, sent: Exchanges) -> int:
    asked = (share.site, share.participants, share.layout, share.places, share.heads.start, share.heads_per_kv)
    return gather_kv.gather_buffers(share.site, share.participants, share.rows[1], gather_kv.num_key_stages(*asked), sent)


def _gather_kept(share: Share) -> int:
    return saved_bytes(share.site, *share.rows)


_RING = RowTrade(_attend_by_ring, Ring(), _sends, _ring_exchanges, _ring_tasks, _ring_buffers, _ring_kept)
_GATHER = RowTrade(
    gather_kv.gather_and_attend, GatherKV(), gather_kv.opaque_traffic, _gather_exchanges, _gather_tasks, _gather_buffers, _gather_kept,
)  # fmt: skip

ring_across = attention_function(__name__, partial(_compute, _RING, INSIDE), "ring_across")
gather_across = attention_function(__name__, partial(_compute, _GATHER, INSIDE), "gather_across")
ring_inside = attention_function(__name__, partial(_compute, _RING, ACROSS), "ring_inside")
gather_inside = attention_function(__name__, partial(_compute, _GATHER, ACROSS), "gather_inside")


class Hybrid(_Hybrid):
    """Heads inside a node, a ring across nodes."""

    name = "hybrid"
    trade, heads_along = _RING, INSIDE
    attention = staticmethod(ring_across)


class HybridGather(_Hybrid):
    """Heads inside a node, all keys of the share gathered across nodes."""

    name = "hybrid_gather"
    trade, heads_along = _GATHER, INSIDE
    attention = staticmethod(gather_across)


class HybridOuter(_Hybrid):
    """Heads across nodes, a ring inside each."""

    name = "hybrid_outer"
    trade, heads_along = _RING, ACROSS
    attention = staticmethod(ring_inside)


class HybridGatherOuter(_Hybrid):
    """Heads across nodes, all keys of the share gathered inside each."""

    name = "hybrid_gather_outer"
    trade, heads_along = _GATHER, ACROSS
    attention = staticmethod(gather_inside)
