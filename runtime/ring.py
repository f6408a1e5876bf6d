"""Ring attention: keys and values visit every rank while the queries stay (Liu et al., arXiv:2310.01889).

Forward, hop h: rank r attends to the keys of rank r-h, while those of rank r-h-1 are already on their way. K and V travel in
one message, between two buffers, and blocks that the mask leaves empty cost no computation.

Backward: keys and values go round again, and behind them the gradients dK, dV of each shard, in float32. A share computed at
hop h joins its accumulator, which arrives during hop h, and leaves at hop h+1: no message waits for the block that runs.

    hop       0      1      2          ...   P-1        P
    K, V      send   send   send             -          -
    dK, dV    -      start  send, add        send, add  send home

The share of a rank's own keys never travels. Bytes: 2k(P-1) forward, 2k(P-1) and the same in float32 backward, with k the
size of a local K. With `zigzag` rows every rank has the same causal work.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from autoseq.runtime import strategy
from autoseq.runtime.attention_call import Terms, attention_function
from autoseq.runtime.attention_op import Call, attention_op
from autoseq.runtime.blockwise import Backward, Forward
from autoseq.runtime.messages import post_to_next
from autoseq.runtime.packed import pack, unpack
from autoseq.runtime.strategy import Strategy


def _compute(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """Sends (P-1)·B·K·t·(D+Dv) elements forward; backward the same and as many float32 gradients."""
    return terms.call(ring_attention, q, k, v)


attention = attention_function(__name__, _compute)


class Ring(Strategy):
    """Keys and values go round, queries stay."""

    name = "ring"
    merges_partial_softmaxes = True
    attention = staticmethod(attention)

    def formulas(self) -> dict[str, sympy.Expr]:
        hops = strategy.P - 1
        elements = strategy.B * strategy.K * strategy.t * (strategy.D + strategy.V)
        return {
            "forward_bytes": hops * elements * strategy.e,
            "backward_bytes": hops * elements * (strategy.e + strategy.a),
            "forward_messages": hops,
            "backward_messages": 2 * hops,
        }


def _forward(call: Call, work: Forward) -> None:
    group = call.group
    here = pack(call.k, call.v)
    spare = torch.empty_like(here)
    for hop in range(group.size):
        message = (here, spare) if hop < group.size - 1 else None
        pending = post_to_next("ring_attention", group, hop, [message])
        k, v = unpack(here, call.k, call.v)
        work.add(k, v, call.keys_of((group.rank - hop) % group.size))
        pending.wait()
        here, spare = spare, here


def _backward(call: Call, work: Backward) -> tuple[Tensor, Tensor]:
    group, dtype = call.group, work.dq.dtype
    own_dk, own_dv = (x.new_zeros(x.shape, dtype=dtype) for x in (call.k, call.v))
    here = pack(call.k, call.v)
    spare = torch.empty_like(here)
    leaving: Tensor | None = None  # dK, dV of the keys that visited at the last hop
    for hop in range(group.size):
        arriving = None if leaving is None else torch.empty_like(leaving)
        keys = (here, spare) if hop < group.size - 1 else None
        grads = None if leaving is None or arriving is None else (leaving, arriving)
        pending = post_to_next("ring_attention_backward", group, hop, [keys, grads])
        visiting = torch.zeros_like(here, dtype=dtype) if hop > 0 else None
        dk, dv = (own_dk, own_dv) if visiting is None else unpack(visiting, call.k, call.v)
        k, v = unpack(here, call.k, call.v)
        work.add(k, v, call.keys_of((group.rank - hop) % group.size), dk, dv)
        pending.wait()
        leaving = visiting if visiting is None or arriving is None else visiting.add_(arriving)
        here, spare = spare, here
    if leaving is not None:
        arriving = torch.empty_like(leaving)
        post_to_next("ring_attention_backward", group, group.size, [(leaving, arriving)]).wait()
        for own, share in zip((own_dk, own_dv), unpack(arriving, call.k, call.v), strict=True):
            own.add_(share)
    return own_dk, own_dv


ring_attention = attention_op("ring_attention", _forward, _backward)
