"""A ring that uses both directions of its links (after TokenRing, arXiv:2412.20501): half of the keys go round each way, or the queries.

A full-duplex link carries as much one way while it carries the other, so a hop takes half as long as a plain ring's; what is sent in
all is the same, in twice as many messages. A rank's keys are halved in local order: with zigzag rows its early chunk goes up and its
late chunk down, past just those ranks that a causal mask lets see it.

Where queries are few against keys, as in cross-attention, they travel instead and (out, lse) come back the other way
(`runtime/visiting_queries.py`): whichever sends fewer bytes in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import sympy
from torch import Tensor

from autoseq.runtime import runs
from autoseq.runtime.attention_call import Terms, attention_function
from autoseq.runtime.circle import Route
from autoseq.runtime.extrapolation import Part
from autoseq.runtime.groups import group_of
from autoseq.runtime.lanes import Lane, key_bytes, lanes_op
from autoseq.runtime.layout import Layout, local_length
from autoseq.runtime.needs import Needs
from autoseq.runtime.plain import accumulate_dtype
from autoseq.runtime.ring import Ring
from autoseq.runtime.strategy import Site, Strategy, accumulator_bytes
from autoseq.runtime.timeline import Exchange, Phase, Way, Work, repeated
from autoseq.runtime.visiting_queries import VisitingQueries, visiting_queries_attention
from autoseq.runtime.visits import HOME, THERE


@lru_cache(maxsize=256)
def _lanes(needs: Needs, key_bytes: int, grad_bytes: int) -> tuple[Lane, ...]:
    """Up with the first half of each rank's keys, down with the second; each comes back the other way in the backward."""
    everyone = range(len(needs))
    wanted = [runs.union(*(of_one[holder] for of_one in needs)) for holder in everyone]
    first = [runs.head(rows, runs.count(rows) // 2) for rows in wanted]
    ups = tuple(tuple(runs.intersection(of_one[holder], first[holder]) for holder in everyone) for of_one in needs)
    downs = tuple(tuple(runs.difference(of_one[holder], first[holder]) for holder in everyone) for of_one in needs)
    return (Route.of(ups, 1), Route.of(ups, -1)), (Route.of(downs, -1), Route.of(downs, 1))


bidirectional_ring_attention = lanes_op("bidirectional_ring_attention", _lanes)


def _compute(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """Sends what a ring sends, half of it each way, or queries and results."""
    sizes = (q.element_size(), accumulate_dtype(q.dtype).itemsize)
    by_queries = _queries_are_less(q.shape[1:], (*k.shape[1:], v.shape[3]), sizes, group_of(terms.group).size - 1)
    return terms.call(visiting_queries_attention if by_queries else bidirectional_ring_attention, q, k, v)


def _queries_are_less(queries: Sequence[int], keys: Sequence[int], sizes: tuple[int, int], hops: int) -> bool:
    """Whether a step sends fewer bytes if queries [H,s,D] travel rather than keys and values [K,t,D,Dv]; sizes are those of an element
    and of an accumulator."""
    (H, s, D), (K, t, _, V), (e, a) = queries, keys, sizes
    query_row = H * ((D * e + V * a + a) + (D * e + 2 * V * e + a) + D * a)  # q; out and lse home; q, grad_out, out and lse; dq home
    key_row = K * (D + V) * ((2 * hops - 1) * e + hops * a)  # of all hops
    return hops * s * query_row < t * key_row


attention = attention_function(__name__, _compute)


class BidirectionalRing(Strategy):
    """Half of the keys and values go round each way, or queries that are few."""

    name = "bidirectional_ring"
    merges_partial_softmaxes = True
    balanced_by_zigzag = True
    attention = staticmethod(attention)

    def formulas(self) -> dict[str, sympy.Expr]:
        """The bytes of a ring in twice as many messages."""
        one_way = Ring().formulas()
        return one_way | {name: 2 * one_way[name] for name in ("forward_messages", "backward_messages")}

    def work_formulas(self) -> dict[str, sympy.Expr]:
        return _KEYS.work_formulas()

    def sizes(self, site: Site, group_size: int, layout: Layout, rank: int) -> dict[sympy.Symbol, int]:
        by_queries = isinstance(_moves(site, group_size, layout), VisitingQueries)
        return super().sizes(site, group_size, layout, rank) | {BY_QUERIES: int(by_queries)}

    def parts(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way, together: int = 1) -> list[Part]:
        silent = Part(Fraction(1), rank, dict.fromkeys(("keys", "gradients", THERE, HOME), Exchange("send", "flat", 0, 0)))
        return [silent, *_moves(site, group_size, layout).parts(site, group_size, layout, rank, way, together)]

    def phases(self, way: Way) -> tuple[Phase, ...]:
        """Those of what travels: keys, or queries where the last symbol is 1."""
        return repeated(_KEYS.phases(way), 1 - BY_QUERIES) + repeated(_QUERIES.phases(way), BY_QUERIES)

    def work(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Work:
        return _moves(site, group_size, layout).work(site, group_size, layout, rank, way)

    def kept_bytes(self, site: Site, group_size: int, layout: Layout, rank: int) -> int:
        return _moves(site, group_size, layout).kept_bytes(site, group_size, layout, rank)

    def buffer_bytes(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> int:
        return _moves(site, group_size, layout).buffer_bytes(site, group_size, layout, rank, way)


class _KeysBothWays(Ring):
    """What it answers where keys travel."""

    lanes = staticmethod(_lanes)

    def buffer_bytes(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> int:
        """One half's copy leaves when the other has arrived, so a forward of several hops holds half of the keys less than a ring's."""
        held = super().buffer_bytes(site, group_size, layout, rank, way)
        return held - (key_bytes(site, group_size, layout)[0] // 2 if way == "forward" and group_size > 2 else 0)


_KEYS, _QUERIES = _KeysBothWays(), VisitingQueries()

# 1 where queries travel, else 0.
BY_QUERIES = sympy.Symbol("j", nonnegative=True, integer=True)


def _moves(site: Site, P: int, layout: Layout) -> Strategy:
    """What sends fewer bytes in a step."""
    s, t = (local_length(n, P, layout) for n in (site.q_len, site.k_len))
    keys, sizes = (site.kv_heads, t, site.head_dim, site.value_dim), (site.element_bytes, accumulator_bytes(site))
    return _QUERIES if _queries_are_less((site.heads, s, site.head_dim), keys, sizes, P - 1) else _KEYS
