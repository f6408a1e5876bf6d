"""Ulysses: sequence for heads, and back (Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509).

One packed all-to-all gives each rank all rows of its share of the heads, whole attention runs there, and one all-to-all brings
the rows home. Any number of heads works: query heads are split as evenly as they go, some ranks may get none, and a rank
receives just the KV heads its query heads use, so grouped heads travel once unless several ranks need them (P > K).

The attention in the middle is the same op as `local`'s; a KV head that several ranks used gets its gradient summed in float32.
"""

from __future__ import annotations

import sympy
from torch import Tensor

from autoseq.runtime import strategy
from autoseq.runtime.attention_call import Terms, attention_function
from autoseq.runtime.groups import group_of
from autoseq.runtime.head_exchange import Exchange, HeadRange
from autoseq.runtime.layout import Layout
from autoseq.runtime.local import whole_attention
from autoseq.runtime.strategy import Site, Strategy
from autoseq.runtime.traffic import Traffic


def _compute(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """With evenly split heads it sends (P-1)/P of q, out and the KV heads (times max(1, P/K)); backward the same."""
    seq = group_of(terms.group)
    heads = [query_heads(rank, seq.size, q.shape[1]) for rank in range(seq.size)]
    kv_heads = [covering_kv_heads(each, terms.heads_per_kv) for each in heads]
    rows = Exchange([heads, kv_heads, kv_heads], terms.layout, seq).to_rows(q, k, v)
    out = terms.call_on_all_rows(whole_attention, *rows, first_head=heads[seq.rank][0])
    return Exchange([heads], terms.layout, seq).to_heads(out)[0]


attention = attention_function(__name__, _compute)


class Ulysses(Strategy):
    """Whole sequence on every rank, for a share of the heads."""

    name = "ulysses"
    attention = staticmethod(attention)

    def formulas(self) -> dict[str, sympy.Expr]:
        """Exact for any split of the heads; with h = H/P and n = (P-1) max(1, K/P), g = max(1, K/P) they are the even case."""
        B, P, e = strategy.B, strategy.P, strategy.e
        query, value_out = strategy.s * strategy.D, strategy.s * strategy.V
        key_value = strategy.t * (strategy.D + strategy.V)
        forward = query * (strategy.H - OWN_HEADS) + key_value * SENT_KV_HEADS + value_out * OWN_HEADS * (P - 1)
        backward = value_out * (strategy.H - OWN_HEADS) + (query * OWN_HEADS + key_value * OWN_KV_HEADS) * (P - 1)
        return {
            "forward_bytes": B * e * forward,
            "backward_bytes": B * e * backward,
            "forward_messages": sympy.Integer(2),
            "backward_messages": sympy.Integer(2),
        }

    def opaque(self, site: Site, group_size: int, layout: Layout) -> dict[str, Traffic]:
        return {}

    def sizes(self, site: Site, group_size: int, layout: Layout, rank: int) -> dict[sympy.Symbol, int]:
        heads = [query_heads(each, group_size, site.heads) for each in range(group_size)]
        kv_heads = [_count(covering_kv_heads(each, site.heads // site.kv_heads)) for each in heads]
        return Strategy.sizes(self, site, group_size, layout, rank) | {
            OWN_HEADS: _count(heads[rank]),
            OWN_KV_HEADS: kv_heads[rank],
            SENT_KV_HEADS: sum(kv_heads) - kv_heads[rank],
        }


# Query heads and KV heads that this rank computes, and KV heads that it sends, counted once per receiving rank.
OWN_HEADS, OWN_KV_HEADS, SENT_KV_HEADS = sympy.symbols("h g n", nonnegative=True, integer=True)


def query_heads(rank: int, P: int, heads: int) -> HeadRange:
    """The share of `rank`: consecutive heads, floor or ceil of heads / P of them."""
    return rank * heads // P, (rank + 1) * heads // P


def covering_kv_heads(heads: HeadRange, ratio: int) -> HeadRange:
    """The KV heads that some query heads use, with `ratio` query heads for each KV head."""
    start, end = heads
    return (start // ratio, (end - 1) // ratio + 1) if start < end else (0, 0)


def _count(heads: HeadRange) -> int:
    return heads[1] - heads[0]
