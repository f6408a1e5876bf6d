"""Queries that go round while keys stay (the variant of TokenRing, arXiv:2412.20501, for few queries or many key/value heads).

Each rank's queries visit the ranks whose keys they may see, and (out, lse) come straight back, so that a link carries queries one way
and results the other. In the backward q, grad_out, out and lse travel, dq comes back, and dK, dV are where they belong. That is fewer
bytes than sending keys where queries are few against keys, as in cross-attention.

No strategy by itself: `bidirectional_ring` takes this op where it sends less.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from autoseq.runtime import strategy, visits
from autoseq.runtime.groups import group_of
from autoseq.runtime.layout import Layout, local_length
from autoseq.runtime.op_call import Settings
from autoseq.runtime.strategy import Site
from autoseq.runtime.timeline import Phase, Way
from autoseq.runtime.visit_op import visiting_op
from autoseq.runtime.visiting import Visiting, visit_phases
from autoseq.runtime.visits import Manner, always

_MANNER = Manner(always)


def _last_queries(k: Tensor, v: Tensor, settings: Settings) -> int:
    """All other ranks' queries, but no more than a participant has of keys and values."""
    (group,) = settings.groups
    P, own = group_of(group).size, k.numel() + v.numel()
    if P == 1:
        return 0
    if settings.fills_empty_rows:
        return own  # keys may travel instead
    queries = local_length(settings.q_len, P, settings.layout) * k.shape[0] * k.shape[1] * settings.heads_per_kv * k.shape[3]
    elements: Any = torch.sym_min(own, (P - 1) * queries)
    return elements


visiting_queries_attention = visiting_op("visiting_queries_attention", _MANNER, kept=_last_queries)


class VisitingQueries(Visiting):
    """What `bidirectional_ring` answers where queries travel. Keys do, where a row without any is worth what depends on all of them."""

    name = "visiting_queries"
    manner = _MANNER

    def formulas(self) -> dict[str, sympy.Expr]:
        return visits.formulas()

    def phases(self, way: Way) -> tuple[Phase, ...]:
        return visit_phases(strategy.P - 1, 1 / strategy.P)

    def kept_elements(self, site: Site, P: int, layout: Layout) -> int:
        own = super().kept_elements(site, P, layout)
        if site.fills_empty_rows:
            return own
        return min(own, (P - 1) * site.batch * site.heads * local_length(site.q_len, P, layout) * site.head_dim)
