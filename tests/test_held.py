"""What strategies say they hold, between the messages and for the backward, is what ranks hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention_job import Run, runs_of, site_of
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.timeline import WAYS
from dense_attention import Case
from held_job import hold_in_stages, hold_on_rank, in_stages
from ranks import run_ranks

PACKED = ["ring", "bidirectional_ring", "halo", "balanced"]
"""Whose messages are packed rows."""
NAMES = [name for name in STRATEGIES if name != "local"]

FULL = Case(192, 192, mask="none", kv_heads=2)
EQUAL = {
    "bfloat16": replace(FULL, dtype=torch.bfloat16),
    "float32": replace(FULL, dtype=torch.float32),
    "other value dim": replace(FULL, value_dim=16, dtype=torch.float32),
}
VISITS = {
    "causal": Case(192, 192, kv_heads=2, dtype=torch.float32),
    "causal, as many KV heads": Case(192, 192, heads=2, kv_heads=2, dtype=torch.bfloat16),
    "a window": Case(192, 192, mask="window", kv_heads=2),
}
FEW_QUERIES = {"few queries": Case(8, 384, mask="none", kv_heads=4, dtype=torch.float32)}


def told(runs: list[Run], P: int, mesh: tuple[int, ...], rank: int) -> list[tuple[int, ...]]:
    """Buffers of both ways, and what is kept."""
    found = []
    for name, layout, case in runs:
        strategy, asked = STRATEGIES[name], (site_of(case, mesh), P, layout, rank)
        found.append((*(strategy.buffer_bytes(*asked, way) for way in WAYS), strategy.kept_bytes(*asked)))
    return found


@pytest.mark.parametrize("P", [1, 2, 3, 4, 8])
def test_packed_rows_and_what_is_kept(P: int) -> None:
    """To the byte, for keys that go round whole, for visits by any mask, and for queries that travel."""
    named = {f"{name}: {case}": run for name in PACKED[:2] for case, run in runs_of(name, P, EQUAL).items()}
    named |= {f"{name}: {case}": run for name in PACKED[2:] for case, run in runs_of(name, P, VISITS).items()}
    named |= runs_of("bidirectional_ring", P, FEW_QUERIES)
    check_held(named, P)


@pytest.mark.parametrize(("P", "mesh"), [(4, (2, 2)), (6, (2, 3)), (6, (3, 2)), (8, (2, 4)), (8, (4, 2))], ids=str)
def test_packed_rows_of_circles_in_circles(P: int, mesh: tuple[int, ...]) -> None:
    check_held(runs_of("double_ring", P, EQUAL, mesh), P, mesh)


def check_held(named: dict[str, Run], P: int, mesh: tuple[int, ...] = ()) -> None:
    runs = list(named.values())
    for rank, held in enumerate(run_ranks(hold_on_rank, P, runs, mesh)):
        for name, found, expected in zip(named, held, told(runs, P, mesh, rank), strict=True):
            assert (found.forward, found.backward, found.kept) == expected, (name, rank)


@pytest.mark.parametrize(("P", "mesh"), [(2, ()), (3, ()), (4, (2, 2))], ids=str)
def test_what_every_strategy_keeps(P: int, mesh: tuple[int, ...]) -> None:
    """Also of uneven and missing heads, and of padded rows. Run eagerly, q, k and v are there for a second derivative at most."""
    cases = {
        "uneven heads": replace(FULL, heads=7, kv_heads=7),
        "some ranks without heads": replace(FULL, heads=2, kv_heads=1),
        "padded rows": replace(FULL, q_len=13, k_len=13),
        "cross attention": replace(FULL, q_len=7, k_len=21, value_dim=5),
        "a window": Case(48, 48, mask="window", kv_heads=2, dtype=torch.float32),
    }
    named = {f"{name}: {case}": run for name in NAMES for case, run in runs_of(name, P, cases, mesh).items()}
    runs = list(named.values())
    for rank, held in enumerate(run_ranks(hold_on_rank, P, runs, mesh)):
        for name, found, (*_, kept) in zip(named, held, told(runs, P, mesh, rank), strict=True):
            assert found.kept == kept <= found.kept_eagerly <= kept + found.inputs, (name, rank)


@pytest.mark.parametrize("strategy", PACKED)
def test_a_mask_makes_buffers_no_larger(strategy: str) -> None:
    """What is said of full shards bounds those that the mask leaves parts of."""
    P, cases = 4, {"causal": Case(192, 192, kv_heads=2), "a window": Case(192, 192, mask="window", kv_heads=2)}
    runs = list(runs_of(strategy, P, cases).values())
    for rank, held in enumerate(run_ranks(hold_on_rank, P, runs)):
        for found, (forward, backward, _) in zip(held, told(runs, P, (), rank), strict=True):
            assert found.forward <= forward and found.backward <= backward


@pytest.mark.parametrize("number", [1, 3])
def test_gathering_what_a_mask_leaves(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for everything, and what leaves is packed inside of an operator: no more than that is held, and not much less."""
    runs: list[Run] = [("gather_kv", "zigzag", case) for case in STAGED.values()]
    per_rank = run_ranks(hold_in_stages, 2, runs, number)
    in_stages(monkeypatch, number)
    for rank, held in enumerate(per_rank):
        for run, found, expected in zip(runs, held, told(runs, 2, (), rank), strict=True):
            assert all(most / 2 <= seen <= most for seen, most in zip(found, expected[:2], strict=True)), (run, rank)


STAGED = {
    "heads of several ranks": Case(48, 48, heads=12, kv_heads=12, dtype=torch.float32),
    "grouped heads": Case(48, 48, heads=24, kv_heads=12, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_buffers_of_stages(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In equal stages, to the byte."""
    P = 2 if number < 4 else 3
    runs: list[Run] = []
    for case in STAGED.values():
        runs.append(("ulysses", "contiguous", case))
        runs.append(("gather_kv", "contiguous", replace(case, mask="none")))
    per_rank = run_ranks(hold_in_stages, P, runs, number)
    in_stages(monkeypatch, number)
    for rank, held in enumerate(per_rank):
        for run, found, (forward, backward, _) in zip(runs, held, told(runs, P, (), rank), strict=True):
            assert found[0] == forward, (run, rank)
            # Gloo lets go of what a reduce-scatter sends before that is waited for.
            assert found[1] == backward or (run[0] == "gather_kv" and number > 1 and found[1] < backward), (run, rank)
