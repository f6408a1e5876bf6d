"""Hybrid: heads are traded along one dim of the mesh and rows along the other (Fang and Zhao, "USP", arXiv:2405.07719).

    mesh of nodes x ranks      heads inside a node       each rank: all rows of its node, a share of the heads
                               rows across nodes         a ring, or a gather, among the ranks that have the same heads

An all-to-all among few ranks needs few heads, and sends little over the links it uses; the ring's keys are those of a share of the
heads. `_outer` is the other order of placement: heads across nodes, rows inside.

The exchange is that of `ulysses`, uneven and grouped heads included; a rank without heads is in a ring with others that have none. The
rest is the op of `ring` or `gather_kv`, whose participants hold the shards of several ranks (`Holdings`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import sympy
from torch import Tensor

from autoseq.runtime import gather_kv, ring, strategy
from autoseq.runtime.attention_call import Terms, attention_function
from autoseq.runtime.gather_kv import GatherKV
from autoseq.runtime.groups import group_of
from autoseq.runtime.head_exchange import Exchange
from autoseq.runtime.lanes import lanes_cost
from autoseq.runtime.layout import Layout
from autoseq.runtime.local import whole_attention
from autoseq.runtime.ring import Ring
from autoseq.runtime.stages import STAGES, num_heads
from autoseq.runtime.strategy import Cost, Site, Strategy, evaluated, needs_two_dims
from autoseq.runtime.traffic import Traffic
from autoseq.runtime.ulysses import OWN_HEADS, OWN_KV_HEADS, SENT_KV_HEADS, Ulysses, head_shares

ACROSS, INSIDE = 0, 1
"""The dims of a mesh."""


@dataclass(frozen=True, slots=True)
class RowTrade:
    """What trades rows: how, the strategy whose formulas it has, what a rank sends, and by which kind of message.

    `attend` takes q, k, v, the terms, groups, places and the first head; `cost` a site of the share, participants, layout, number among
    them, places, global heads and the program's query heads for each KV head.
    """

    attend: Callable[..., Tensor]
    strategy: Strategy
    cost: Callable[[Site, int, Layout, int, tuple[int, ...], range, int], Cost]
    kinds: Callable[[Site, Cost], dict[str, Traffic]]


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

    def sent(self, site: Site, group_size: int, layout: Layout, rank: int) -> Cost:
        along = (strategy.N, strategy.R)[self.heads_along]
        exchanged = evaluated(_exchange_formulas(along), self.sizes(site, group_size, layout, rank))
        return exchanged + self._traded(site, layout, rank)

    def opaque(self, site: Site, group_size: int, layout: Layout) -> dict[str, Traffic]:
        return self.trade.kinds(site, self._traded(site, layout, 0))

    def sizes(self, site: Site, group_size: int, layout: Layout, rank: int) -> dict[sympy.Symbol, int]:
        heads, kv_heads = head_shares(site.mesh[self.heads_along], site.heads, site.kv_heads)
        number = divmod(rank, site.mesh[INSIDE])[self.heads_along]
        return super().sizes(site, group_size, layout, rank) | {
            OWN_HEADS: num_heads(heads[number]),
            OWN_KV_HEADS: num_heads(kv_heads[number]),
            SENT_KV_HEADS: sum(map(num_heads, kv_heads)) - num_heads(kv_heads[number]),
            # A gather of all keys is one message a stage; there are none in a ring's formulas.
            STAGES: self._traded(replace(site, max_ahead=None, max_behind=None, predicate=""), layout, rank).forward_messages,
        }

    def _traded(self, site: Site, layout: Layout, rank: int) -> Cost:
        """What a rank sends for its share of the heads to those that have the same."""
        at = divmod(rank, site.mesh[INSIDE])
        heads, kv_heads = head_shares(site.mesh[self.heads_along], site.heads, site.kv_heads)
        own, own_keys = heads[at[self.heads_along]], kv_heads[at[self.heads_along]]
        part = replace(site, heads=num_heads(own), kv_heads=num_heads(own_keys))
        nodes, ranks = site.mesh
        others, ratio = 1 - self.heads_along, site.heads // site.kv_heads
        return self.trade.cost(part, site.mesh[others], layout, at[others], places((nodes, ranks), self.heads_along), range(*own), ratio)


def _exchange_formulas(along: sympy.Symbol) -> dict[str, sympy.Expr]:
    """Those of `ulysses` in one stage, among the ranks along one dim."""
    here = {strategy.P: along, STAGES: sympy.Integer(1)}
    exchanged: dict[str, Any] = {name: formula.xreplace(here) for name, formula in Ulysses().formulas().items()}
    return exchanged


def _attend_by_ring(q: Tensor, k: Tensor, v: Tensor, terms: Terms, **where: Any) -> Tensor:
    return terms.call(ring.ring_attention, q, k, v, **where)


def _ring_cost(site: Site, P: int, layout: Layout, rank: int, held: tuple[int, ...], heads: range, _: int) -> Cost:
    return lanes_cost(ring.one_lane, site, P, layout, rank, held, heads)


def _gather_cost(site: Site, P: int, layout: Layout, rank: int, held: tuple[int, ...], heads: range, heads_per_kv: int) -> Cost:
    return gather_kv.gather_cost(site, P, layout, rank, held, heads.start, heads_per_kv)


def _sends(_: Site, cost: Cost) -> dict[str, Traffic]:
    return {"send": Traffic(cost.forward_messages + cost.backward_messages, cost.step_bytes)}


_RING = RowTrade(_attend_by_ring, Ring(), _ring_cost, _sends)
_GATHER = RowTrade(gather_kv.gather_and_attend, GatherKV(), _gather_cost, gather_kv.opaque_traffic)

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
