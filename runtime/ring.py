"""Ring attention: keys and values visit every rank while the queries stay (Liu et al., arXiv:2310.01889).

They go round in the direction in which the mask lets fewer rows travel; the backward starts with the last ones held and goes the
other way, dK and dV behind them in float32. `runtime/circle.py` has the walk and says what is sent when. With `zigzag` rows every rank
has the same causal work.

Bytes without a mask, with k the size of a local K: 2k(P-1) forward; backward 2k(P-2), for the keys of the last hop are still there, and
2k(P-1) in float32. A causal mask saves a quarter of that with zigzag rows and half with contiguous ones.
"""

from __future__ import annotations

from typing import ClassVar

import sympy
from torch import Tensor

from autoseq.runtime import strategy
from autoseq.runtime.attention_call import Terms, attention_function
from autoseq.runtime.lanes import (
    Lane,
    Lanes,
    cheapest_lane,
    keeps_last_keys,
    key_bytes,
    lanes_exchanges,
    lanes_op,
    lanes_task,
    ring_buffers,
    ring_phases,
)
from autoseq.runtime.layout import Layout
from autoseq.runtime.needs import Needs
from autoseq.runtime.strategy import Site, Strategy
from autoseq.runtime.timeline import Exchanges, Phase, Way
from autoseq.runtime.work_counts import Task


def one_lane(needs: Needs, key_bytes: int, grad_bytes: int) -> tuple[Lane, ...]:
    """All keys the cheaper way."""
    return (cheapest_lane(needs, key_bytes, grad_bytes),)


ring_attention = lanes_op("ring_attention", one_lane)


def _compute(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """Sends at most (P-1)·B·K·t·(D+Dv) elements forward; backward less by one hop, and (P-1) times as many float32 gradients."""
    return terms.call(ring_attention, q, k, v)


attention = attention_function(__name__, _compute)


class Ring(Strategy):
    """Keys and values go round, queries stay."""

    name = "ring"
    merges_partial_softmaxes = True
    balanced_by_zigzag = True
    lanes: ClassVar[Lanes] = staticmethod(one_lane)
    attention = staticmethod(attention)

    def formulas(self) -> dict[str, sympy.Expr]:
        hops = strategy.P - 1
        elements = strategy.B * strategy.K * strategy.t * (strategy.D + strategy.V)
        return {
            "forward_bytes": hops * elements * strategy.e,
            "backward_bytes": elements * ((hops - 1) * strategy.e + hops * strategy.a),
            "forward_messages": hops,
            "backward_messages": 2 * hops - 1,
        }

    def work_formulas(self) -> dict[str, sympy.Expr]:
        return keeps_last_keys(super().work_formulas())

    def exchanged(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Exchanges:
        return lanes_exchanges(self.lanes, site, group_size, layout, rank, way)

    def phases(self, way: Way) -> tuple[Phase, ...]:
        return ring_phases(way, strategy.P)

    def tasks(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> list[Task]:
        return [lanes_task(self.lanes, site, group_size, layout, rank, way)]

    def kept_bytes(self, site: Site, group_size: int, layout: Layout, rank: int) -> int:
        return super().kept_bytes(site, group_size, layout, rank) + (key_bytes(site, group_size, layout)[0] if group_size > 1 else 0)

    def buffer_bytes(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> int:
        return 0 if group_size == 1 else ring_buffers(*key_bytes(site, group_size, layout), group_size, way)
