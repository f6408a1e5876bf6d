"""Dropout's bits: as many are kept as asked for, each is a function of its own position, and no row repeats another."""

from __future__ import annotations

import pytest
import torch

from autoseq.runtime.formula import Points
from autoseq.runtime.hashing import _mix_in_place, dropout_weights, keep_mask, mix

SEED = torch.tensor(2**41 + 7)


def points(batch: int = 2, heads: range = range(3), q: range = range(200), k: range = range(300)) -> Points:
    return Points.of(batch, heads, *(torch.arange(at.start, at.stop) for at in (q, k)))


def test_the_hash_is_murmurs() -> None:
    """Reference values of the 32-bit finalizer, computed with Python's integers."""

    def reference(x: int) -> int:
        for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
            x = (x ^ (x >> shift)) * multiplier & 0xFFFFFFFF
        return x ^ (x >> 16)

    numbers = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 123456789]
    assert mix(torch.tensor(numbers)).tolist() == [reference(x) for x in numbers]
    assert mix(torch.tensor(2**32 + 5)).item() == reference(5)
    assert torch.equal(_mix_in_place(torch.tensor(numbers)), mix(torch.tensor(numbers)))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_as_many_are_kept_as_asked_for(p: float) -> None:
    kept = keep_mask(SEED, points(), p).double()
    # 360,000 draws: the standard deviation of the mean is at most 0.0009.
    assert abs(kept.mean().item() - (1 - p)) < 0.004
    weights = dropout_weights(SEED, points(), p, torch.float64)
    assert torch.equal(weights, kept / (1 - p) if p < 1 else torch.zeros_like(kept))


def test_a_part_draws_what_the_whole_draws() -> None:
    whole = keep_mask(SEED, points(), 0.5)
    part = keep_mask(SEED, points(heads=range(1, 3), q=range(50, 60), k=range(100, 300)), 0.5)
    assert torch.equal(part, whole[:, 1:, 50:60, 100:])


def test_rows_heads_batches_and_seeds_draw_their_own() -> None:
    """No two of 1,200 rows agree in more than chance explains, not even when one is shifted; nor do two seeds."""
    rows = keep_mask(SEED, points(), 0.5).double().flatten(0, 2) * 2 - 1
    other = keep_mask(SEED + 2**33, points(), 0.5).double().flatten(0, 2) * 2 - 1
    for shift in (0, 1, 7):
        agreement = rows[:, shift:] @ rows[:, : 300 - shift].T / (300 - shift)
        if shift == 0:
            agreement.fill_diagonal_(0)
        # 1.4 million pairs of 293 or more bits: six standard deviations are 0.35, and a copy would be 1.
        assert agreement.abs().max() < 0.4
    assert abs((rows * other).mean().item()) < 0.01
