"""Halo: of its neighbours' keys, each rank gets just those that its window reaches (as in stencil codes; for attention, "context
parallelism" of sliding windows).

The messages of all neighbours, however many the window reaches into, are posted before the own block is computed, and each halo is
worked on when it is there. It is kept for the backward, which then sends nothing but its gradients home, in float32.

Bytes, with a window of w keys beside a query's own: B·min(w, S-S/P)·K·(D+Dv)·e forward and the same in float32 backward, for ranks with
full neighbours on both sides; the first and the last ranks send less. Zigzag rows have two chunks with a halo each: twice that.
"""

from __future__ import annotations

from math import prod
from typing import Any

import sympy
import torch
from torch import Tensor

from autoseq.runtime import strategy
from autoseq.runtime.attention_call import Terms, attention_function
from autoseq.runtime.groups import group_of
from autoseq.runtime.layout import Layout, local_length, num_chunks
from autoseq.runtime.op_call import Settings
from autoseq.runtime.strategy import Cost, Site, Strategy
from autoseq.runtime.visit_op import visiting_op
from autoseq.runtime.visits import Manner, never

_MANNER = Manner(never, early=None, keeps_all=True)


def _halo_elements(k: Tensor, v: Tensor, settings: Settings) -> int:
    """The most that a participant may get of any mask with these bounds."""
    P = prod(group_of(name).size for name in settings.groups)
    elements = k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3])
    others, behind, ahead = (P - 1) * k.shape[2], settings.max_behind, settings.max_ahead
    if P == 1 or behind is None or ahead is None or _may_fill_rows(settings):
        return others * elements
    # Each of its chunks of queries reaches this far beyond its own keys; or beyond itself, where its keys are at other positions.
    chunks = num_chunks(settings.layout) * max(1, len(settings.places) // P)
    halo = chunks * (torch.sym_max(behind, 0) + torch.sym_max(ahead, 0))
    if settings.q_len != settings.k_len:
        halo = halo + local_length(settings.q_len, P, settings.layout) * max(1, len(settings.places) // P)
    rows: Any = torch.sym_min(others, halo)
    return rows * elements


def _may_fill_rows(settings: Settings) -> bool:
    """Whether a row may be worth something that depends on all keys, of which then none is left out."""
    if not settings.fills_empty_rows:
        return False
    own_position = settings.q_len == settings.k_len and (settings.max_behind or 0) >= 0 and (settings.max_ahead or 0) >= 0
    return bool(settings.predicate or settings.score) or not own_position


halo_attention = visiting_op("halo_attention", _MANNER, kept=_halo_elements)


def _compute(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """Sends at most B·w·K·(D+Dv) elements forward, and as many float32 gradients backward, with a window of w other keys."""
    return terms.call(halo_attention, q, k, v)


attention = attention_function(__name__, _compute)

# How many keys behind and ahead of a query's own position it may see, and how many chunks of the sequence a rank holds.
BEHIND, AHEAD, CHUNKS = sympy.symbols("W_behind W_ahead m", nonnegative=True, integer=True)


class Halo(Strategy):
    """The neighbours' keys within the window, and no others."""

    name = "halo"
    merges_partial_softmaxes = True
    attention = staticmethod(attention)

    def formulas(self) -> dict[str, sympy.Expr]:
        P, t = strategy.P, strategy.t
        rows = sympy.Min(CHUNKS * (BEHIND + AHEAD), (P - 1) * t)
        elements = strategy.B * rows * strategy.K * (strategy.D + strategy.V)
        reached = [CHUNKS * sympy.ceiling(CHUNKS * side / t) for side in (BEHIND, AHEAD)]
        messages = sympy.Min(reached[0] + reached[1], P - 1)
        return {
            "forward_bytes": elements * strategy.e,
            "backward_bytes": elements * strategy.a,
            "forward_messages": messages,
            "backward_messages": messages,
        }

    def cannot_serve(self, site: Site, group_size: int) -> str | None:
        for bound, side in ((site.max_behind, "behind"), (site.max_ahead, "ahead of")):
            if bound is None:
                return f"a halo is for masks with a window, and this one lets a query see any key {side} it"
        return super().cannot_serve(site, group_size)

    def sent(self, site: Site, group_size: int, layout: Layout, rank: int) -> Cost:
        return _MANNER.cost(site, group_size, layout, rank)

    def sizes(self, site: Site, group_size: int, layout: Layout, rank: int) -> dict[sympy.Symbol, int]:
        sizes = super().sizes(site, group_size, layout, rank)
        # Where queries and keys are at other positions, or a row without keys needs them all, the window says little.
        everything = (group_size - 1) * sizes[strategy.t]
        says_it = site.q_len == site.k_len and not site.fills_empty_rows
        behind, ahead = (max(0, bound) if says_it and bound is not None else everything for bound in (site.max_behind, site.max_ahead))
        return sizes | {BEHIND: behind, AHEAD: ahead, CHUNKS: num_chunks(layout)}
