"""Trades heads for rows between the ranks: the two all-to-alls of Ulysses, each the other's transpose.

    to_rows    [B, all heads, my rows, D]  ->  [B, my heads, all rows, D]    gradient: to_heads, shared heads summed
    to_heads   [B, my heads, all rows, D]  ->  [B, all heads, my rows, D]    gradient: to_rows

Several tensors travel packed in one message. The collective is a functional one, which AOTAutograd and Inductor see; packing and
unpacking are opaque ops, because with symbolic lengths their many small views cost seconds of compile time per attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from autoseq.runtime import fused, packing
from autoseq.runtime.groups import SequenceGroup
from autoseq.runtime.layout import Layout
from autoseq.runtime.packing import shapes_of
from autoseq.runtime.posted import Posted, post_all_to_all
from autoseq.runtime.stages import HeadRange, num_heads


@dataclass(frozen=True, slots=True)
class Exchange:
    """Which heads of each tensor go to which rank: `ranges[i][p]` of tensor i to rank p. They may overlap between ranks.

    The group may be a part of the ranks that share the sequence (`hybrid`). Its ranks are in the order of the shards they hold, and so
    the rows that come together are in ascending order of position in either layout: early chunks as the ranks, late ones the other way.

    `to_rows` and `to_heads` are whole exchanges with a gradient. The other methods are their halves, without one: what is posted
    travels until it is waited for.
    """

    ranges: list[list[HeadRange]]
    layout: Layout
    group: SequenceGroup

    def to_rows(self, *xs: Tensor) -> list[Tensor]:
        """All rows in global order (padding last) of this rank's heads, from all heads of this rank's rows. One message."""
        return list(_ToRows.apply(self, *xs))

    def to_heads(self, *ys: Tensor) -> list[Tensor]:
        """The inverse of `to_rows`; a head that several ranks hold comes back as their sum. One message."""
        return list(_ToHeads.apply(self, *ys))

    def post_rows(self, xs: Sequence[Tensor]) -> Posted:
        """Send the heads of this rank's rows to the ranks that compute them. What arrives is flat."""
        send_sizes = [sum(self._sent(i, p, prod(x.shape) // x.shape[1]) for i, x in enumerate(xs)) for p in range(self.group.size)]
        recv_sizes = [sum(prod(shape) for shape in self._pieces(xs))] * self.group.size
        return post_all_to_all(self.group, split_heads(list(xs), *self.bounds()), send_sizes, recv_sizes)

    def arrived_rows(self, flat: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
        """All rows of this rank's heads, from what arrived for `xs`."""
        return join_rows(flat, [size for shape in self._pieces(xs) for size in shape], self.group.size, self.layout)

    def post_heads(self, ys: Sequence[Tensor]) -> Posted:
        """Send the rows of this rank's heads to the ranks that hold them. What arrives is flat."""
        P = self.group.size
        recv_sizes = [sum(self._sent(i, p, prod(y.shape[2:]) * y.shape[0] // P) for i, y in enumerate(ys)) for p in range(P)]
        return post_all_to_all(self.group, split_rows(list(ys), P, self.layout), [sum(prod(y.shape) // P for y in ys)] * P, recv_sizes)

    def arrived_heads(self, flat: Tensor, ys: Sequence[Tensor]) -> list[Tensor]:
        """All heads of this rank's rows, from what arrived for `ys`."""
        shapes = [(y.shape[0], self.ranges[i][-1][1], y.shape[2] // self.group.size, y.shape[3]) for i, y in enumerate(ys)]
        return join_heads(flat, [size for shape in shapes for size in shape], *self.bounds())

    def trade_rows(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """`to_rows` without a gradient."""
        return self.arrived_rows(self.post_rows(xs).arrived(), xs)

    def trade_heads(self, ys: Sequence[Tensor]) -> list[Tensor]:
        """`to_heads` without a gradient."""
        return self.arrived_heads(self.post_heads(ys).arrived(), ys)

    def _pieces(self, xs: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """What comes from each rank."""
        own = [each[self.group.rank] for each in self.ranges]
        return [(x.shape[0], num_heads(heads), *x.shape[2:]) for x, heads in zip(xs, own, strict=True)]

    def _sent(self, i: int, rank: int, head_size: int) -> int:
        return num_heads(self.ranges[i][rank]) * head_size

    def bounds(self) -> tuple[list[int], list[int]]:
        """Starts and ends, tensor by tensor for rank 0, then for rank 1, ..."""
        flat = [bounds for per_rank in zip(*self.ranges, strict=True) for bounds in per_rank]
        return [start for start, _ in flat], [end for _, end in flat]


@dataclass(frozen=True, slots=True)
class Landed:
    """What arrived of one `post_heads`: of which of some tensors."""

    exchange: Exchange
    tensors: list[int]
    flat: Tensor


def landed_heads(arrivals: Sequence[Landed], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of the given shapes [B,H,s,D], from stages that brought some heads of some of them each."""
    if not arrivals:
        return []
    sizes = [size for shape in shapes for size in shape]
    if len(arrivals) == 1:
        return join_heads(arrivals[0].flat, sizes, *arrivals[0].exchange.bounds())
    starts, ends = ([bound for each in arrivals for bound in each.exchange.bounds()[i]] for i in (0, 1))
    tensors = [i for each in arrivals for _ in range(each.exchange.group.size) for i in each.tensors]
    return join_stages([each.flat for each in arrivals], sizes, tensors, starts, ends)


class _ToRows(Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange.trade_rows(xs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *ctx.exchange.trade_heads(grads)


class _ToHeads(Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *ys: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange.trade_heads(ys))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *ctx.exchange.trade_rows(grads)


@torch.library.custom_op("autoseq::split_heads", mutates_args=(), schema="(Tensor[] xs, int[] starts, int[] ends) -> Tensor")
def split_heads(xs: list[Tensor], starts: list[int], ends: list[int]) -> Tensor:
    """One flat buffer: for each rank in turn, its heads [start, end) of each [B,H,s,D]."""
    return fused.split_heads(xs, starts, ends)


@split_heads.register_fake
def _(xs: list[Tensor], starts: list[int], ends: list[int]) -> Tensor:
    sizes = [x.shape[0] * x.shape[2] * x.shape[3] for x in xs]
    return xs[0].new_empty(sum((b - a) * sizes[i % len(xs)] for i, (a, b) in enumerate(zip(starts, ends, strict=True))))


@torch.library.custom_op(
    "autoseq::join_heads", mutates_args=(), schema="(Tensor flat, SymInt[] sizes, int[] starts, int[] ends) -> Tensor[]"
)
def join_heads(flat: Tensor, sizes: list[int], starts: list[int], ends: list[int]) -> list[Tensor]:
    """The transpose of split_heads: tensors of the given sizes [B,H,s,D]; heads that came from several ranks are summed, in float32."""
    return fused.join_heads(flat, sizes, starts, ends)


@join_heads.register_fake
def _(flat: Tensor, sizes: list[int], starts: list[int], ends: list[int]) -> list[Tensor]:
    return [flat.new_empty(shape) for shape in shapes_of(sizes)]


@torch.library.custom_op(
    "autoseq::join_stages",
    mutates_args=(),
    schema="(Tensor[] flats, SymInt[] sizes, int[] tensors, int[] starts, int[] ends) -> Tensor[]",
)
def join_stages(flats: list[Tensor], sizes: list[int], tensors: list[int], starts: list[int], ends: list[int]) -> list[Tensor]:
    """`join_heads` from several buffers, one after the other: piece i is of heads [start, end) of tensor `tensors[i]`."""
    return packing.join_stages(flats, sizes, tensors, starts, ends)


@join_stages.register_fake
def _(flats: list[Tensor], sizes: list[int], tensors: list[int], starts: list[int], ends: list[int]) -> list[Tensor]:
    return [flats[0].new_empty(shape) for shape in shapes_of(sizes)]


@torch.library.custom_op(
    "autoseq::join_rows", mutates_args=(), schema="(Tensor flat, SymInt[] sizes, int P, str layout) -> Tensor[]"
)
def join_rows(flat: Tensor, sizes: list[int], P: int, layout: Layout) -> list[Tensor]:
    """Tensors [B,h,P*s,D] in global order, from the flat buffers of all ranks; sizes are each tensor's [B,h,s,D]."""
    return fused.join_rows(flat, sizes, P, layout)


@join_rows.register_fake
def _(flat: Tensor, sizes: list[int], P: int, layout: Layout) -> list[Tensor]:
    return [flat.new_empty((B, h, P * s, D)) for B, h, s, D in shapes_of(sizes)]


@torch.library.custom_op("autoseq::split_rows", mutates_args=(), schema="(Tensor[] ys, int P, str layout) -> Tensor")
def split_rows(ys: list[Tensor], P: int, layout: Layout) -> Tensor:
    """The inverse of join_rows: for each rank in turn, its rows of each [B,h,P*s,D]."""
    return fused.split_rows(ys, P, layout)


@split_rows.register_fake
def _(ys: list[Tensor], P: int, layout: Layout) -> Tensor:
    return ys[0].new_empty(sum(y.numel() for y in ys))
