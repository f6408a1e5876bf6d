"""How much each rank computes: the pairs of a dense mask, the calls that are really made, and what kernels are given in them."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from attention_job import Run, runs_of, site_of
from autoseq.plan_formulas import print_formulas
from autoseq.runtime import work_counts
from autoseq.runtime.layout import Layout, chunk_ranges, local_length
from autoseq.runtime.mask import Mask
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import values_of
from autoseq.runtime.timeline import WAYS, Work
from autoseq.runtime.work_counts import pairs_within
from autoseq.strategy_table import formula_text
from dense_attention import Case
from ranks import run_ranks
from work_job import TILE, count_calls, small_tiles

OWN_ROWS = ["ring", "gather_kv", "halo", "double_ring"]
NAMES = [name for name in STRATEGIES if name != "local"]
MESHES: dict[int, tuple[int, ...]] = {2: (), 3: (), 4: (2, 2)}

BOUNDS = {
    "no mask": Case(16, 16, mask="none", kv_heads=2, batch=2),
    "causal": Case(24, 24, kv_heads=2),
    "causal, padded": Case(13, 13, heads=6, kv_heads=3),
    "uneven heads": Case(16, 16, heads=7, kv_heads=7),
    "uneven groups": Case(18, 18, heads=9, kv_heads=3),
    "some ranks without heads": Case(16, 16, heads=2, kv_heads=1),
    "a rank without rows": Case(5, 5),
    "cross attention": Case(7, 21, value_dim=5, mask="causal aligned at the end"),
    "few queries": Case(8, 64, kv_heads=2, mask="none", dtype=torch.bfloat16),
    "a window": Case(32, 32, mask="window"),
    "a window on both sides": Case(24, 19, mask="window on both sides"),
}
EXACT = BOUNDS | {
    "a learned score": Case(14, 14, heads=8, kv_heads=4, score="ALiBi with slopes that learn"),
    "softcap": Case(16, 16, score="softcap"),
    "dropout": Case(16, 16, dropout_p=0.2),
    "sinks": Case(16, 16, heads=6, kv_heads=3, has_sinks=True),
    "a float mask": Case(17, 17, score="a dense float mask"),
}
DECIDED_LATE = {
    "chunks": Case(24, 24, heads=6, kv_heads=3, mask="chunks"),
    "a prefix": Case(24, 24, mask="prefix"),
    "segments": Case(23, 23, batch=2, mask="segments"),
    "a mask that depends on the head": Case(17, 17, heads=8, kv_heads=4, mask="head dependent"),
}


@given(
    st.integers(0, 40), st.integers(1, 20), st.integers(0, 40), st.integers(1, 20),
    st.none() | st.integers(-9, 30), st.none() | st.integers(-9, 30),
)  # fmt: skip
def test_pairs_of_a_rectangle(q: int, q_rows: int, k: int, k_rows: int, max_ahead: int | None, max_behind: int | None) -> None:
    ahead = torch.arange(k, k + k_rows) - torch.arange(q, q + q_rows)[:, None]
    dense = torch.ones_like(ahead, dtype=torch.bool)
    dense &= ahead <= max_ahead if max_ahead is not None else dense
    dense &= -ahead <= max_behind if max_behind is not None else dense
    assert pairs_within(Mask(max_ahead, max_behind), (0, q, q_rows), (0, k, k_rows)) == int(dense.sum())


def dense_pairs(case: Case, rows: list[int]) -> int:
    """Of some queries, all heads and the batch."""
    dense = case.mask_case().dense.expand(case.batch, case.heads, case.q_len, case.k_len)
    return int(dense[:, :, rows].sum())


def works(name: str, case: Case, P: int, layout: Layout, way: str) -> list[Work]:
    return [STRATEGIES[name].work(site_of(case, MESHES[P]), P, layout, rank, way) for rank in range(P)]  # type: ignore[arg-type]


def all_runs(cases: dict[str, Case], P: int) -> dict[str, Run]:
    return {f"{strategy}: {name}": run for strategy in NAMES for name, run in runs_of(strategy, P, cases, MESHES[P]).items()}


@pytest.mark.parametrize("P", MESHES)
def test_every_pair_is_computed_once(P: int) -> None:
    """Between all ranks those of a dense mask; and each rank's own rows, where queries stay."""
    for name, (strategy, layout, case) in all_runs(BOUNDS, P).items():
        for way in WAYS:
            found = [work.pairs for work in works(strategy, case, P, layout, way)]
            assert sum(found) == dense_pairs(case, list(range(case.q_len))), (name, way)
            if strategy in OWN_ROWS:
                s = local_length(case.q_len, P, layout)
                chunks = [chunk_ranges(rank, P, s, case.q_len, layout) for rank in range(P)]
                rows = [[row for _, start, count in held for row in range(start, start + count)] for held in chunks]
                assert found == [dense_pairs(case, of_rank) for of_rank in rows], (name, way)


@pytest.mark.parametrize("P", MESHES)
def test_what_a_predicate_may_leave_is_counted(P: int) -> None:
    """No less than what it leaves, no more than the bounds do."""
    for name, (strategy, layout, case) in all_runs(DECIDED_LATE, P).items():
        with small_tiles():
            found = sum(work.pairs for work in works(strategy, case, P, layout, "forward"))
        every_row = list(range(case.q_len))
        most = dense_pairs(replace(case, mask="none" if case.mask_case().max_ahead is None else "causal"), every_row)
        assert dense_pairs(case, every_row) <= found <= most, name


@pytest.mark.parametrize("P", MESHES)
def test_launches_are_the_calls_that_are_made(P: int) -> None:
    """As many, with as many pairs of each kind of block and bytes that are packed; in small tiles, forward and backward, on every rank."""
    runs = all_runs(EXACT | DECIDED_LATE if MESHES[P] else BOUNDS, P)
    per_rank = run_ranks(count_calls, P, list(runs.values()), MESHES[P], timeout_s=300)
    with small_tiles():
        for i, (name, (strategy, layout, case)) in enumerate(runs.items()):
            for way, counts in zip(WAYS, zip(*(of_rank[i] for of_rank in per_rank), strict=True), strict=True):
                found = [replace(work, pairs=0, merged_elements=0) for work in works(strategy, case, P, layout, way)]
                if case.mask_case().predicate:
                    # On a CPU a tile is looked at, and skipped if nothing of it is left, or taken for full if all is.
                    for made, told in zip(counts, found, strict=True):
                        assert made.launches <= told.launches, (name, way)
                        assert made.masked_pairs <= told.masked_pairs, (name, way)
                        assert made.computed_pairs(1) <= told.computed_pairs(1), (name, way)
                        # Of keys only those are packed that the predicate's values leave.
                        assert made.packed_bytes == told.packed_bytes or ("gather" in strategy and made.packed_bytes < told.packed_bytes)
                else:
                    assert found == list(counts), (name, way)


@given(st.integers(1, 40), st.integers(1, 12))
def test_pairs_past_a_diagonal_are_computed_in_pieces(n: int, piece: int) -> None:
    """Row i of a causal block computes keys 0..i and the rest of their last piece; exactly, where pieces fit or one is enough."""
    by_rows = sum(min(n, -(-(i + 1) // piece) * piece) for i in range(n))
    computed = Work(0, 1, 0, causal_pairs=n * n, causal_rows=n).computed_pairs(piece)
    if n % piece == 0 or n <= piece:
        assert computed == by_rows
    assert by_rows <= computed <= by_rows + piece**2


def test_kernels_are_given_more_than_the_mask_leaves() -> None:
    """Of a window's tiles all is computed; of a causal mask, in pieces of a tile, all of the tiles at the diagonal."""
    rows, T = 8 * TILE, TILE
    with small_tiles():
        sites = [site_of(Case(rows, rows, mask=mask, heads=1, kv_heads=1)) for mask in ("window", "causal")]
        window, causal = (STRATEGIES["local"].work(site, 1, "contiguous", 0, "forward") for site in sites)
    assert window.computed_pairs(T) == window.masked_pairs + window.causal_pairs > window.pairs
    assert (causal.full_pairs, causal.causal_pairs, causal.causal_rows, causal.masked_pairs) == (0, rows**2, rows, 0)
    assert causal.computed_pairs(T) == T * T * 8 * 9 // 2
    assert causal.computed_pairs(1) == causal.pairs == rows * (rows + 1) // 2


def test_merged_elements_of_one_rank() -> None:
    """Out and lse of each block's rows forward; dq of its rows and dk, dv of its keys backward, which come home from the other rank."""
    case = Case(4 * TILE, 4 * TILE, mask="none", heads=4, kv_heads=2, head_dim=8, value_dim=16)
    found = {way: works("ring", case, 2, "contiguous", way)[0].merged_elements for way in WAYS}
    rows = keys = 2 * TILE
    assert found == {"forward": 2 * 4 * rows * (16 + 1), "backward": 2 * 4 * rows * 8 + 3 * 2 * keys * (8 + 16)}


def test_formulas_of_work_are_what_is_counted() -> None:
    """Without a mask; of windows and causal masks they are upper bounds."""
    for P, mesh in MESHES.items():
        for name in NAMES:
            strategy = STRATEGIES[name]
            for case in (Case(16 * P, 16 * P, kv_heads=2), Case(16 * P, 16 * P, heads=6, kv_heads=3, mask="none"), EXACT["a window"]):
                site = site_of(case, mesh)
                if strategy.cannot_serve(site, P) is not None:
                    continue
                for rank in range(P):
                    sizes = strategy.sizes(site, P, "contiguous", rank)
                    found = values_of(strategy.work_formulas(), sizes)
                    pairs = strategy.work(site, P, "contiguous", rank, "forward").pairs
                    assert (found["pairs"] == pairs if case.mask == "none" else found["pairs"] >= pairs), (name, P, rank)
                    assert found["kept_bytes"] == strategy.kept_bytes(site, P, "contiguous", rank), (name, P, rank)


def test_formulas_of_work_are_printed() -> None:
    out = Console(file=io.StringIO(), width=400)
    print_formulas(out, host=True)
    shown = out.file.getvalue()  # type: ignore[attr-defined]
    assert "H_… is what sending that takes of the cores that compute" in shown and "H_keys" in shown
    for name in NAMES:
        assert f"pairs = {formula_text(STRATEGIES[name].work_formulas()['pairs'])}, kept" in shown, name


LONG = {
    "a window": Case(2048, 2048, mask="window"),
    "a score that needs tiles": Case(1024, 1024, score="ALiBi with slopes that learn"),
    "segments": Case(1024, 1024, mask="segments"),
}


@pytest.mark.parametrize("case", LONG.values(), ids=LONG)
def test_of_very_many_tiles_some_stand_for_all(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spread rows: within a few percent of the count."""
    with small_tiles():
        exact = works("ulysses", case, 2, "contiguous", "forward")[0]
        monkeypatch.setattr(work_counts, "MOST_TILES", 2**8)
        sampled = works("ulysses", case, 2, "contiguous", "forward")[0]
    assert sampled.pairs == pytest.approx(exact.pairs, rel=0.1)
    assert sampled.launches == pytest.approx(exact.launches, rel=0.1)
    assert sampled.merged_elements == pytest.approx(exact.merged_elements, rel=0.1)
    assert sampled.computed_pairs(TILE) == pytest.approx(exact.computed_pairs(TILE), rel=0.1)
