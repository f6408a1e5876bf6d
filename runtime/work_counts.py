"""How much of an attention a rank computes: pairs that the mask leaves, calls of a kernel, and what their results are added to.

A strategy says which queries meet which keys on a rank (`Task`, one for each `blockwise.Forward` or `Backward` that it makes); the same
cuts as in the real work are counted here, without tensors. What only the values of a tensor rule out is not known, and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from operator import add
from typing import TYPE_CHECKING, cast

import torch

from autoseq.runtime import blocks, runs
from autoseq.runtime.blocks import Block, Chunk
from autoseq.runtime.formula import SYMBOLS, parse
from autoseq.runtime.mask import Mask
from autoseq.runtime.runs import Runs
from autoseq.runtime.score_facts import additive_terms
from autoseq.runtime.tiles import EmptyRows, HeadRun, Problem, Tiling
from autoseq.runtime.timeline import NO_WORK, Way, Work

if TYPE_CHECKING:
    from autoseq.runtime.strategy import Site

# Tiles of one task that are looked at one by one; of more, those of some rows stand for all.
MOST_TILES = 2**12
_FEWEST_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Task:
    """Some queries and what comes of the keys, one piece after the other.

    `heads` are global, `grid` are the chunks by which predicates are decided, and `padded` is how often a row stands in for padding: a
    forward computes that too. `came_home` are elements of results and gradients that come from others and are added.
    """

    queries: tuple[Chunk, ...]
    keys: tuple[tuple[Chunk, ...], ...]
    heads: range
    kv_heads: int
    grid: tuple[Chunk, ...]
    padded: int = 0
    came_home: int = 0


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
    return reduce(add, (_of_site(site, _from_first_head(task, site), way) for task in tasks), NO_WORK)


def _from_first_head(task: Task, site: Site) -> Task:
    """The same for heads that come earlier, if the mask is the same for all: ranks and stages ask for the same then."""
    if site.predicate and SYMBOLS["h"] in parse(site.predicate).free_symbols:
        return task
    ratio = site.heads // site.kv_heads
    first = task.heads.start % ratio
    return replace(task, heads=range(first, first + len(task.heads)))


@lru_cache(maxsize=4096)
def _of_site(site: Site, task: Task, way: Way) -> Work:
    sizes = Sizes(site.batch, site.head_dim, site.value_dim, site.q_len, site.heads // site.kv_heads, bool(site.learned))
    empty_rows = cast(EmptyRows, site.empty_rows)
    problem = Problem(site.mask, [], 1.0, site.score, dropout_p=site.dropout_p, empty_rows=empty_rows)
    return work_of(task, problem, sizes, way) + Work(0, 0, task.came_home)


def work_of(task: Task, problem: Problem, sizes: Sizes, way: Way) -> Work:
    """What a task comes to. Of very many tiles some rows' stand for all, evenly spread."""
    heads = len(task.heads)
    found = NO_WORK
    if heads == 0 or task.kv_heads == 0:
        return found
    problem = replace(problem, first_head=task.heads.start, heads_per_kv=sizes.heads_per_kv)
    if task.queries:
        sampled = _sampled(task, problem, tiled=not sizes.by_kernel(problem, way) or bool(additive_terms(problem.score)))
        share = sum(rows for *_, rows in task.queries) / sum(rows for *_, rows in sampled.queries)
        found = _scaled(_counted(sampled, problem, sizes, way), share)
    if not problem.mask.predicate:
        pairs = sum(pairs_within(problem.mask, q, k) for q in task.queries for piece in task.keys for k in piece)
        found = replace(found, pairs=sizes.batch * heads * pairs)
    if task.padded and way == "forward":
        last = replace(task, queries=((0, sizes.q_len - 1, 1),))
        found = found + replace(_scaled(_counted(last, problem, sizes, way), task.padded), pairs=0)
    return found


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
        seen = sum(pairs_within(problem.mask, q, k) for q in task.queries for piece in task.keys for k in piece) // max(1, rows)
        per_row_of_tiles = seen // blocks.TILE + 2 + len(task.keys)
    most = max(_FEWEST_SAMPLES, MOST_TILES // per_row_of_tiles)
    tiles = [(0, start + offset, min(blocks.TILE, n - offset)) for _, start, n in task.queries for offset in range(0, n, blocks.TILE)]
    if len(tiles) <= most:
        return task
    return replace(task, queries=tuple(tiles[(2 * i + 1) * len(tiles) // (2 * most)] for i in range(most)))


def _scaled(work: Work, share: float) -> Work:
    return work if share == 1 else Work(round(work.pairs * share), round(work.launches * share), round(work.merged_elements * share))


def _counted(task: Task, problem: Problem, sizes: Sizes, way: Way) -> Work:
    pairs = launches = merged = 0
    for (run, kv_heads, _), q_chunk, k_chunk, block in _blocks(task, problem, sizes, way):
        heads, keys = run.stop - run.start, kv_heads.stop - kv_heads.start
        q, k = q_chunk[1] + block.q_offset, k_chunk[1] + block.k_offset
        pairs += heads * pairs_within(problem.mask, (0, q, block.q_rows), (0, k, block.k_rows))
        launches += 1
        if way == "forward":
            merged += heads * block.q_rows * (sizes.value_dim + 1)
        else:
            merged += heads * block.q_rows * sizes.head_dim + keys * block.k_rows * (sizes.head_dim + sizes.value_dim)
    return Work(sizes.batch * pairs, launches, sizes.batch * merged)


def _blocks(task: Task, problem: Problem, sizes: Sizes, way: Way) -> Iterator[tuple[HeadRun, Chunk, Chunk, Block]]:
    q = torch.empty((sizes.batch, len(task.heads), 0, sizes.head_dim), device="meta")
    tiling = Tiling(q, task.kv_heads, task.queries, task.grid, problem)
    for piece in task.keys:
        yield from tiling.blocks(piece, plain=not sizes.by_kernel(problem, way))
