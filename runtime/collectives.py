"""The collectives the compiler inserts, each with its transpose as gradient.

They are plain functions over `torch.autograd.Function`s over functional collectives, so they run eagerly and AOTAutograd
traces them in both directions. The pairs are those of JAX's `shard_map` (Replicate, Shard, Partial; `vary` is its `pvary`):

    take_shard          Replicate -> Shard                          gradient: all_gather
    all_gather          Shard -> Replicate                          gradient: take_shard, zeros in the padding
    vary, vary_many     Replicate -> used beside sharded values     gradient: all_reduce (and of that: vary)
    share_gradient      Replicate -> Replicate                      gradient: a P-th of it, to be summed later
    all_reduce          Partial -> Replicate                        gradient: identity
    all_gather_varying  Shard -> full copy used per rank            gradient: reduce_scatter, zeros in the padding
    reduce_scatter      Partial -> Shard                            gradient: all_gather_varying
    all_to_all_single   flat buffer, sizes per rank                 gradient: itself with the sizes swapped

A sharded dim is described by keywords. `dim` is the tensor dim; it may be a composite (`outer`, rows, inner), of which the
rows are sharded. `length` is the number of valid rows n in all, `local` the padded rows s per rank (s*P >= n). Both may be
symbolic. Padding is the end of the global order. Coming into a shard it repeats row n-1, so that a padded row is finite
whenever a real one is; a gradient that comes in gets zeros there instead, because repeating would count row n-1 twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import Function

from autoseq.runtime.groups import SequenceGroup, group_of
from autoseq.runtime.layout import Layout, chunk_ranges, rank_positions, to_global, to_ranked
from autoseq.runtime.messages import Described

_ops = torch.ops._c10d_functional

# What both gloo and NCCL carry. Other dtypes (int16, the float8s) are gathered as bytes; nothing but a gather moves them.
_WIRE_DTYPES = {
    torch.bool, torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64
}  # fmt: skip


def take_shard(x: Tensor, *, dim: int, outer: int, length: int, local: int, layout: Layout, group: str) -> Tensor:
    """This rank's rows of a replicated x: Replicate -> Shard. Sends nothing; its gradient is all-gathered."""
    rows = sharded_rows(x, dim, outer, length, local, layout, group)
    return x if rows.whole else _TakeShard.apply(x, rows, True)


def all_gather(x: Tensor, *, dim: int, outer: int, length: int, local: int, layout: Layout, group: str) -> Tensor:
    """All valid rows in global order: Shard -> Replicate. Sends (P-1) shards; its gradient moves nothing."""
    rows = sharded_rows(x, dim, outer, length, local, layout, group)
    return x if rows.whole else _AllGather.apply(x, rows)


def all_gather_varying(x: Tensor, *, dim: int, outer: int, length: int, local: int, layout: Layout, group: str) -> Tensor:
    """As all_gather, for a copy that each rank uses differently: the copies' gradients are summed by a reduce_scatter."""
    rows = sharded_rows(x, dim, outer, length, local, layout, group)
    return x if rows.whole else _AllGatherVarying.apply(x, rows)


def reduce_scatter(x: Tensor, *, dim: int, outer: int, length: int, local: int, layout: Layout, group: str) -> Tensor:
    """This rank's rows of the sum of the ranks' x, which has all n rows: Partial -> Shard. Sends P-1 shards."""
    rows = sharded_rows(x, dim, outer, length, local, layout, group)
    return x if rows.whole else _ReduceScatter.apply(x, rows, True)


def vary(x: Tensor, *, group: str) -> Tensor:
    """x itself, about to be used beside sharded values: its gradients are summed over the ranks."""
    return vary_many([x], group=group)[0]


def vary_many(xs: list[Tensor], *, group: str) -> list[Tensor]:
    """`vary` for a bucket: one all_reduce per dtype in the backward. A value that got no gradient has none afterwards."""
    # A frozen value must stay out: one function's outputs all require grad, and its gradient would be computed for nothing.
    wanted = [i for i, x in enumerate(xs) if x.requires_grad]
    if group_of(group).size == 1 or not wanted:
        return list(xs)
    varied = dict(zip(wanted, _Vary.apply(group, *(xs[i] for i in wanted)), strict=True))
    return [varied.get(i, x) for i, x in enumerate(xs)]


def share_gradient(x: Tensor, *, group: str) -> Tensor:
    """x itself, used alike on every rank: each gets a P-th of its gradient, so that the ranks' gradients add up to it."""
    return x if group_of(group).size == 1 else _ShareGradient.apply(x, group_of(group).size)


def all_reduce(x: Tensor, *, group: str) -> Tensor:
    """The sum of the ranks' x: Partial -> Replicate. Sends 2(P-1)/P of x; its gradient moves nothing."""
    return x if group_of(group).size == 1 else _AllReduce.apply(x, group)


def all_to_all_single(x: Tensor, *, send_sizes: list[int], recv_sizes: list[int], group: str) -> Tensor:
    """Rank i gets the i-th piece of the flat buffer x; the result is what the ranks sent here, in rank order.

    Sizes are in elements, one per rank; they add up to x's length and to the result's.
    """
    return x if group_of(group).size == 1 else _AllToAll.apply(x, list(send_sizes), list(recv_sizes), group)


def own_rows(x: Tensor, rows: ShardedRows) -> Tensor:
    """This rank's rows of a replicated x, zeros in the padding. Its gradient is all-gathered."""
    return x if rows.whole else _TakeShard.apply(x, rows, False)


@dataclass(frozen=True, slots=True)
class ShardedRows:
    """A sharded dim and the group it is sharded over: what each collective does, without gradients.

    It works on tensors seen as [A, rows, C]. Deferred outputs gather themselves through it.
    """

    dim: int
    outer: int
    length: int
    local: int
    layout: Layout
    group: SequenceGroup

    @property
    def whole(self) -> bool:
        """The only rank holds every row and no padding, so a shard is the full value."""
        return self.group.size == 1 and self.local == self.length

    def open(self, x: Tensor, rows: int) -> Tensor:
        """x as [A, rows, C], where A holds all that lies outside the rows and C all that lies inside."""
        leading = prod(x.shape[: self.dim]) * self.outer
        trailing = self._inner(x, rows) * prod(x.shape[self.dim + 1 :])
        return x.reshape(leading, rows, trailing)

    def close(self, opened: Tensor, x: Tensor, rows: int, new_rows: int) -> Tensor:
        """[A, new_rows, C] in the shape of x, whose dim held `rows` rows."""
        size = self.outer * new_rows * self._inner(x, rows)
        return opened.reshape(*x.shape[: self.dim], size, *x.shape[self.dim + 1 :])

    def take(self, x: Tensor, edge: bool) -> Tensor:
        """The rows of this rank; padding repeats the last row or is zero."""
        positions = rank_positions(self.group.rank, self.group.size, self.local, self.layout, x.device)
        shard = self._pick(self.open(x, self.length), positions, edge)
        return self.close(shard, x, self.length, self.local)

    def gather(self, x: Tensor) -> Tensor:
        """All valid rows in global order."""
        opened = self.open(x, self.local)
        P, (leading, _, trailing) = self.group.size, opened.shape
        everyone = _all_gather_bits(opened, self.group).permute(1, 0, 2, 3).reshape(leading, P * self.local, trailing)
        valid = to_global(everyone, 1, P, self.layout).narrow(1, 0, self.length)
        return self.close(_packed(valid), x, self.local, self.length)

    def scatter_sum(self, x: Tensor, edge: bool) -> Tensor:
        """The rows of this rank of the sum over ranks."""
        P, opened = self.group.size, self.open(x, self.length)
        positions = to_ranked(torch.arange(P * self.local, device=x.device), 0, P, self.layout)
        pieces = self._pick(opened, positions, edge).unflatten(1, (P, self.local)).transpose(0, 1)
        return self.close(_reduce_scatter_sum(pieces, self.group), x, self.length, self.local)

    def trim(self, shard: Tensor) -> Tensor:
        """A shard without its padding, which stands at the end of every rank's rows."""
        ranges = chunk_ranges(self.group.rank, self.group.size, self.local, self.length, self.layout)
        valid = sum(rows for _, _, rows in ranges)
        return self.close(self.open(shard, self.local).narrow(1, 0, valid), shard, self.local, valid)

    def _inner(self, x: Tensor, rows: int) -> int:
        # Without rows there is nothing to share out: any inner size describes the empty dim.
        around = self.outer * rows
        return 1 if around == 0 else x.shape[self.dim] // around

    def _pick(self, opened: Tensor, positions: Tensor, edge: bool) -> Tensor:
        picked = opened.index_select(1, positions.clamp(max=self.length - 1))
        return picked if edge else picked.masked_fill((positions >= self.length)[:, None], 0)


def sharded_rows(
    x: Tensor, dim: int, outer: int, length: int, local: int, layout: Layout, group: str
) -> ShardedRows:
    """The sharded dim of x, described by the keywords of the collectives."""
    return ShardedRows(dim % x.ndim, outer, length, local, layout, group_of(group))


class _TakeShard(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: ShardedRows, edge: bool) -> Tensor:
        ctx.rows = rows
        return rows.take(x, edge)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _AllGather.apply(grad, ctx.rows), None, None


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: ShardedRows) -> Tensor:
        ctx.rows = rows
        return _of_its_own(rows.gather(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _TakeShard.apply(grad, ctx.rows, False), None


class _AllGatherVarying(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: ShardedRows) -> Tensor:
        ctx.rows = rows
        return _of_its_own(rows.gather(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ReduceScatter.apply(grad, ctx.rows, False), None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: ShardedRows, edge: bool) -> Tensor:
        ctx.rows = rows
        return rows.scatter_sum(x, edge)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _AllGatherVarying.apply(grad, ctx.rows), None, None


class _Vary(Function):
    @staticmethod
    def forward(ctx: Any, group: str, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)
        # Saving the values would forbid to write into a parameter before its gradient is computed.
        ctx.like = [(x.shape, x.dtype, x.device) for x in xs]
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        buckets: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i in (i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed):
            buckets.setdefault(ctx.like[i][1:], []).append(i)
        sums: list[Tensor | None] = [None] * len(grads)
        for (dtype, device), indices in buckets.items():
            if all(grads[i] is None for i in indices):
                continue
            # Zeros travel for a value without a gradient, so that ranks' messages are of one size whatever they found. An optimizer
            # leaves a parameter without a gradient alone, and decays one whose gradient is zero: the value itself gets none.
            given = [torch.zeros(ctx.like[i][0], dtype=dtype, device=device) if (g := grads[i]) is None else g for i in indices]
            sum_up = _recorded_sums if torch.is_grad_enabled() else _sum_bucket
            for i, total in zip(indices, sum_up(given, ctx.group), strict=True):
                sums[i] = None if grads[i] is None else total
        return None, *sums


class _ShareGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, P: int) -> Tensor:
        ctx.P = P
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.P, None


class _AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _all_reduce_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Each rank's partial sum gets the one gradient; in a recorded backward it is a value used beside sharded ones.
        return (_Vary.apply(ctx.group, grad)[0] if torch.is_grad_enabled() else grad), None


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send_sizes: list[int], recv_sizes: list[int], group: str) -> Tensor:
        ctx.send_sizes, ctx.recv_sizes, ctx.group = send_sizes, recv_sizes, group
        with Described("all_to_all_single", group_of(group)):
            return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), recv_sizes, send_sizes, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, ctx.recv_sizes, ctx.send_sizes, ctx.group), None, None, None


def _sum_bucket(grads: list[Tensor], group: str) -> list[Tensor]:
    if len(grads) == 1:
        return [_all_reduce_sum(grads[0], group)]
    total = _all_reduce_sum(torch.cat([grad.reshape(-1) for grad in grads]), group)
    pieces = total.split([grad.numel() for grad in grads])
    return [piece.view(grad.shape) for piece, grad in zip(pieces, grads, strict=True)]


def _recorded_sums(grads: list[Tensor], group: str) -> list[Tensor]:
    """The sums in a backward that is differentiated again."""
    return [_AllReduce.apply(grad, group) for grad in grads]


def _all_reduce_sum(x: Tensor, group: str) -> Tensor:
    with Described("all_reduce", group_of(group)):
        return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group))


def _of_its_own(x: Tensor) -> Tensor:
    """x as no view: autograd would forbid to write into it, and AOTAutograd would take views of it anew from what x is a view of."""
    x = x.detach()
    return FunctionalTensor.to_functional(x.from_functional()) if isinstance(x, FunctionalTensor) else x


def _packed(x: Tensor) -> Tensor:
    # Traced with symbolic sizes, a later reshape would be a view or a copy as the example's padding had it: settle it here.
    symbolic = any(isinstance(size, torch.SymInt) for size in x.shape)
    return x.clone(memory_format=torch.contiguous_format) if symbolic else x


def _all_gather_bits(x: Tensor, group: SequenceGroup) -> Tensor:
    """x of every rank, stacked in front."""
    if group.size == 1:
        return x.unsqueeze(0)
    if x.dtype not in _WIRE_DTYPES:
        return _all_gather_bits(x.contiguous().view(torch.uint8), group).view(x.dtype)
    with Described("all_gather", group):
        gathered = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), group.size, group.name))
    return gathered.view(group.size, *x.shape)


def _reduce_scatter_sum(pieces: Tensor, group: SequenceGroup) -> Tensor:
    """The sum over ranks of the piece that each has for this rank; pieces are stacked in front."""
    if group.size == 1:
        return pieces.squeeze(0)
    flat = pieces.contiguous().flatten(0, 1)
    with Described("reduce_scatter", group):
        return _ops.wait_tensor(_ops.reduce_scatter_tensor(flat, "sum", group.size, group.name))
