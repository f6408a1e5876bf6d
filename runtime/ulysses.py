"""Ulysses: sequence for heads, and back (Jacobs et al., "DeepSpeed Ulysses", arXiv:2309.14509).

One packed all-to-all gives each rank all rows of its share of the heads, whole attention runs there, and one all-to-all brings
the rows home. Any number of heads works: query heads are split as evenly as they go, some ranks may get none, and a rank
receives just the KV heads its query heads use, so grouped heads travel once unless several ranks need them (P > K).

The exchange is ATen and functional collectives, which AOTAutograd differentiates and Inductor sees; only the attention in the
middle is an opaque op, the same one as `local`'s.
"""

from __future__ import annotations

from math import prod
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.autograd import Function

from autoseq.runtime import strategy
from autoseq.runtime.attention_op import check_inputs
from autoseq.runtime.collectives import all_to_all_single
from autoseq.runtime.groups import group_of
from autoseq.runtime.kernels import accumulate_dtype
from autoseq.runtime.layout import Layout, to_global, to_ranked
from autoseq.runtime.local import whole_attention
from autoseq.runtime.strategy import Site, Strategy

HeadRange = tuple[int, int]
"""Global head indices [start, end)."""


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
    """Attention of this rank's q [B,H,s,D] to all ranks' k [B,K,t,D], v [B,K,t,Dv]: out [B,H,s,Dv].

    With evenly split heads it sends (P-1)/P of q, out and the KV heads (times max(1, P/K)); backward the same.
    Raises UnsupportedError for a bias that needs a gradient.
    """
    check_inputs(q, k, bias)
    seq = group_of(group)
    P, heads = seq.size, [query_heads(rank, seq.size, q.shape[1]) for rank in range(seq.size)]
    ratio = q.shape[1] // k.shape[1]
    kv_heads = [covering_kv_heads(each, ratio) for each in heads]
    mine, mine_kv = heads[seq.rank], kv_heads[seq.rank]

    received = all_to_all_single(
        _PackHeads.apply(q, k, v, heads, kv_heads),
        send_sizes=[_packed_size(q, k, v, *each) for each in zip(heads, kv_heads, strict=True)],
        recv_sizes=[_packed_size(q, k, v, mine, mine_kv)] * P,
        group=group,
    )
    whole = [to_global(rows, 2, P, layout) for rows in _unpack_rows(received, P, q, k, v, _count(mine), _count(mine_kv))]
    # The rows are in global order now, so the op sees them as one contiguous chunk with padding at the end.
    settings = (scale, max_ahead, max_behind, predicate, q_len, k_len, mine[0], ratio, "contiguous", "")
    out = whole_attention(*whole, captures, bias, *settings)[0]
    return _return_rows(to_ranked(out, 2, P, layout), heads, mine, group)


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


class _PackHeads(Function):
    """One flat buffer with, for each rank in turn, its heads of q, k and v.

    A KV head may go to several ranks. Its gradients are summed here in float32: autograd would add them in q's dtype, and the
    error of bfloat16 would grow with P / K.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: list[HeadRange], kv_heads: list[HeadRange]
    ) -> Tensor:
        ctx.shapes, ctx.ranges = (q.shape, k.shape, v.shape), (heads, kv_heads, kv_heads)
        per_rank = zip(heads, kv_heads, strict=True)
        parts = [x[:, a:b].reshape(-1) for own, own_kv in per_rank for x, (a, b) in ((q, own), (k, own_kv), (v, own_kv))]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        totals = [grad.new_zeros(shape, dtype=accumulate_dtype(grad.dtype)) for shape in ctx.shapes]
        targets = [
            total[:, a:b] for each in zip(*ctx.ranges, strict=True) for total, (a, b) in zip(totals, each, strict=True)
        ]
        pieces = grad.split([target.numel() for target in targets])
        for target, piece in zip(targets, pieces, strict=True):
            target.add_(piece.view(target.shape))
        return *(total.to(grad.dtype) for total in totals), None, None


def _count(heads: HeadRange) -> int:
    return heads[1] - heads[0]


def _packed_size(q: Tensor, k: Tensor, v: Tensor, heads: HeadRange, kv_heads: HeadRange) -> int:
    per_head, per_kv_head = q.shape[2] * q.shape[3], k.shape[2] * (k.shape[3] + v.shape[3])
    return q.shape[0] * (_count(heads) * per_head + _count(kv_heads) * per_kv_head)


def _unpack_rows(received: Tensor, P: int, q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int) -> list[Tensor]:
    """q, k, v as [B, heads, P*rows, dim] with rank-major rows, from what the ranks sent."""
    shapes = [(x.shape[0], count, *x.shape[2:]) for x, count in ((q, heads), (k, kv_heads), (v, kv_heads))]
    parts = received.view(P, -1 if heads else 0).split([prod(shape) for shape in shapes], 1)
    opened = [part.unflatten(1, shape).permute(1, 2, 0, 3, 4) for part, shape in zip(parts, shapes, strict=True)]
    # An explicit copy: whether a reshape copies must not depend on symbolic sizes.
    return [x.clone(memory_format=torch.contiguous_format).flatten(2, 3) for x in opened]


def _return_rows(out: Tensor, heads: list[HeadRange], mine: HeadRange, group: str) -> Tensor:
    """All heads of this rank's rows, from all rows (rank-major, [B,h,P*s,Dv]) of its heads."""
    P, batch, value_dim = len(heads), out.shape[0], out.shape[3]
    local = out.shape[2] // P
    rows = out.unflatten(2, (P, local)).permute(2, 0, 1, 3, 4).clone(memory_format=torch.contiguous_format)
    recv_sizes = [batch * _count(each) * local * value_dim for each in heads]
    send_sizes = [batch * _count(mine) * local * value_dim] * P
    flat = all_to_all_single(rows.view(-1), send_sizes=send_sizes, recv_sizes=recv_sizes, group=group)
    pieces = zip(flat.split(recv_sizes), heads, strict=True)
    return torch.cat([piece.view(batch, _count(each), local, value_dim) for piece, each in pieces], 1)
