"""Other lengths and numbers of ranks: which a sweep asks for, where strategies overtake, and what would fit when nothing does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from autoseq.plan_model import plan_training
from autoseq.planning.choice import three_digits
from autoseq.planning.degrees import candidates
from autoseq.planning.presets import load_topology
from autoseq.planning.sweep import overtakings, sweep, values_of, would_fit
from autoseq.planning.training import Training
from autoseq.runtime.errors import PlanError
from trainings import H100, looked, training

# What would fit -------------------------------------------------------------------------------------------------------


def test_a_limit_that_nothing_fits_says_what_would() -> None:
    with pytest.raises(PlanError) as caught:
        plan_training(looked(training(batch=1)), seq_len=65536, world_size=4, topology=H100, memory_gib=8)
    message = str(caught.value)
    assert "no plan fits in 8.59 GB a rank: the smallest, 1 × 4" in message
    assert re.search(r"What would fit: .*tokens: [\d.]+ GB a rank", message)


@pytest.mark.parametrize(
    ("change", "of"),
    [
        pytest.param(r"\(--shard-parameters\)$", lambda asked: replace(asked, shard_parameters=True), id="sharded parameters"),
        pytest.param("^activation checkpointing", Training.checkpointed, id="layers computed again"),
        pytest.param("^a sequence of 32,768 tokens$", lambda asked: asked.at(seq_len=32768), id="a shorter sequence"),
    ],
)
def test_what_would_fit_does_and_needs_what_is_said(change: str, of: Callable[[Training], Training]) -> None:
    asked, limit = training(batch=1, seq_len=65536, layers=4), replace(H100, memory_bytes=int(19e9))
    assert not candidates(asked, 4, limit)[0].fits
    ((_, size),) = [each for each in would_fit(looked(asked), 65536, 4, limit) if re.search(change, each[0])]
    best = candidates(of(asked), 4, limit)[0]
    assert best.fits and best.memory.total == size


def test_a_share_of_the_memory_is_kept_free() -> None:
    plan = partial(plan_training, looked(training(batch=1)), seq_len=8192, world_size=4)
    needs = plan(topology=H100).best.memory.total
    limit = replace(H100, memory_bytes=int(needs * 1.04))
    assert plan(topology=limit).best.memory.total == needs
    with pytest.raises(PlanError, match=r"more are kept free, --reserve"):
        plan(topology=limit, strategy="ulysses", layout="contiguous", reserve=0.2)


# Sweeps ---------------------------------------------------------------------------------------------------------------


def test_a_sweep_has_a_point_for_each_value_and_finds_where_strategies_overtake() -> None:
    points = sweep(looked(training(batch=1, layers=1)), 8192, 8, H100, "seq-len")
    assert [point.value for point in points] == [8192 * 2**k // 16 for k in range(9)]
    for point in points:
        assert point.best is not None
        alone = [seconds for seconds in point.seconds.values() if seconds is not None]
        assert three_digits(point.best.seconds) <= three_digits(min(alone))  # what is the same in three digits goes to the simpler
        assert point.seconds["halo"] is None and point.seconds["ring"] is not None
    for value, before, after in overtakings(points):
        assert value in [point.value for point in points] and before != after


VALUES: dict[str, tuple[Any, dict[str, int], int, str, list[int]]] = {
    "ranks that fill nodes": ("world-size", {}, 16, "2x8xA800-4nic", [1, 2, 4, 8, 16]),
    "a part of a node": ("world-size", {}, 6, "8xH100", [1, 2, 4, 6]),
    "lengths that have a token for each rank": ("seq-len", {"seq_len": 64, "batch": 1}, 16, "2x8xA800-4nic", [16 << k for k in range(7)]),
    "shorter ones, where copies of the data share the ranks": (
        "seq-len", {"seq_len": 16, "batch": 64}, 512, "64x8xH100", [8, 16, 32, 64, 128, 256]
    ),
    "the length itself, though nothing can share it": ("seq-len", {"seq_len": 16, "batch": 1}, 256, "32x8xH100", [16, 256]),
}  # fmt: skip


@pytest.mark.parametrize(("over", "of", "ranks", "hardware", "expected"), VALUES.values(), ids=VALUES)
def test_what_a_sweep_asks_for(over: Any, of: dict[str, int], ranks: int, hardware: str, expected: list[int]) -> None:
    assert values_of(over, training(**{"batch": 1, **of}), ranks, load_topology(hardware)) == expected


def test_a_sweep_of_ranks_has_the_strategy_that_was_asked_for() -> None:
    points = sweep(looked(training(batch=1, layers=1)), 8192, 6, H100, "world-size", strategy="ring")
    served = [(point.value, point.best and point.best.strategies) for point in points]
    assert served == [(1, {"local": 1}), (2, {"ring": 1}), (4, {"ring": 1}), (6, {"ring": 1})]
