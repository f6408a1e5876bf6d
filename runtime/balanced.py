"""Balanced: causal attention on contiguous rows in which early ranks help late ones (Li et al., "LightSeq" / DistFlashAttn,
arXiv:2310.03294, section 3.1).

Of P(P-1)/2 pairs (the queries of rank i, the keys of rank j < i), those at most half a circle apart are computed by rank i, to which
the keys go; the others by rank j, which has little to do itself: the queries go there, and (out, lse) come back. So after P//2 rounds all
is done, and each rank has worked in every one of them (in the last one, if P is even, only the later half has).

    P = 5, who works on the queries of rank i (row) and the keys of rank j (column)

             0  1  2  3  4
        0    0
        1    1  1
        2    2  2  2
        3    0  3  3  3
        4    0  1  4  4  4

With k the bytes of a local K or V and q those of a local Q, a rank sends 2k for each rank that it serves with keys and q for each that
helps it, and out and lse in float32 for each that it helps: in all about half of what a ring sends.
"""

from __future__ import annotations

import sympy
from torch import Tensor

from autoseq.runtime import strategy, visits
from autoseq.runtime.attention_call import Terms, attention_function
from autoseq.runtime.attention_op import as_many_as_own
from autoseq.runtime.extrapolation import summed
from autoseq.runtime.layout import Layout
from autoseq.runtime.needs import fills_rows
from autoseq.runtime.strategy import Site, rows_of_site, terms_of_site
from autoseq.runtime.timeline import Phase, Way
from autoseq.runtime.visit_op import visiting_op
from autoseq.runtime.visiting import Visiting, visit_phases
from autoseq.runtime.visits import Manner


def _is_helped(asker: int, holder: int, P: int) -> bool:
    """Whether the holder of the keys computes a pair."""
    return 2 * (asker - holder) > P


_MANNER = Manner(_is_helped)


balanced_attention = visiting_op("balanced_attention", _MANNER, kept=as_many_as_own)


def _compute(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """Sends K and V to P//2 ranks at most, and to the others below what `Balanced.formulas` says."""
    return terms.call(balanced_attention, q, k, v)


attention = attention_function(__name__, _compute)


class Balanced(Visiting):
    """Early ranks help late ones."""

    name = "balanced"
    merges_partial_softmaxes = True
    manner = _MANNER
    attention = staticmethod(attention)

    def formulas(self) -> dict[str, sympy.Expr]:
        """In numbers of shards, which depend on the rank: see `visits`."""
        return visits.formulas()

    def work_formulas(self) -> dict[str, sympy.Expr]:
        """In numbers of shards; of its own block and of what a causal mask lets no whole shard see, half is left out."""
        return visits.work_formulas()

    def cannot_serve(self, site: Site, group_size: int) -> str | None:
        if site.max_ahead != 0:
            return "helpers are for causal masks, in which early ranks have less to do; this mask is not causal"
        if site.q_len != site.k_len:
            return f"helpers are for self-attention; here {site.q_len} queries see {site.k_len} keys"
        if group_size > 1 and fills_rows(terms_of_site(site), rows_of_site(site, group_size, "contiguous")):
            return "a row that the mask leaves without keys is worth what depends on all of them, which no helper can tell"
        return super().cannot_serve(site, group_size)

    def cannot_lay_out(self, layout: Layout) -> str | None:
        if layout != "contiguous":
            return "with zigzag rows every rank has as much causal work as the others, and needs no help"
        return None

    def sizes(self, site: Site, group_size: int, layout: Layout, rank: int) -> dict[sympy.Symbol, int]:
        cases = self.cases(site, group_size, layout, rank)
        counts = summed([(case.weight, _MANNER.counts(*case.asked)) for case in cases])
        return super().sizes(site, group_size, layout, rank) | counts

    def phases(self, way: Way) -> tuple[Phase, ...]:
        """Of P//2 rounds and the own block, of which the mask leaves half."""
        rounds = sympy.floor(strategy.P / 2)
        return visit_phases(rounds, 1 / (2 * rounds + 1))
