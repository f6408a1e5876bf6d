"""A ring that uses both directions of its links (after TokenRing, arXiv:2412.20501): half of the keys go round each way.

A full-duplex link carries as much one way while it carries the other, so a hop takes half as long as a plain ring's; what is sent in
all is the same, in twice as many messages. A rank's keys are halved in local order: with zigzag rows its early chunk goes up and its
late chunk down, past just those ranks that a causal mask lets see it.
"""

from __future__ import annotations

from functools import lru_cache

import sympy
from torch import Tensor

from autoseq.runtime import runs, strategy
from autoseq.runtime.attention_call import Terms, attention_function
from autoseq.runtime.circle import Route
from autoseq.runtime.lanes import Lane, lanes_cost, lanes_op
from autoseq.runtime.layout import Layout
from autoseq.runtime.needs import Needs
from autoseq.runtime.strategy import Cost, Site, Strategy


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
    """Sends what a ring sends, half of it each way."""
    return terms.call(bidirectional_ring_attention, q, k, v)


attention = attention_function(__name__, _compute)


class BidirectionalRing(Strategy):
    """Half of the keys and values go round each way, queries stay."""

    name = "bidirectional_ring"
    merges_partial_softmaxes = True
    balanced_by_zigzag = True
    attention = staticmethod(attention)

    def formulas(self) -> dict[str, sympy.Expr]:
        hops = strategy.P - 1
        elements = strategy.B * strategy.K * strategy.t * (strategy.D + strategy.V)
        return {
            "forward_bytes": hops * elements * strategy.e,
            "backward_bytes": elements * ((hops - 1) * strategy.e + hops * strategy.a),
            "forward_messages": 2 * hops,
            "backward_messages": 2 * (2 * hops - 1),
        }

    def sent(self, site: Site, group_size: int, layout: Layout, rank: int) -> Cost:
        return lanes_cost(_lanes, site, group_size, layout, rank)
