"""Gather KV: every rank gets all keys and values in one all-gather, queries stay (as in Llama 3's context parallelism,
Grattafiori et al., arXiv:2407.21783, section 3.3.2).

K and V travel packed. The gathered copy is dropped after the forward; the backward gathers again, and the gradients of all
keys go home by one reduce-scatter, in float32. Each rank's keys stay where the gather put them: the blocks say what global
positions they have, so no layout is ever undone by a copy.
"""

from __future__ import annotations

import sympy
import torch
from torch import Tensor

from autoseq.runtime import strategy
from autoseq.runtime.attention_call import Terms, attention_function
from autoseq.runtime.attention_op import Call, attention_op
from autoseq.runtime.blockwise import Backward, Forward
from autoseq.runtime.layout import Layout
from autoseq.runtime.messages import gather_shards, sum_shards
from autoseq.runtime.packed import pack, unpack
from autoseq.runtime.strategy import Site, Strategy
from autoseq.runtime.traffic import Traffic


def _compute(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """Sends (P-1)·B·K·t·(D+Dv) elements forward; backward the same and as many float32 gradients."""
    return terms.call(gather_kv_attention, q, k, v)


attention = attention_function(__name__, _compute)


class GatherKV(Strategy):
    """All keys and values to every rank."""

    name = "gather_kv"
    merges_partial_softmaxes = True
    balanced_by_zigzag = True
    attention = staticmethod(attention)

    def formulas(self) -> dict[str, sympy.Expr]:
        elements = (strategy.P - 1) * strategy.B * strategy.K * strategy.t * (strategy.D + strategy.V)
        return {
            "forward_bytes": elements * strategy.e,
            "backward_bytes": elements * (strategy.e + strategy.a),
            "forward_messages": sympy.Integer(1),
            "backward_messages": sympy.Integer(2),
        }

    def opaque(self, site: Site, group_size: int, layout: Layout) -> dict[str, Traffic]:
        """The backward gathers again, and reduces the gradients of all keys."""
        cost = self.cost(site, group_size, layout)
        home = Traffic(cost.backward_messages - cost.forward_messages, cost.backward_bytes - cost.forward_bytes)
        return {"all_gather": Traffic(2 * cost.forward_messages, 2 * cost.forward_bytes), "reduce_scatter": home}


def _forward(call: Call, work: Forward) -> None:
    for rank, shard in enumerate(_gather("gather_kv_attention", call)):
        k, v = unpack(shard, call.k, call.v)
        work.add(k, v, call.keys_of(rank))


def _backward(call: Call, work: Backward, _: Tensor) -> tuple[Tensor, Tensor]:
    op = "gather_kv_attention_backward"
    gathered = _gather(op, call)
    grads = torch.zeros_like(gathered, dtype=work.dq.dtype)
    for rank, (shard, grad) in enumerate(zip(gathered, grads, strict=True)):
        (k, v), (dk, dv) = unpack(shard, call.k, call.v), unpack(grad, call.k, call.v)
        work.add(k, v, call.keys_of(rank), dk, dv)
    own = grads[0] if call.group.size == 1 else sum_shards(op, call.group, grads)
    dk, dv = unpack(own, call.k, call.v)
    # An op's results must not share memory.
    return dk.clone(), dv.clone()


def _gather(op: str, call: Call) -> Tensor:
    """Packed K and V of all ranks, [P, n]."""
    shard = pack(call.k, call.v)
    return shard[None] if call.group.size == 1 else gather_shards(op, call.group, shard)


gather_kv_attention = attention_op("gather_kv_attention", _forward, _backward)
