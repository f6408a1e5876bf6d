"""Local: the whole sequence on one rank. Nothing is sent.

It serves P = 1 and attention whose sequence is not sharded; `ulysses` runs the same op on its share of the heads.
"""

from __future__ import annotations

import sympy
from torch import Tensor

from autoseq.runtime.attention_op import Call, attention_op, checked_inputs
from autoseq.runtime.blockwise import backward_chunks, forward_chunks, new_accumulators, new_gradients
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategy import Site, Strategy


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: list[Tensor],
    bias: Tensor | None = None,
    *,
    scale: float,
    max_ahead: int | None,
    max_behind: int | None,
    predicate: str,
    q_len: int,
    k_len: int,
    layout: Layout,
    group: str,
) -> Tensor:
    """Attention of q [B,H,s,D] to k [B,K,t,D], v [B,K,t,Dv], all rows on this rank: out [B,H,s,Dv]. Sends nothing.

    Raises UnsupportedError for a bias that needs a gradient.
    """
    q, k, v, bias = checked_inputs(q, k, v, bias)
    ratio = q.shape[1] // k.shape[1]
    # With one rank both layouts hold the rows in global order, so the op never asks for a group.
    settings = (scale, max_ahead, max_behind, predicate, q_len, k_len, 0, ratio, "contiguous", "")
    return whole_attention(q, k, v, captures, bias, *settings)[0]


class Local(Strategy):
    """Whole attention on one rank."""

    name = "local"
    attention = staticmethod(attention)

    def cannot_serve(self, site: Site, group_size: int) -> str | None:
        if group_size > 1:
            return f"local attention needs the whole sequence on one rank, but it is split over {group_size}"
        return super().cannot_serve(site, group_size)

    def formulas(self) -> dict[str, sympy.Expr]:
        zero = sympy.Integer(0)
        return {"forward_bytes": zero, "backward_bytes": zero, "forward_messages": zero, "backward_messages": zero}


def _forward(call: Call) -> tuple[Tensor, Tensor]:
    out, lse = new_accumulators(call.q, call.v.shape[3])
    forward_chunks(out, lse, call.q, call.k, call.v, call.padded_queries, call.keys_of(0), call.problem)
    return out, lse


def _backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grads = new_gradients(call.q, call.k, call.v)
    backward_chunks(
        grads, grad_out, call.q, call.k, call.v, out, lse, call.queries, call.keys_of(0), call.problem
    )
    return grads


whole_attention = attention_op("block_attention", _forward, _backward)
