"""Operators on sharded rows that are not the same operator on fewer rows: losses, dropout, sums beside padding.

The rows past a sequence's end are padding: they hold finite values that must not count. Each function here masks them.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from autoseq.runtime.collectives import all_reduce, sharded_rows
from autoseq.runtime.groups import group_of
from autoseq.runtime.hashing import mix
from autoseq.runtime.layout import Layout, rank_positions

Reduction = Literal["none", "mean", "sum"]


def valid_rows(x: Tensor, *, dim: int, outer: int, length: int, local: int, layout: Layout, group: str) -> Tensor:
    """Which rows of x's dim `dim`, (outer, rows, inner), are no padding: bool, broadcastable to x."""
    member = group_of(group)
    positions = rank_positions(member.rank, member.size, local, layout, x.device)
    inner = x.shape[dim] // (outer * local)
    along = (positions < length)[None, :, None].expand(outer, local, inner).reshape(-1)
    return along.reshape([-1] + [1] * (x.dim() - 1 - dim % x.dim()))


def zero_padding(x: Tensor, *, dim: int, outer: int, length: int, local: int, layout: Layout, group: str) -> Tensor:
    """x with zeros in its padding rows, so that a sum over rows counts the valid ones."""
    valid = valid_rows(x, dim=dim, outer=outer, length=length, local=local, layout=layout, group=group)
    return torch.where(valid, x, torch.zeros((), dtype=x.dtype, device=x.device))


def drop_last_rows(x: Tensor, *, dim: int, outer: int, length: int, local: int, layout: Layout, group: str) -> Tensor:
    """x with only its first `length` rows valid: the rows behind become padding, copies of row `length` - 1.

    They keep no values of their own, because a value that the program dropped may be one that nothing can be computed from
    (an infinite weight, an id out of range). Sends one row, summed over ranks.
    """
    sharded = sharded_rows(x, dim, outer, length, local, layout, group)
    positions = rank_positions(sharded.group.rank, sharded.group.size, local, layout, x.device)[:, None]
    opened = sharded.open(x, local)
    mine = torch.where(positions == length - 1, opened.detach(), torch.zeros((), dtype=x.dtype, device=x.device))
    wire = _summable(mine)
    last = all_reduce(wire.sum(1, keepdim=True, dtype=wire.dtype), group=group).to(x.dtype)
    return sharded.close(torch.where(positions < length, opened, last), x, local, local)


def few_rows(
    x: Tensor, *, start: int, count: int, dim: int, outer: int, length: int, local: int, layout: Layout, group: str
) -> Tensor:
    """The rows [start, start + count) of the whole sequence, on every rank: Shard -> Replicate.

    A sum over ranks to which each adds the rows it has: sends `count` rows twice, where a gather would send them all.
    """
    sharded = sharded_rows(x, dim, outer, length, local, layout, group)
    positions = rank_positions(sharded.group.rank, sharded.group.size, local, layout, x.device)
    wanted = positions == torch.arange(start, start + count, device=x.device)[:, None]
    have, where = wanted.to(torch.uint8).max(1)
    mine = sharded.open(x, local).index_select(1, where)
    mine = torch.where(have[:, None] != 0, mine, torch.zeros((), dtype=x.dtype, device=x.device))
    return sharded.close(all_reduce(_summable(mine), group=group).to(x.dtype), x, local, count)


def _summable(x: Tensor) -> Tensor:
    """x in a dtype that sums over ranks have and that holds it exactly."""
    if x.dtype in (torch.bool, torch.int16):
        return x.to(torch.uint8 if x.dtype == torch.bool else torch.int32)
    return x.float() if x.is_floating_point() and x.element_size() == 1 else x


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    reduction: Reduction,
    ignore_index: int,
    label_smoothing: float,
    dim: int,
    outer: int,
    length: int,
    local: int,
    layout: Layout,
    group: str,
) -> Tensor:
    """`F.cross_entropy` over rows of which this rank holds a part: logits [N, C] or [B, C, d…], target [N] or [B, d…].

    The keywords from `dim` on say how `target`'s rows are sharded. "mean" is the sum over all ranks' valid targets over
    their total weight (the count, without class weights), as one device divides it: a rank with no valid target adds
    nothing, and only a batch without any gives NaN. Sends a pair of scalars ("mean"), one ("sum") or nothing ("none").
    """
    valid = valid_rows(target, dim=dim, outer=outer, length=length, local=local, layout=layout, group=group)
    loss = partial(F.cross_entropy, label_smoothing=label_smoothing)
    return _class_loss(loss, logits, torch.where(valid, target, ignore_index), weight, reduction, ignore_index, group)


def nll_loss(
    log_probabilities: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    reduction: Reduction,
    ignore_index: int,
    dim: int,
    outer: int,
    length: int,
    local: int,
    layout: Layout,
    group: str,
) -> Tensor:
    """`F.nll_loss` over rows of which this rank holds a part, as `cross_entropy`."""
    valid = valid_rows(target, dim=dim, outer=outer, length=length, local=local, layout=layout, group=group)
    return _class_loss(
        F.nll_loss, log_probabilities, torch.where(valid, target, ignore_index), weight, reduction, ignore_index, group)


def _class_loss(
    loss: Callable[..., Tensor], logits: Tensor, target: Tensor, weight: Tensor | None, reduction: Reduction, ignore_index: int, group: str
) -> Tensor:
    if reduction == "none":
        return loss(logits, target, weight, ignore_index=ignore_index, reduction="none")
    total = loss(logits, target, weight, ignore_index=ignore_index, reduction="sum")
    wide = total.float() if total.dtype in (torch.float16, torch.bfloat16) else total
    if reduction == "sum":
        return all_reduce(wide, group=group).to(total.dtype)
    counted = target != ignore_index
    weights = counted if weight is None else weight.detach()[torch.where(counted, target, 0)] * counted
    sums = all_reduce(torch.stack([wide, weights.sum().to(wide.dtype)]), group=group)
    return (sums[0] / sums[1]).to(total.dtype)


def dropout(x: Tensor, p: float, *, group: str) -> Tensor:
    """Dropout on a shard: each rank draws its own mask, and every rank's generator moves on by the same amount.

    One seed is drawn from the global generator, the same on all ranks as long as they were seeded alike; the mask is a
    hash of (seed, rank, element), so that it needs no second generator and is the same when it is recomputed.
    """
    seed = torch.randint(0, 2**31 - 1, (), device=x.device)
    element = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    bits = mix(mix(element + group_of(group).rank * 0x632BE5A7) + seed)
    keep = bits >= int(p * 2**32)
    return torch.where(keep, x / (1 - p) if p < 1 else x * 0, torch.zeros((), dtype=x.dtype, device=x.device))
