"""What is told of very long attentions: the same as tile by tile, near the count where rows stand for others, and in no time."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseq.planner import NamedSite, make_plan
from autoseq.planning.presets import load_topology
from autoseq.runtime import work_counts
from autoseq.runtime.blocks import Chunk
from autoseq.runtime.layout import Layout
from autoseq.runtime.mask import Mask
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site
from autoseq.runtime.tiles import Problem, Tiling
from autoseq.runtime.work_counts import pairs_within
from work_job import small_tiles

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
LONG = Site(
    batch=1, q_len=2**17, k_len=2**17, heads=32, kv_heads=8, head_dim=128, value_dim=128, element_bytes=2, max_ahead=0, empty_rows="zero"
)
PREDICATES = {
    "none": "",
    "padding": "k < c0(b)",
    "documents": "Eq(c0(b, q), c0(b, k))",
    "chunks": "Eq(floor(q/4096), floor(k/4096))",
    "per head": "q - k < 64*h",
}


# Tiles that a predicate must be asked about are counted together -----------------------------------------------------


BOUND = st.none() | st.integers(-9, 30)
GRID: tuple[Chunk, ...] = ((0, 0, 9), (9, 20, 14))


@st.composite
def pieces(draw: st.DrawFn) -> list[Chunk]:
    """Parts of the chunks of the grid, which may begin and end inside a tile."""
    found = []
    for _, start, rows in GRID:
        first = draw(st.integers(0, rows - 1))
        found.append((0, start + first, draw(st.integers(0, rows - first))))
    return found


@settings(deadline=None, max_examples=200, derandomize=True)
@given(BOUND, BOUND, st.sampled_from(["", "k < 11", "Ne(c0(b, k), 0)", "(k < q - 3*h) | Ne(c0(b, k), 0)"]), pieces(), st.booleans())
def test_what_is_left_to_ask_is_what_the_blocks_are(
    max_ahead: int | None, max_behind: int | None, predicate: str, keys: list[Chunk], plain: bool
) -> None:
    mask = Mask(max_ahead, max_behind, predicate)
    q = torch.empty((2, 6, 0, 4), device="meta")
    with small_tiles():
        tiling = Tiling(q, 3, [(0, 3, 9), (9, 30, 6)], GRID, Problem(mask, [], 1.0))
        expected, kept = [], []
        for (heads, *_), (_, q_start, _), (_, k_start, _), block in tiling.blocks(keys, plain=plain):
            tile = (heads, q_start + block.q_offset, block.q_rows, k_start + block.k_offset, block.k_rows)
            (expected if block.ask_predicate else kept).append(tile)
        found = [(heads, *tile) for (heads, *_), tiles in tiling.undecided(keys, plain=plain) for tile in tiles.tolist()]
        proven = list(tiling.blocks(keys, plain=plain, proven_only=True))
    assert sorted(map(str, found)) == sorted(map(str, expected))
    assert len(proven) == len(kept)
    tiles = torch.tensor([tile[1:] for tile in found], dtype=torch.int64).reshape(-1, 4)
    q_start, q_rows, k_start, k_rows = tiles.T
    pairs = work_counts._pairs_of_tiles(mask, q_start - k_start, q_rows, k_rows).tolist()
    assert pairs == [pairs_within(mask, (0, q, rows), (0, k, count)) for _, q, rows, k, count in found]


# Some rows stand for all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["ring", "ulysses", "gather_kv"])
@pytest.mark.parametrize("predicate", [PREDICATES["documents"], "Eq(floor(q/64), floor(k/64))", "q - k < 64*h"])
def test_the_rows_that_stand_for_all_are_spread_over_the_shards(
    name: str, layout: Layout, predicate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two halves of zigzag rows as many each: within a few percent.

    Calls only where a predicate is asked: what is proven of it is one call for many rows.
    """
    site, strategy = replace(LONG, q_len=1024, k_len=1024, predicate=predicate), STRATEGIES[name]
    with small_tiles():
        for rank in (0, 3):
            monkeypatch.setattr(work_counts, "MOST_TILES", 2**30)
            exact = strategy.work(site, 4, layout, rank, "forward")
            monkeypatch.setattr(work_counts, "MOST_TILES", 2**9)
            told = strategy.work(site, 4, layout, rank, "forward")
            for of in ("pairs", *(["launches", "merged_elements"] if "c0" in predicate else [])):
                assert getattr(told, of) == pytest.approx(getattr(exact, of), rel=0.05), of


# Time -----------------------------------------------------------------------------------------------------------------


def test_a_masked_model_is_planned_at_once() -> None:
    """Every distinct attention in well under half a second of an idle core; a busy one gets four times that."""
    topology = load_topology("8xH100")

    def seconds(site: Site, count: int = 1) -> float:
        sites = [NamedSite(f"a{i}", "model.py:1", "mask", site) for i in range(count)]
        start = time.process_time()
        make_plan(sites, group_size=8, strategy="auto", layout="auto", topology=topology)
        return time.process_time() - start

    seconds(replace(LONG, q_len=4096, k_len=4096))  # formulas of strategies, once a process
    spent = {name: seconds(replace(LONG, predicate=predicate), 4) for name, predicate in PREDICATES.items()}
    assert all(each < 2.0 for each in spent.values()), spent
    assert seconds(replace(LONG, predicate=PREDICATES["padding"]), 32) < 0.1, "what is alike is asked once"
