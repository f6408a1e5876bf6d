"""Ranks that autoseq starts itself: results, progress, and no failure that hangs or hides."""

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from autoseq.launch import LaunchError, Rank, run_ranks
from autoseq.runtime.errors import StrategyError


def total(rank: Rank, start: float) -> float:
    rank.tell(("reporting", rank.index))
    x = torch.full((1,), start + rank.index, device=rank.device)
    dist.all_reduce(x)
    return x.item()


def raises(rank: Rank, error: Exception) -> None:
    if rank.index == 1:
        raise error
    dist.barrier()


def dies(rank: Rank) -> None:
    if rank.index == 1:
        os._exit(3)
    dist.barrier()


def hangs(rank: Rank) -> None:
    time.sleep(60)


def test_results_come_in_rank_order_and_messages_on_the_way() -> None:
    told: list[Any] = []
    assert run_ranks(total, 2, 10.0, listen=lambda rank, message: told.append((rank, message))) == [21.0, 21.0]
    assert sorted(told) == [(0, ("reporting", 0)), (1, ("reporting", 1))]


@pytest.mark.parametrize(
    ("fn", "arguments", "error", "message"),
    [
        pytest.param(raises, (StrategyError("few heads"),), StrategyError, "^few heads$", id="autoseq's own errors arrive as they are"),
        pytest.param(raises, (KeyError("x"),), LaunchError, "^rank 1 failed: KeyError: 'x'$", id="any other names rank and type"),
        pytest.param(dies, (), LaunchError, "^rank 1 ended with exit code 3 before it returned$", id="a rank that dies"),
    ],
)
def test_one_ranks_failure_ends_all_within_seconds(fn: Any, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_ranks(fn, 2, *arguments, timeout_s=60)


def test_ranks_that_never_return_are_stopped() -> None:
    with pytest.raises(LaunchError, match=r"ranks \[0\] were not done after 8 s and were stopped"):
        run_ranks(hangs, 1, timeout_s=8)
