"""The pieces that an attention is computed in: each block of each pair of chunks, for a run of heads, with its mask.

`blockwise` goes through them; `blocks` says where to cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from autoseq.runtime import blocks
from autoseq.runtime.blocks import Block, Chunk, Cuts
from autoseq.runtime.formula import Points
from autoseq.runtime.mask import BlockKind, Mask
from autoseq.runtime.score_facts import additive_terms, needs_whole_rows

EmptyRows = Literal["zero", "nan", "uniform", "nan_fill", "uniform_fill"]
"""What a row gets whose keys are all excluded: 0, or the softmax of one number in all columns, -inf ("nan") or finite ("uniform").

With `_fill` that number has replaced the scores, so that no gradient reaches them; else it was added to them and absorbed them.
"""


def fills_empty_rows(empty_rows: str, *, has_sinks: bool) -> bool:
    """Whether a row without keys is worth something that depends on all of them: a sink is in the softmax of every row."""
    return empty_rows != "zero" and not has_sinks


# Elements of scores that the plain path holds at once, if one KV head's are not more by themselves.
_PLAIN_ELEMENTS = 2**24


@dataclass(frozen=True, slots=True)
class Problem:
    """What does not change from block to block, and which heads these are.

    `first_head` is the global index of the first query head here and `heads_per_kv` the global ratio H / K: a rank that holds
    an uneven share of heads may start in the middle of a KV head's group. `sinks` [H] are those of all heads.
    """

    mask: Mask
    captures: list[Tensor]
    scale: float
    score: str = ""
    sinks: Tensor | None = None
    seed: Tensor | None = None
    dropout_p: float = 0.0
    empty_rows: EmptyRows = "zero"
    first_head: int = 0
    heads_per_kv: int | None = None

    def serves_kernels(self) -> bool:
        """Whether the fast kernels compute it: they take a tensor that is added to the scores, and no more."""
        return self.dropout_p == 0 and additive_terms(self.score) is not None and not needs_whole_rows(self.score)

    @property
    def fills_empty_rows(self) -> bool:
        """Whether a row without keys is worth something that depends on all of them."""
        return fills_empty_rows(self.empty_rows, has_sinks=self.sinks is not None)

    def for_guests(self) -> Problem:
        """The same for rows of another rank, to which their sinks and the rows without keys are left."""
        return replace(self, sinks=None, empty_rows="zero")


HeadRun = tuple[slice, slice, int]
"""Local query heads, their local KV heads, and the global index of the first: as many query heads for each KV head."""

Index = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Tile:
    """Some rows and some keys of some heads: where they are, and what of them is allowed."""

    rows: Index  # of q, out and lse
    keys: Index  # of k and v
    indices: tuple[int, range, range, range]  # the batch, then global heads, query and key positions
    device: torch.device
    causal: bool = False  # row i may see keys 0..i
    allowed: Tensor | None = None  # bool, broadcastable to [B,H,rows,keys]; None: everything

    @cached_property
    def points(self) -> Points:
        batch, heads, *positions = self.indices
        return Points.of(batch, heads, *(torch.arange(at.start, at.stop, device=self.device) for at in positions))

    @property
    def size(self) -> tuple[int, int]:
        """How many rows and keys."""
        return len(self.indices[2]), len(self.indices[3])


class Tiling:
    """Goes through the tiles of one attention."""

    def __init__(self, q: Tensor, kv_heads: int, q_chunks: Sequence[Chunk], k_chunks: Sequence[Chunk], problem: Problem) -> None:
        """`k_chunks` are all there are, on any rank."""
        self.problem, self._q, self._q_chunks = problem, q, q_chunks
        self._runs = list(_head_runs(q.shape[1], kv_heads, problem))
        heads = range(problem.first_head, problem.first_head + q.shape[1])
        self._cuts = Cuts.of(problem.mask, problem.captures, q.shape[0], heads, q_chunks, k_chunks)

    @property
    def k_len(self) -> int:
        return self._cuts.k_len

    def tiles(self, k_chunks: Sequence[Chunk], *, plain: bool) -> Iterator[Tile]:
        """The tiles of these keys that are not empty. `plain`: small enough for a tensor of scores."""
        for cut in self.blocks(k_chunks, plain=plain):
            tile = self._tile(*cut)
            if tile is not None:
                yield tile

    def blocks(
        self, k_chunks: Sequence[Chunk], *, plain: bool, proven_only: bool = False
    ) -> Iterator[tuple[HeadRun, Chunk, Chunk, Block]]:
        """Where the tiles are, before any tensor has been looked at. `proven_only`: without those that `undecided` tells."""
        tiled = plain or bool(additive_terms(self.problem.score))
        whole = needs_whole_rows(self.problem.score)
        for run in self._small_runs(k_chunks) if plain else self._runs:
            for q_chunk in self._q_chunks:
                for k_chunk in k_chunks:
                    cut = self._cuts.whole_rows if whole else partial(self._cuts.blocks, heads=run[0], tiled=tiled, proven_only=proven_only)
                    for block in cut(q_chunk, k_chunk):
                        yield run, q_chunk, k_chunk, block

    def undecided(self, k_chunks: Sequence[Chunk], *, plain: bool) -> Iterator[tuple[HeadRun, Tensor]]:
        """The tiles of which a predicate must be asked, as `Cuts.undecided` tells them, for each run of heads."""
        if not needs_whole_rows(self.problem.score):
            for run in self._small_runs(k_chunks) if plain else self._runs:
                yield run, self._cuts.undecided(self._q_chunks, k_chunks, run[0])

    def may_have_empty_rows(self, *, everywhere: bool) -> bool:
        """Whether `possibly_empty` has any tile."""
        pairs = ((run, chunk) for run in self._runs for chunk in self._q_chunks)
        return any(self._cuts.possibly_empty_tiles(chunk, run[0], everywhere=everywhere) for run, chunk in pairs)

    def possibly_empty(self, k_chunks: Sequence[Chunk], *, everywhere: bool) -> Iterator[Tile]:
        """All tiles of these keys, as if nothing were masked, for the rows that the mask may leave without any, or for all rows."""
        for run in self._small_runs(k_chunks):
            for q_chunk in self._q_chunks:
                for q_offset, rows in self._cuts.possibly_empty_tiles(q_chunk, run[0], everywhere=everywhere):
                    for k_chunk in k_chunks:
                        for k_offset in range(0, k_chunk[2], blocks.TILE):
                            keys = min(blocks.TILE, k_chunk[2] - k_offset)
                            block = Block(q_offset, rows, k_offset, keys, BlockKind.FULL)
                            yield self._made(run, q_chunk, k_chunk, block)

    def _tile(self, run: HeadRun, q_chunk: Chunk, k_chunk: Chunk, block: Block) -> Tile | None:
        """The tile of a block, or None if nothing of it is allowed and that is cheap to see."""
        tile = self._made(run, q_chunk, k_chunk, block)
        if not block.ask_predicate and block.kind is not BlockKind.PARTIAL:
            return tile
        mask, bounds = self.problem.mask, block.kind is BlockKind.PARTIAL
        if not block.ask_predicate and tile.device.type == "cpu" and block.q_rows * block.k_rows <= blocks.TILE**2:
            # Elsewhere streams and graphs would have to be told of a tensor that outlives the call, and rows of all keys are too long.
            *_, queries, keys = tile.indices
            return replace(tile, causal=False, allowed=mask.within_bounds(queries.start, len(queries), keys.start, len(keys)))
        allowed = mask.allowed(tile.points, self.problem.captures, bounds=bounds, predicate=block.ask_predicate)
        # Looking at the values would make a GPU wait; there the mask is simply used.
        if allowed is not None and block.ask_predicate and allowed.device.type == "cpu":
            if not bool(allowed.any()):
                return None
            allowed = None if bool(allowed.all()) else allowed
        return replace(tile, causal=False, allowed=allowed)

    def _made(self, run: HeadRun, q_chunk: Chunk, k_chunk: Chunk, block: Block) -> Tile:
        heads, kv_heads, first_head = run
        rows, q_at = _span(q_chunk, block.q_offset, block.q_rows)
        keys, k_at = _span(k_chunk, block.k_offset, block.k_rows)
        every, global_heads = slice(None), range(first_head, first_head + heads.stop - heads.start)
        indices = (self._q.shape[0], global_heads, q_at, k_at)
        return Tile((every, heads, rows), (every, kv_heads, keys), indices, self._q.device, block.kind is BlockKind.CAUSAL)

    def _small_runs(self, k_chunks: Sequence[Chunk]) -> Iterator[HeadRun]:
        """Runs with so few KV heads that the scores of a tile stay small."""
        keys = max((rows for *_, rows in k_chunks), default=0)
        whole = needs_whole_rows(self.problem.score)
        elements = keys * blocks.rows_in_one_piece(keys) if whole else blocks.TILE**2
        for heads, kv_heads, first_head in self._runs:
            count = kv_heads.stop - kv_heads.start
            ratio = (heads.stop - heads.start) // count
            step = max(1, _PLAIN_ELEMENTS // max(1, self._q.shape[0] * ratio * elements))
            for kv in range(0, count, step):
                end = min(kv + step, count)
                own = slice(heads.start + kv * ratio, heads.start + end * ratio)
                yield own, slice(kv_heads.start + kv, kv_heads.start + end), first_head + kv * ratio


def _span(chunk: Chunk, offset: int, rows: int) -> tuple[slice, range]:
    local, start, _ = chunk
    return slice(local + offset, local + offset + rows), range(start + offset, start + offset + rows)


def _head_runs(num_heads: int, num_kv_heads: int, problem: Problem) -> Iterator[HeadRun]:
    """Runs of local heads that a grouped kernel can take: equally many query heads for each KV head of the run."""
    if num_heads == 0 or num_kv_heads == 0:
        return
    ratio = problem.heads_per_kv or num_heads // num_kv_heads
    first, end = problem.first_head, problem.first_head + num_heads
    first_kv = first // ratio
    cut, last_cut = min(end, -(-first // ratio) * ratio), max(first, end // ratio * ratio)
    bounds = sorted({first, cut, last_cut, end})
    for start, stop in pairwise(bounds):
        yield slice(start - first, stop - first), slice(start // ratio - first_kv, (stop - 1) // ratio + 1 - first_kv), start
