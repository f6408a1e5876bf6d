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
from autoseq.runtime.strategy import Site
from autoseq.runtime.timeline import ONE, Phase, Way
from autoseq.runtime.visit_op import visiting_op
from autoseq.runtime.visiting import Visiting
from autoseq.runtime.visits import HOME, THERE, Manner, never

_MANNER = Manner(never, early=None, keeps_all=True)


def _halo_elements(k: Tensor, v: Tensor, settings: Settings) -> int:
    """The most that a participant may get of any mask with these bounds."""
    P = prod(group_of(name).size for name in settings.groups)
    shards = max(1, len(settings.places) // P)
    rows: Any = _halo_rows(settings, P, k.shape[2], settings.layout, shards)
    return rows * k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3])


def _halo_rows(known: Settings | Site, P: int, t: int, layout: Layout, shards: int) -> int:
    """The same in rows, with t rows of keys in so many shards of each participant; sizes may be symbolic."""
    others, behind, ahead = (P - 1) * t, known.max_behind, known.max_ahead
    if P == 1 or behind is None or ahead is None or _may_fill_rows(known):
        return others
    # Each of its chunks of queries reaches this far beyond its own keys; or beyond itself, where its keys are at other positions.
    chunks = num_chunks(layout) * shards
    halo = chunks * (torch.sym_max(behind, 0) + torch.sym_max(ahead, 0))
    if known.q_len != known.k_len:
        halo = halo + local_length(known.q_len, P, layout) * shards
    rows: Any = torch.sym_min(others, halo)
    return rows


def _may_fill_rows(known: Settings | Site) -> bool:
    """Whether a row may be worth something that depends on all keys, of which then none is left out."""
    if not known.fills_empty_rows:
        return False
    own_position = known.q_len == known.k_len and (known.max_behind or 0) >= 0 and (known.max_ahead or 0) >= 0
    return bool(known.predicate or known.score) or not own_position


halo_attention = visiting_op("halo_attention", _MANNER, kept=_halo_elements)


def _compute(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """Sends at most B·w·K·(D+Dv) elements forward, and as many float32 gradients backward, with a window of w other keys."""
    return terms.call(halo_attention, q, k, v)


attention = attention_function(__name__, _compute)

# How many keys behind and ahead of a query's own position it may see, and how many chunks of the sequence a rank holds.
BEHIND, AHEAD, CHUNKS = sympy.symbols("W_behind W_ahead m", nonnegative=True, integer=True)


def _neighbours() -> sympy.Expr:
    """How many ranks a window reaches into."""
    reached = [CHUNKS * sympy.ceiling(CHUNKS * side / strategy.t) for side in (BEHIND, AHEAD)]
    return sympy.Min(reached[0] + reached[1], strategy.P - 1)


def _own_share() -> sympy.Expr:
    """How much of the work is with a rank's own keys.

    A side of w keys, x times a chunk of n rows, loses n·w·x/2 of its n·w pairs to others, and all but n·w/(2x) if it is the longer.
    """
    sides = BEHIND + AHEAD
    parts = []
    for side in (BEHIND, AHEAD):
        chunks = CHUNKS * side / strategy.t
        longer = sympy.Max(1, chunks)
        parts.append(side * (1 / longer - sympy.Min(chunks, 1 / longer) / 2))
    return 1 - (sides - sum(parts)) / sympy.Max(1, sides)


class Halo(Visiting):
    """The neighbours' keys within the window, and no others."""

    name = "halo"
    merges_partial_softmaxes = True
    manner = _MANNER
    attention = staticmethod(attention)

    def formulas(self) -> dict[str, sympy.Expr]:
        P, t = strategy.P, strategy.t
        rows = sympy.Min(CHUNKS * (BEHIND + AHEAD), (P - 1) * t)
        elements = strategy.B * rows * strategy.K * (strategy.D + strategy.V)
        messages = _neighbours()
        return {
            "forward_bytes": elements * strategy.e,
            "backward_bytes": elements * strategy.a,
            "forward_messages": messages,
            "backward_messages": messages,
        }

    def work_formulas(self) -> dict[str, sympy.Expr]:
        """With a whole window around every query."""
        P, s, t, K = strategy.P, strategy.s, strategy.t, strategy.K
        rows = sympy.Min(CHUNKS * (BEHIND + AHEAD), (P - 1) * t)
        kept = strategy.saved_formula(strategy.H, K, s, t) + strategy.B * rows * K * (strategy.D + strategy.V) * strategy.e
        return {"pairs": strategy.B * strategy.H * s * sympy.Min(1 + BEHIND + AHEAD, P * t), "kept_bytes": kept}

    def cannot_serve(self, site: Site, group_size: int) -> str | None:
        for bound, side in ((site.max_behind, "behind"), (site.max_ahead, "ahead of")):
            if bound is None:
                return f"a halo is for masks with a window, and this one lets a query see any key {side} it"
        return super().cannot_serve(site, group_size)

    def sizes(self, site: Site, group_size: int, layout: Layout, rank: int) -> dict[sympy.Symbol, int]:
        sizes = super().sizes(site, group_size, layout, rank)
        # Where queries and keys are at other positions, or a row without keys needs them all, the window says little.
        everything = (group_size - 1) * sizes[strategy.t]
        says_it = site.q_len == site.k_len and not site.fills_empty_rows
        behind, ahead = (max(0, bound) if says_it and bound is not None else everything for bound in (site.max_behind, site.max_ahead))
        return sizes | {BEHIND: behind, AHEAD: ahead, CHUNKS: num_chunks(layout)}

    def phases(self, way: Way) -> tuple[Phase, ...]:
        """The halos travel under the own block. A backward begins with them, and sends each one's gradients under what follows."""
        own = _own_share()
        if way == "forward":
            return Phase(own, ((THERE, ONE),)), Phase(1 - own)
        neighbours = sympy.Max(1, _neighbours())
        sends = ((HOME, 1 / neighbours),)
        of_each = (1 - own) / neighbours
        return Phase(of_each), Phase(of_each, sends, neighbours - 1), Phase(own, sends)

    def kept_elements(self, site: Site, P: int, layout: Layout) -> int:
        rows = _halo_rows(site, P, local_length(site.k_len, P, layout), layout, 1)
        return rows * site.batch * site.kv_heads * (site.head_dim + site.value_dim)
