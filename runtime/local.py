"""Local: the whole sequence on one rank. Nothing is sent.

It serves P = 1 and attention whose sequence is not sharded; `ulysses` runs the same op on its share of the heads, and strategies of
two levels run it where there is one rank.
"""

from __future__ import annotations

import sympy
from torch import Tensor

from autoseq.runtime.attention_call import Terms, attention_function
from autoseq.runtime.attention_op import attention_op
from autoseq.runtime.blockwise import Backward, Forward
from autoseq.runtime.op_call import Call
from autoseq.runtime.strategy import Site, Strategy


def _compute(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    # With one rank both layouts hold the rows in global order.
    return terms.call_on_all_rows(whole_attention, q, k, v)


attention = attention_function(__name__, _compute)


class Local(Strategy):
    """Whole attention on one rank."""

    name = "local"
    attention = staticmethod(attention)

    def cannot_serve(self, site: Site, group_size: int) -> str | None:
        if group_size > 1:
            return f"local attention needs the whole sequence on one rank, but it is split over {group_size}; use another strategy"
        return super().cannot_serve(site, group_size)

    def formulas(self) -> dict[str, sympy.Expr]:
        zero = sympy.Integer(0)
        return {"forward_bytes": zero, "backward_bytes": zero, "forward_messages": zero, "backward_messages": zero}


def _forward(call: Call, work: Forward) -> None:
    work.add(call.k, call.v, call.all_keys)


def _backward(call: Call, work: Backward, _: Tensor) -> tuple[Tensor, Tensor]:
    dk, dv = (x.new_zeros(x.shape, dtype=work.dq.dtype) for x in (call.k, call.v))
    work.add(call.k, call.v, call.all_keys, dk, dv)
    return dk, dv


whole_attention = attention_op("whole_attention", _forward, _backward)
