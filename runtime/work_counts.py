"""How much of an attention a rank computes: pairs that the mask leaves and those that kernels are given, calls, and merged results.

A strategy says which queries meet which keys on a rank (`Task`, one for each `blockwise.Forward` or `Backward` that it makes); the same
cuts as in the real work are counted here, without tensors. What only the values of a tensor rule out is not known, and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from operator import add
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from autoseq.runtime import blocks, runs
from autoseq.runtime.blocks import Chunk
from autoseq.runtime.formula import SYMBOLS, parse
from autoseq.runtime.mask import BlockKind, Mask
from autoseq.runtime.runs import Runs
from autoseq.runtime.score_facts import additive_terms
from autoseq.runtime.tiles import EmptyRows, HeadRun, Problem, Tiling
from autoseq.runtime.timeline import NO_WORK, WAYS, Way, Work

if TYPE_CHECKING:
    from autoseq.runtime.strategy import Site

# Tiles of one task that are looked at one by one; of more, those of some rows stand for all.
MOST_TILES = 2**9
_FEWEST_SAMPLES = 8

# So many times more of them are looked at where a predicate is all that cuts: in few large blocks, and all others together.
_AT_ONCE = 2**5


@dataclass(frozen=True, slots=True)
class Task:
    """Some queries and what comes of the keys, one piece after the other.

    `heads` are global, `grid` are the chunks by which predicates are decided, and `padded` is how often a row stands in for padding: a
    forward computes that too. `came_home` are elements of results and gradients that come from others and are added, `packed_bytes` those
    of `Work`.
    """

    queries: tuple[Chunk, ...]
    keys: tuple[tuple[Chunk, ...], ...]
    heads: range
    kv_heads: int
    grid: tuple[Chunk, ...]
    padded: int = 0
    came_home: int = 0
    packed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of an attention is the same for all of its tasks."""

    batch: int
    head_dim: int
    value_dim: int
    q_len: int
    heads_per_kv: int
    learns: bool = False  # a capture gets a gradient, which kernels do not give

    def by_kernel(self, problem: Problem, way: Way) -> bool:
        """Whether kernels compute it."""
        return problem.serves_kernels() and not (self.learns and way == "backward")


def work_of_all(site: Site, tasks: Iterable[Task], way: Way) -> Work:
    """What a rank's tasks come to."""
    beside = ((task, Work(0, 0, task.came_home, packed_bytes=task.packed_bytes)) for task in tasks)
    return reduce(add, (_of_task(site, task)[WAYS.index(way)] + others for task, others in beside), NO_WORK)


def _of_task(site: Site, task: Task) -> tuple[Work, Work]:
    """Forward and backward, without what comes home and what is packed."""
    return _of_site(site, replace(_from_first_head(task, site), came_home=0, packed_bytes=0), blocks.TILE, MOST_TILES)


def _from_first_head(task: Task, site: Site) -> Task:
    """The same for heads that come earlier, if the mask is the same for all: ranks and stages ask for the same then."""
    if site.predicate and SYMBOLS["h"] in parse(site.predicate).free_symbols:
        return task
    ratio = site.heads // site.kv_heads
    first = task.heads.start % ratio
    return replace(task, heads=range(first, first + len(task.heads)))


@lru_cache(maxsize=4096)
def _of_site(site: Site, task: Task, tile: int, most_tiles: int) -> tuple[Work, Work]:
    """Ranks and stages ask for the same. It is counted in tiles of that size, so many of them one by one."""
    sizes = Sizes(site.batch, site.head_dim, site.value_dim, site.q_len, site.heads // site.kv_heads, bool(site.learned))
    empty_rows = cast(EmptyRows, site.empty_rows)
    return works_of(task, Problem(site.mask, [], 1.0, site.score, dropout_p=site.dropout_p, empty_rows=empty_rows), sizes)


def works_of(task: Task, problem: Problem, sizes: Sizes) -> tuple[Work, Work]:
    """What a task comes to, forward and backward: counted once where both go through the same blocks."""
    if not task.heads or task.kv_heads == 0:
        return NO_WORK, NO_WORK
    problem = replace(problem, first_head=task.heads.start, heads_per_kv=sizes.heads_per_kv)
    by_kernel = [sizes.by_kernel(problem, way) for way in WAYS]
    found = {each: _of_queries(task, problem, sizes, plain=not each) for each in set(by_kernel)}
    forward, backward = (found[each][i] for i, each in enumerate(by_kernel))
    if task.padded:
        last = replace(task, queries=((0, sizes.q_len - 1, 1),))
        padding = _counted(last, problem, sizes, plain=not by_kernel[0])[0]
        forward = forward + replace(_scaled(padding, task.padded), pairs=0)  # computed, but none of the attention's
    return forward, backward


def _of_queries(task: Task, problem: Problem, sizes: Sizes, *, plain: bool) -> list[Work]:
    """Of the queries that are no padding. Of very many tiles some rows' stand for all, evenly spread."""
    if not task.queries:
        return [NO_WORK, NO_WORK]
    sampled = _sampled(task, problem, tiled=plain or bool(additive_terms(problem.score)))
    share = sum(rows for *_, rows in task.queries) / sum(rows for *_, rows in sampled.queries)
    found = [_scaled(work, share) for work in _counted(sampled, problem, sizes, plain=plain)]
    if problem.mask.predicate:
        return found
    pairs = sizes.batch * len(task.heads) * _pairs(task, problem)
    return [replace(work, pairs=pairs) for work in found]


def _pairs(task: Task, problem: Problem) -> int:
    """Of one head, as the bounds leave them."""
    return sum(pairs_within(problem.mask, q, k) for q in task.queries for piece in task.keys for k in piece)


def part_of(held: Sequence[Chunk], rows: Runs) -> tuple[Chunk, ...]:
    """Some rows of a holder as they are worked on, given its chunks."""
    return tuple(
        (place, start + first - local, count)
        for local, start, all_rows in held
        for place, first, count in runs.offsets(((local, all_rows),), rows)
    )


def pairs_within(mask: Mask, queries: Chunk, keys: Chunk) -> int:
    """How many pairs of some queries and keys the bounds of a mask leave."""
    (_, q_start, q_rows), (_, k_start, k_rows) = queries, keys
    first = q_start - k_start
    upto = q_rows * k_rows if mask.max_ahead is None else _keys_below(first + mask.max_ahead + 1, q_rows, k_rows)
    before = 0 if mask.max_behind is None else _keys_below(first - mask.max_behind, q_rows, k_rows)
    return max(0, upto - before)


def _keys_below(first: int, rows: int, keys: int) -> int:
    """The sum over rows i of how many of `keys` keys are below first + i."""
    start, full = max(0, -first), max(0, min(rows, keys - first))
    rising = max(0, full - start)
    return rising * (2 * (first + start) + rising - 1) // 2 + max(0, rows - max(full, start)) * keys


def _sampled(task: Task, problem: Problem, *, tiled: bool) -> Task:
    """The task, or the same for fewer rows."""
    rows, keys = sum(rows for *_, rows in task.queries), sum(rows for piece in task.keys for *_, rows in piece)
    per_row_of_tiles = -(-keys // blocks.TILE) + len(task.keys)
    if not problem.mask.predicate:
        if problem.mask.max_behind is None and not tiled:
            return task  # few blocks, however large
        seen = _pairs(task, problem) // max(1, rows)
        per_row_of_tiles = seen // blocks.TILE + 2 + len(task.keys)
    at_once = problem.mask.predicate and problem.mask.max_behind is None and not tiled
    # As many of each of several chunks of the same size, and later ones no more than earlier ones.
    most = max(1, MOST_TILES * (_AT_ONCE if at_once else 1) // per_row_of_tiles // _FEWEST_SAMPLES) * _FEWEST_SAMPLES
    tiles = [(0, start + offset, min(blocks.TILE, n - offset)) for _, start, n in task.queries for offset in range(0, n, blocks.TILE)]
    tiles.sort(key=lambda tile: tile[1])
    if len(tiles) <= most:
        return task
    return replace(task, queries=tuple(tiles[((2 * i + 1) * len(tiles) - most * (1 - i % 2)) // (2 * most)] for i in range(most)))


def _scaled(work: Work, share: float) -> Work:
    return work if share == 1 else Work(*(round(getattr(work, name) * share) for name in Work.__dataclass_fields__))


def _counted(task: Task, problem: Problem, sizes: Sizes, *, plain: bool) -> tuple[Work, Work]:
    """Forward and backward of all blocks. Pairs are those of a predicate; without one the bounds tell them."""
    q = torch.empty((sizes.batch, len(task.heads), 0, sizes.head_dim), device="meta")
    tiling = Tiling(q, task.kv_heads, task.queries, task.grid, problem)
    found = _Tally(sizes, with_terms=not plain and bool(additive_terms(problem.score)))
    for piece in task.keys:
        for run, q_chunk, k_chunk, block in tiling.blocks(piece, plain=plain, proven_only=True):
            tile = (0, q_chunk[1] + block.q_offset, block.q_rows), (0, k_chunk[1] + block.k_offset, block.k_rows)
            pairs = pairs_within(problem.mask, *tile) if problem.mask.predicate else 0
            kind = BlockKind.PARTIAL if block.ask_predicate else block.kind
            found.add(run, kind, 1, pairs, block.q_rows * block.k_rows, block.q_rows, block.k_rows)
    if problem.mask.predicate:
        # A predicate that looks up tensors leaves all tiles to be asked: they are counted together.
        for run, tiles in tiling.undecided([chunk for piece in task.keys for chunk in piece], plain=plain):
            q_start, q_rows, k_start, k_rows = tiles.T
            sums = (_pairs_of_tiles(problem.mask, q_start - k_start, q_rows, k_rows), q_rows * k_rows, q_rows, k_rows)
            found.add(run, BlockKind.PARTIAL, len(tiles), *(int(each.sum()) for each in sums))
    return found.works()


@dataclass(slots=True)
class _Tally:
    """Sums over blocks: calls, pairs, and what the results of each way are merged into. `with_terms`: a tensor comes with every block."""

    sizes: Sizes
    with_terms: bool
    calls: int = 0
    pairs: int = 0
    merged: int = 0
    merged_back: int = 0
    full: int = 0
    causal: int = 0
    causal_rows: int = 0
    masked: int = 0

    def add(self, run: HeadRun, kind: BlockKind, calls: int, pairs: int, given: int, q_rows: int, k_rows: int) -> None:
        """So many calls for a run of heads, on blocks of a kind.

        Of one head in all: pairs that the mask leaves, those that kernels are given, and rows of queries and of keys.
        """
        sizes, (heads, kv_heads) = self.sizes, _counts(run)
        self.calls += calls
        self.pairs += heads * pairs
        self.merged += heads * q_rows * (sizes.value_dim + 1)
        self.merged_back += heads * q_rows * sizes.head_dim + kv_heads * k_rows * (sizes.head_dim + sizes.value_dim)
        if kind is BlockKind.PARTIAL or self.with_terms:
            self.masked += heads * given
        elif kind is BlockKind.CAUSAL:
            self.causal += heads * given
            self.causal_rows += heads * q_rows
        else:
            self.full += heads * given

    def works(self) -> tuple[Work, Work]:
        """Forward and backward."""
        B = self.sizes.batch
        given = (B * self.full, B * self.causal, B * self.causal_rows, B * self.masked)
        forward, backward = (Work(B * self.pairs, self.calls, B * merged, *given) for merged in (self.merged, self.merged_back))
        return forward, backward


def _counts(run: HeadRun) -> tuple[int, int]:
    """How many query heads and KV heads."""
    heads, kv_heads, _ = run
    return heads.stop - heads.start, kv_heads.stop - kv_heads.start


def _pairs_of_tiles(mask: Mask, first: Tensor, q_rows: Tensor, k_rows: Tensor) -> Tensor:
    """`pairs_within` of many tiles; `first` is how far their first query is behind their first key."""

    def keys_below(first: Tensor) -> Tensor:
        start, full = (-first).clamp(min=0), torch.minimum(q_rows, k_rows - first).clamp(min=0)
        rising = (full - start).clamp(min=0)
        return rising * (2 * (first + start) + rising - 1) // 2 + (q_rows - torch.maximum(full, start)).clamp(min=0) * k_rows

    upto = q_rows * k_rows if mask.max_ahead is None else keys_below(first + mask.max_ahead + 1)
    before = torch.zeros_like(upto) if mask.max_behind is None else keys_below(first - mask.max_behind)
    return (upto - before).clamp(min=0)
