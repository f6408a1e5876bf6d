"""What trading heads for rows costs: formulas, exchanges and buffers of `ulysses`, and of `hybrid` along one dim of its mesh."""

from __future__ import annotations

from functools import cache

import sympy

from autoseq.runtime import strategy
from autoseq.runtime.stages import STAGES
from autoseq.runtime.strategy import values_of
from autoseq.runtime.timeline import Exchange, Exchanges, Scope, Way

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


def head_exchanges(way: Way, sizes: dict[sympy.Symbol, int], scope: Scope) -> Exchanges:
    """What a rank sends in one pass, in as many messages each as there are stages."""
    return {
        name: Exchange("all_to_all", scope, value, sizes[STAGES]) for name, value in values_of(head_formulas(way), sizes).items()
    }


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
