"""What trading heads for rows costs: formulas, exchanges and buffers of `ulysses`, and of `hybrid` along one dim of its mesh."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import sympy

from autoseq.runtime import strategy
from autoseq.runtime.stages import STAGES
from autoseq.runtime.timeline import Exchange, Exchanges, Peer, Peers, Scope, Way

# Query heads and KV heads that this rank computes, and KV heads that it sends, counted once per receiving rank.
OWN_HEADS, OWN_KV_HEADS, SENT_KV_HEADS = sympy.symbols("h g n", nonnegative=True, integer=True)


ROWS, HEADS = "rows", "heads"
"""The names of what goes to the ranks that compute a head, and of what goes back to those that hold a row."""


@cache
def head_formulas(way: Way) -> dict[str, sympy.Expr]:
    """Bytes that a rank sends: q, k, v or the gradient of out to where their heads are, and out or dq, dk, dv to where their rows are."""
    B, P, e = strategy.B, strategy.P, strategy.e
    query, value_out = strategy.s * strategy.D, strategy.s * strategy.V
    key_value = strategy.t * (strategy.D + strategy.V)
    if way == "forward":
        there, home = query * (strategy.H - OWN_HEADS) + key_value * SENT_KV_HEADS, value_out * OWN_HEADS * (P - 1)
    else:
        there, home = value_out * (strategy.H - OWN_HEADS), (query * OWN_HEADS + key_value * OWN_KV_HEADS) * (P - 1)
    return {ROWS: B * e * there, HEADS: B * e * home}


def head_exchanges(
    way: Way, sizes: dict[sympy.Symbol, int], shares: Sequence[tuple[int, int]], number: int, ranks: range, scope: Scope
) -> Exchanges:
    """What the rank of that number sends in one pass, in as many messages each as there are stages.

    `shares` are the query heads and KV heads of each of the `ranks` that trade them.
    """
    B, s, t, D, V, e = (sizes[symbol] for symbol in (strategy.B, strategy.s, strategy.t, strategy.D, strategy.V, strategy.e))

    def pieces(of_query_head: int, of_kv_head: int) -> tuple[Peers, Peers]:
        """What each rank's heads take of one rank's rows: to each what its own take, from each what one's own take."""
        taken = [B * e * (heads * of_query_head + kv_heads * of_kv_head) for heads, kv_heads in shares]
        others = [(rank, size) for i, (rank, size) in enumerate(zip(ranks, taken, strict=True)) if i != number]
        theirs = tuple(Peer(rank, size, sizes[STAGES]) for rank, size in others if size)
        own = tuple(Peer(rank, taken[number], sizes[STAGES]) for rank, _ in others if taken[number])
        return theirs, own

    def exchange(to: Peers, came: Peers) -> Exchange:
        return Exchange("all_to_all", scope, sum(peer.bytes for peer in to), sizes[STAGES], to, came)

    qkv, out = pieces(s * D, t * (D + V)), pieces(s * V, 0)
    rows, heads = (qkv, out) if way == "forward" else (out, qkv)
    return {ROWS: exchange(*rows), HEADS: exchange(*reversed(heads))}


def head_buffers(way: Way, sizes: dict[sympy.Symbol, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes of the buffers sent and got on the way to the heads' ranks, and on the way home; one's own part is among them."""
    B, s, t, D, V, P, e = (sizes[symbol] for symbol in (strategy.B, strategy.s, strategy.t, strategy.D, strategy.V, strategy.P, strategy.e))
    own, own_keys = sizes[OWN_HEADS], sizes[OWN_KV_HEADS]
    of_rows = B * e * (sizes[strategy.H] * s * D + (sizes[SENT_KV_HEADS] + own_keys) * t * (D + V))
    of_heads = B * e * P * (own * s * D + own_keys * t * (D + V))
    out_of_rows, out_of_heads = B * e * sizes[strategy.H] * s * V, B * e * P * own * s * V
    if way == "forward":
        return (of_rows, of_heads), (out_of_heads, out_of_rows)
    return (out_of_rows, out_of_heads), (of_heads, of_rows)


def packed_bytes(way: Way, sizes: dict[sympy.Symbol, int]) -> int:
    """Of all these buffers: each is written from tensors, or read into them."""
    return sum(map(sum, head_buffers(way, sizes)))
