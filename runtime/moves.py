"""Rows that change their place in the sequence: laying sequences end to end, cutting pieces out, shifting.

    joined = cat([text, image], 1)        text: Shard of 77 rows, image: Shard of 4096      →     Shard of 4173
    later  = joined[:, 77:]               Shard of 4173                                     →     Shard of 4096

Each row goes straight from the rank that has it to the rank that needs it, in one all-to-all a sharded part; a gather would
send it to every rank. Lengths are plain ints: the sizes of the messages follow from them.

What a rank sends depends on the rank, so the exchange is one opaque operator: a compiler that saw into it would make other graphs
of it on every rank, order them differently, and have the ranks wait for each other's messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from autoseq.runtime.collectives import ShardedRows, all_to_all_single, sharded_rows
from autoseq.runtime.groups import group_of
from autoseq.runtime.layout import chunk_ranges, rank_positions
from autoseq.runtime.traffic import Traffic, all_to_all_traffic

Piece = tuple[int, int, int, int]
"""(part, start, at, count): rows [start, start + count) of a part become rows [at, at + count) of the result."""

Shard = tuple[int, int]
"""(length, local): the valid rows of a sharded part in all, and its padded rows per rank."""


def arrange_rows(
    parts: list[Tensor],
    *,
    pieces: Sequence[Piece],
    shards: Sequence[Shard | None],
    fill: float,
    dim: int,
    outer: int,
    length: int,
    local: int,
    layout: Any,
    group: str,
) -> Tensor:
    """This rank's rows of the sequence of `length` rows that the pieces make up; rows of no piece hold `fill`.

    The rows are all of dim `dim` (`outer` is 1). A part whose entry in `shards` is None is whole on every rank, and varied.
    Padding repeats a row of a part. Sends each moved row once, and one row more to a rank that has only padding; the gradient
    sends the rows back.
    """
    result = sharded_rows(parts[0], dim, outer, length, local, layout, group)
    positions = rank_positions(result.group.rank, result.group.size, local, layout, parts[0].device)
    made, covered = None, positions >= length
    for index, (part, shard) in enumerate(zip(parts, shards, strict=True)):
        mine = [(start, at, count) for number, start, at, count in pieces if number == index and count]
        if not mine:
            continue
        brought = _taken(part, mine, positions, result) if shard is None else _moved(part, mine, shard, result)
        here = _within(mine, positions)
        made = brought if made is None else torch.where(_beside(here, made, dim), brought, made)
        covered = covered | here
    assert made is not None
    if _all_covered(pieces, length):
        return made
    return torch.where(_beside(covered, made, dim), made, torch.full((), fill, dtype=made.dtype, device=made.device))


def _all_covered(pieces: Sequence[Piece], length: int) -> bool:
    return sum(count for _, _, _, count in pieces) == length


def _within(pieces: Sequence[tuple[int, int, int]], positions: Tensor) -> Tensor:
    within = torch.zeros_like(positions, dtype=torch.bool)
    for _, at, count in pieces:
        within = within | ((positions >= at) & (positions < at + count))
    return within


def _beside(rows: Tensor, x: Tensor, dim: int) -> Tensor:
    """A value a row, broadcastable to x."""
    return rows.reshape([-1] + [1] * (x.dim() - 1 - dim % x.dim()))


def _taken(part: Tensor, pieces: Sequence[tuple[int, int, int]], positions: Tensor, result: ShardedRows) -> Tensor:
    """Rows of a part that is whole here; what is not asked for is a copy of some row of it."""
    wanted = torch.zeros_like(positions)
    for start, at, count in pieces:
        wanted = torch.where((positions >= at) & (positions < at + count), positions - at + start, wanted)
    return part.index_select(result.dim, wanted)


def _moved(part: Tensor, pieces: Sequence[tuple[int, int, int]], shard: Shard, result: ShardedRows) -> Tensor:
    flat = [number for piece in pieces for number in piece]
    target = (result.length, result.local)
    return torch.ops.autoseq.move_rows(part, result.dim, [*shard], [*target], flat, True, result.layout, result.group.name)


@torch.library.custom_op("autoseq::move_rows", mutates_args=())
def move_rows(
    x: Tensor, dim: int, source: list[int], target: list[int], pieces: list[int], spare: bool, layout: str, group: str
) -> Tensor:
    """The exchange: rows [start, start + count) of x's sequence become rows [at, …) of another, for each triple in `pieces`.

    `source` and `target` are (length, local rows) of the two. Rows that none comes to repeat one that does (`spare`) or are zero.
    """
    return _plan(dim, source, target, pieces, spare, layout, group).run(x).contiguous()


@move_rows.register_fake
def _(x: Tensor, dim: int, source: list[int], target: list[int], pieces: list[int], spare: bool, layout: str, group: str) -> Tensor:
    return x.new_empty((*x.shape[:dim], target[1], *x.shape[dim + 1 :]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[1:]


def _move_back(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradient goes back the way the rows came, and is zero where none went."""
    dim, source, target, pieces, _, layout, group = ctx.settings
    back = [number for start, at, count in _triples(pieces) for number in (at, start, count)]
    return torch.ops.autoseq.move_rows(grad, dim, target, source, back, False, layout, group), *(None,) * 7


move_rows.register_autograd(_move_back, setup_context=_save)


def move_traffic(x: Tensor, dim: int, *settings: Any) -> Traffic:
    """What this rank sends in one `move_rows`."""
    plan = _plan(dim, *settings)
    row = x.numel() // x.shape[dim] * x.element_size()
    return all_to_all_traffic([row * _rows(runs) for runs in plan.sends], plan.source.group.rank)


def _triples(numbers: list[int]) -> tuple[tuple[int, int, int], ...]:
    return tuple((numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(0, len(numbers), 3))


def _plan(dim: int, source: list[int], target: list[int], pieces: list[int], spare: bool, layout: Any, group: str) -> _Plan:
    member = group_of(group)
    here, there = (ShardedRows(dim, 1, length, local, layout, member) for length, local in (source, target))
    return _Plan.of(here, there, _triples(pieces), spare)


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows that lie together on both ranks: from local row `here` of one to local row `there` of the other."""

    here: int
    there: int
    count: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which rows this rank sends to each rank and gets from each; `spare`: the rows that no row comes to repeat one that does."""

    source: ShardedRows
    result: ShardedRows
    sends: list[list[_Run]]
    receives: list[list[_Run]]
    spare: bool

    @staticmethod
    def of(source: ShardedRows, result: ShardedRows, pieces: tuple[tuple[int, int, int], ...], spare: bool) -> _Plan:
        P, rank = source.group.size, source.group.rank
        sends = [_runs(source, rank, result, other, pieces) for other in range(P)]
        receives = [_runs(source, other, result, rank, pieces) for other in range(P)]
        if spare:
            every = [[_runs(source, giver, result, taker, pieces) for taker in range(P)] for giver in range(P)]
            needy = [not any(every[giver][taker] for giver in range(P)) for taker in range(P)]
            giver, row = next((giver, runs[0].here) for giver in range(P) for runs in every[giver] if runs)
            extra = [_Run(row, 0, 1)]
            sends = [extra if needy[taker] and giver == rank else runs for taker, runs in enumerate(sends)]
            receives = [extra if needy[rank] and giver == other else runs for other, runs in enumerate(receives)]
        return _Plan(source, result, sends, receives, spare)

    def run(self, x: Tensor) -> Tensor:
        opened = self.source.open(x, self.source.local)
        leading, _, trailing = opened.shape
        width = leading * trailing
        outgoing = [opened.narrow(1, run.here, run.count).reshape(-1) for runs in self.sends for run in runs]
        arrived = self._exchanged(torch.cat(outgoing) if outgoing else opened.new_empty(0), width)
        runs = [run for runs in self.receives for run in runs]
        blocks = [block.view(leading, run.count, trailing) for run, block in zip(
            runs, arrived.split([width * run.count for run in runs]), strict=True)]  # fmt: skip
        return self._close(self._laid_out(runs, blocks, opened), x)

    def _exchanged(self, buffer: Tensor, width: int) -> Tensor:
        """All ranks' outgoing rows to where they go; a dtype that is not sent as it is goes as its bytes."""
        sent = buffer if buffer.is_floating_point() and buffer.element_size() > 1 else buffer.view(torch.uint8)
        width *= buffer.element_size() // sent.element_size()
        arrived = all_to_all_single(
            sent, send_sizes=[width * _rows(runs) for runs in self.sends], recv_sizes=[width * _rows(runs) for runs in self.receives],
            group=self.source.group.name,
        )  # fmt: skip
        return arrived.view(buffer.dtype)

    def _laid_out(self, runs: list[_Run], blocks: list[Tensor], opened: Tensor) -> Tensor:
        """The arrived blocks in local order, with the gaps between them filled."""
        filler = blocks[-1][:, -1:] if self.spare else opened.new_zeros(opened.shape[0], 1, opened.shape[2])
        rows, end = [], 0
        for run, block in sorted(zip(runs, blocks, strict=True), key=lambda pair: pair[0].there):
            rows += [filler.expand(-1, run.there - end, -1), block]
            end = run.there + run.count
        rows.append(filler.expand(-1, self.result.local - end, -1))
        return torch.cat(rows, 1)

    def _close(self, opened: Tensor, x: Tensor) -> Tensor:
        outer, dim = self.result.outer, self.result.dim
        inner = opened.shape[2] // max(1, prod(x.shape[dim + 1 :]))
        return opened.reshape(*x.shape[:dim], outer * self.result.local * inner, *x.shape[dim + 1 :])


def _rows(runs: list[_Run]) -> int:
    return sum(run.count for run in runs)


def _runs(source: ShardedRows, giver: int, result: ShardedRows, taker: int, pieces: tuple[tuple[int, int, int], ...]) -> list[_Run]:
    """The rows that go from one rank to another, in the order in which they are sent."""
    P, layout, found = source.group.size, source.layout, []
    for start, at, count in pieces:
        for here, first, rows in chunk_ranges(giver, P, source.local, source.length, layout):
            for there, new_first, new_rows in chunk_ranges(taker, P, result.local, result.length, layout):
                begin = max(first, start, new_first - at + start)
                end = min(first + rows, start + count, new_first + new_rows - at + start)
                if begin < end:
                    found.append(_Run(here + begin - first, there + begin - start + at - new_first, end - begin))
    return found
