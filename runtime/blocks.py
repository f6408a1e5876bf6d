"""Cuts the score matrix of some rows and keys into blocks: as few and as large as the mask allows.

Blocks that are empty are left out. Full and diagonal ones go to a kernel whole. What is left is cut into tiles whose mask is
evaluated on the spot. The bounds of a mask are decided here, exactly; what a predicate does to each tile, `runtime/intervals.py`
proves where it can, once for all blocks of an attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from autoseq.runtime.intervals import prove
from autoseq.runtime.mask import BlockKind, Mask

TILE = 512  # rows and keys of a tile that needs a mask tensor

Chunk = tuple[int, int, int]
"""(local start, global start, rows): consecutive rows of a local tensor at consecutive global positions."""

Span = tuple[int, int]
"""(global start, rows)."""


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of the score matrix, as offsets into a pair of chunks: what the bounds do to it, and if the predicate must be asked."""

    q_offset: int
    q_rows: int
    k_offset: int
    k_rows: int
    kind: BlockKind
    ask_predicate: bool = False

    def moved(self, q_offset: int, k_offset: int) -> Block:
        return replace(self, q_offset=self.q_offset + q_offset, k_offset=self.k_offset + k_offset)


@dataclass(frozen=True, slots=True)
class Cuts:
    """The cuts of one attention: of some chunks of queries against all chunks of keys, on whichever rank they are."""

    mask: Mask
    full: Tensor | None  # [heads or 1, query tiles, key tiles]: where the predicate is proven to hold; None without a predicate
    empty: Tensor | None  # and where it is proven not to
    q_tiles: dict[Span, range]
    k_tiles: dict[Span, range]
    k_len: int

    @classmethod
    def of(
        cls, mask: Mask, captures: list[Tensor], batch: int, heads: range, q_chunks: Sequence[Chunk], k_chunks: Sequence[Chunk]
    ) -> Cuts:
        """`heads` are global; what the captures say is read once."""
        q_tiles, k_tiles = _tiles(q_chunks), _tiles(k_chunks)
        full = empty = None
        if mask.predicate and q_tiles and k_tiles and len(heads):
            spans = [[tile for span in tiles for tile in _spans(span)] for tiles in (q_tiles, k_tiles)]
            full, empty = prove(mask.predicate, captures, batch, heads, *spans)
        return cls(mask, full, empty, q_tiles, k_tiles, sum(rows for *_, rows in k_chunks))

    def blocks(self, q_chunk: Chunk, k_chunk: Chunk, heads: slice, *, tiled: bool, proven_only: bool = False) -> Iterator[Block]:
        """The blocks of a pair of chunks for some of the heads. `tiled`: none is larger than a tile.

        `proven_only`: without those that `undecided` tells, all at once.
        """
        (_, q_start, q_rows), (_, k_start, k_rows) = q_chunk, k_chunk
        bounds = replace(self.mask, predicate="")
        if self.full is None or self.empty is None:
            yield from split(bounds, q_start, q_rows, k_start, k_rows, tiled=tiled)
            return
        numbers, skipped = self._k_tiles_of(k_start, k_rows)
        at = (slice(None), _slice(self.q_tiles[q_chunk[1:]]), _slice(numbers))
        full, empty = (_of_heads(grid, heads)[at].all(0) for grid in (self.full, self.empty))
        for rows, keys in rectangles(full.tolist()):
            q_offset, (k_offset, k_count) = rows.start * TILE, _part_of_tiles(keys, skipped, k_rows)
            q_count = min(rows.stop * TILE, q_rows) - q_offset
            for block in split(bounds, q_start + q_offset, q_count, k_start + k_offset, k_count, tiled=tiled):
                yield block.moved(q_offset, k_offset)
        if proven_only:
            return
        for i, j in (~full & ~empty).nonzero().tolist():
            keys_of_tile = _part_of_tiles(range(j, j + 1), skipped, k_rows)
            tile = Block(i * TILE, min(TILE, q_rows - i * TILE), *keys_of_tile, BlockKind.PARTIAL, True)
            kind = bounds.classify(q_start + tile.q_offset, tile.q_rows, k_start + tile.k_offset, tile.k_rows)
            if kind is not BlockKind.EMPTY:
                yield replace(tile, kind=BlockKind.FULL if kind is BlockKind.FULL else BlockKind.PARTIAL)

    def undecided(self, q_chunks: Sequence[Chunk], k_chunks: Sequence[Chunk], heads: slice) -> Tensor:
        """The tiles that the bounds leave and whose predicate must be asked: first query, queries, first key and keys, all global."""
        if self.full is None or self.empty is None:
            return torch.empty((0, 4), dtype=torch.int64)
        q = [(number, *span) for chunk in q_chunks for number, span in zip(self.q_tiles[chunk[1:]], _spans(chunk[1:]), strict=True)]
        k = [tile for _, start, rows in k_chunks for tile in self._numbered_keys(start, rows)]
        (q_at, q_start, q_rows), (k_at, k_start, k_rows) = (torch.tensor(tiles, dtype=torch.int64).reshape(-1, 3).T for tiles in (q, k))
        full, empty = (_of_heads(grid, heads).all(0)[q_at][:, k_at] for grid in (self.full, self.empty))
        left = ~full & ~empty
        if self.mask.max_ahead is not None:
            left &= k_start - (q_start + q_rows - 1)[:, None] <= self.mask.max_ahead
        if self.mask.max_behind is not None:
            left &= q_start[:, None] - (k_start + k_rows - 1) <= self.mask.max_behind
        i, j = left.nonzero(as_tuple=True)
        return torch.stack([q_start[i], q_rows[i], k_start[j], k_rows[j]], 1)

    def _numbered_keys(self, start: int, rows: int) -> Iterator[tuple[int, int, int]]:
        """Number, first key and keys of the tiles of a chunk of keys."""
        if rows > 0:
            numbers, skipped = self._k_tiles_of(start, rows)
            for j, number in enumerate(numbers):
                offset, count = _part_of_tiles(range(j, j + 1), skipped, rows)
                yield number, start + offset, count

    def _k_tiles_of(self, start: int, rows: int) -> tuple[range, int]:
        """The numbers of the tiles that hold a part of a chunk of keys, and how many rows of the first one come before the part."""
        first, numbers = next((first, at) for (first, count), at in self.k_tiles.items() if first <= start < first + count)
        skipped = (start - first) // TILE
        last = (start + rows - 1 - first) // TILE
        return range(numbers.start + skipped, numbers.start + last + 1), start - first - skipped * TILE

    def whole_rows(self, q_chunk: Chunk, k_chunk: Chunk) -> Iterator[Block]:
        """Blocks of few rows and all keys of the chunk, of the size of a tile, for scores whose rows must not be cut."""
        (_, q_start, q_rows), (_, k_start, k_rows) = q_chunk, k_chunk
        step = rows_in_one_piece(k_rows)
        for offset in range(0, q_rows, step):
            rows = min(step, q_rows - offset)
            first, count = self.mask.keys_of(q_start + offset, rows, k_start, k_rows)
            if count:
                full = self.mask.classify(q_start + offset, rows, first, count) is BlockKind.FULL
                kind = BlockKind.FULL if full else BlockKind.PARTIAL
                yield Block(offset, rows, first - k_start, count, kind, bool(self.mask.predicate))

    def possibly_empty_tiles(self, q_chunk: Chunk, heads: slice, *, everywhere: bool) -> list[Span]:
        """(offset, rows) of the tiles of queries of which some row may see no key at all; or `everywhere`, of all tiles."""
        _, q_start, q_rows = q_chunk
        tiles = _spans((0, q_rows))
        if everywhere:
            return tiles
        if self.full is None:
            return [(offset, rows) for offset, rows in tiles if not self._reached(q_start + offset, rows, 0, self.k_len)]
        full = _of_heads(self.full, heads)[:, _slice(self.q_tiles[q_chunk[1:]])].all(0).tolist()
        spans = [tile for span in self.k_tiles for tile in _spans(span)]
        return [
            (offset, rows)
            for (offset, rows), proven in zip(tiles, full, strict=True)
            if not any(sure and self._reached(q_start + offset, rows, *span) for sure, span in zip(proven, spans, strict=True))
        ]

    def _reached(self, q_start: int, q_rows: int, k_start: int, k_rows: int) -> bool:
        """Whether the bounds let each of the rows see one of the keys: as the keys seen are concave in q, only its ends are tried."""
        return all(self.mask.keys_of(q, 1, k_start, k_rows)[1] > 0 for q in (q_start, q_start + q_rows - 1))


def rows_in_one_piece(k_rows: int) -> int:
    """How many whole rows are taken at once: about a tile's elements, but enough rows for a matrix product to be one."""
    return max(min(64, TILE), TILE * TILE // max(1, k_rows))


def _tiles(chunks: Sequence[Chunk]) -> dict[Span, range]:
    """The numbers of each chunk's tiles, counted through all chunks. The last row may stand in for padding too: one span, counted once."""
    numbers: dict[Span, range] = {}
    count = 0
    for start, rows in dict.fromkeys(chunk[1:] for chunk in chunks):
        numbers[start, rows] = range(count, count + -(-rows // TILE))
        count = numbers[start, rows].stop
    return numbers


def _spans(span: Span) -> list[Span]:
    """The tiles of a span."""
    start, rows = span
    return [(start + offset, min(TILE, rows - offset)) for offset in range(0, rows, TILE)]


def _part_of_tiles(tiles: range, skipped: int, rows: int) -> Span:
    """Some tiles as an offset into a chunk of so many rows, which begins so far inside its first tile and may end inside its last."""
    first, end = max(0, tiles.start * TILE - skipped), min(tiles.stop * TILE - skipped, rows)
    return first, end - first


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


def _of_heads(grid: Tensor, heads: slice) -> Tensor:
    return grid if grid.shape[0] == 1 else grid[heads]


def rectangles(full: list[list[bool]]) -> list[tuple[range, range]]:
    """Disjoint rectangles (rows, columns) that cover what is true: runs of a row, as tall as the rows below have the same run."""
    done: list[tuple[range, range]] = []
    open_runs: dict[range, int] = {}
    for i, row in enumerate([*full, []]):
        runs = _runs(row)
        done += [(range(first, i), run) for run, first in open_runs.items() if run not in runs]
        open_runs = {run: open_runs.get(run, i) for run in runs}
    return done


def _runs(row: list[bool]) -> list[range]:
    edges = [j for j, (before, here) in enumerate(pairwise([False, *row, False])) if before != here]
    return [range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def split(bounds: Mask, q_start: int, q_rows: int, k_start: int, k_rows: int, *, tiled: bool) -> Iterator[Block]:
    """Cut a rectangle of the score matrix into the blocks that the bounds leave, large where they are simple.

    `tiled` says that every block needs a tensor of its own size, so that none may be larger than a tile.
    """
    kind = bounds.classify(q_start, q_rows, k_start, k_rows)
    if kind is BlockKind.EMPTY:
        return
    if not tiled and kind is not BlockKind.PARTIAL:
        yield Block(0, q_rows, 0, k_rows, kind)
    elif not tiled and replace(bounds, max_ahead=None).classify(q_start, q_rows, k_start, k_rows) is BlockKind.FULL:
        yield from _split_at_diagonal(bounds, q_start, q_rows, k_start, k_rows)
    else:
        yield from _split_into_tiles(bounds, q_start, q_rows, k_start, k_rows, tiled)


def _split_at_diagonal(bounds: Mask, q_start: int, q_rows: int, k_start: int, k_rows: int) -> Iterator[Block]:
    """For a block that only `max_ahead` cuts: row i sees keys 0 .. i + shift."""
    assert bounds.max_ahead is not None
    shift = bounds.max_ahead - (k_start - q_start)
    first_row, seen_by_all = max(0, -shift), max(0, shift)
    side = min(q_rows - first_row, k_rows - seen_by_all)
    below = first_row + side
    if seen_by_all:
        yield Block(first_row, q_rows - first_row, 0, seen_by_all, BlockKind.FULL)
    yield Block(first_row, side, seen_by_all, side, BlockKind.CAUSAL)
    if below < q_rows:
        yield Block(below, q_rows - below, seen_by_all, k_rows - seen_by_all, BlockKind.FULL)


def _split_into_tiles(bounds: Mask, q_start: int, q_rows: int, k_start: int, k_rows: int, tiled: bool) -> Iterator[Block]:
    for q_offset, rows in _spans((0, q_rows)):
        first, count = bounds.keys_of(q_start + q_offset, rows, k_start, k_rows)
        full: Block | None = None
        for key, keys in _spans((first, count)):
            kind = bounds.classify(q_start + q_offset, rows, key, keys)
            if kind is BlockKind.EMPTY:
                continue
            tile = Block(q_offset, rows, key - k_start, keys, BlockKind.FULL if kind is BlockKind.FULL else BlockKind.PARTIAL)
            if tiled or kind is not BlockKind.FULL:
                yield tile
            elif full is None:
                full = tile
            else:
                full = replace(full, k_rows=full.k_rows + tile.k_rows)
        if full is not None:
            yield full
