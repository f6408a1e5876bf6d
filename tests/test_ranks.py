"""The rank pool itself: results, errors and hangs all come back to the test, and the pool survives them."""

import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from ranks import RankError, run_ranks


def own_pid(rank: int, P: int, word: str) -> tuple[int, int, str, int]:
    assert (dist.get_rank(), dist.get_world_size()) == (rank, P)
    return rank, P, word, os.getpid()


def raise_on_one(rank: int, P: int, culprit: int) -> None:
    if rank == culprit:
        raise ValueError(f"rank {rank} does not like this")


def raise_while_others_wait(rank: int, P: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 leaves the others waiting")
    dist.all_reduce(torch.ones(1))


def hang_on_one(rank: int, P: int) -> None:
    if rank == 1:
        time.sleep(60)


def die_on_one(rank: int, P: int) -> None:
    if rank == 1:
        os._exit(3)


def test_results_come_in_rank_order_from_the_same_processes_each_time() -> None:
    first, second = run_ranks(own_pid, 2, "a"), run_ranks(own_pid, 2, "b")
    assert [result[:3] for result in first] == [(0, 2, "a"), (1, 2, "a")]
    assert [result[3] for result in first] == [result[3] for result in second]
    assert first[0][3] != first[1][3]


def test_an_exception_on_one_rank_reaches_the_test_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 raised ValueError: rank 1 does not like this.*in raise_on_one"):
        run_ranks(raise_on_one, 3, 1)


def test_ranks_that_wait_for_one_that_raised_are_set_free() -> None:
    with pytest.raises(RankError, match="rank 1 raised ValueError: rank 1 leaves the others waiting"):
        run_ranks(raise_while_others_wait, 2)
    assert len(run_ranks(own_pid, 2, "still here")) == 2


@pytest.mark.parametrize(
    ("job", "message"),
    [
        pytest.param(hang_on_one, r"(?s)ranks \[1\] of 2 did not return within 5 s.*in hang_on_one", id="a hang, with its stack"),
        pytest.param(die_on_one, "rank 1 died with exit code 3", id="a death, with its exit code"),
    ],
)
def test_a_lost_rank_is_an_error_and_the_next_job_gets_new_ranks(job: Callable[[int, int], None], message: str) -> None:
    with pytest.raises(RankError, match=message):
        run_ranks(job, 2, timeout_s=5 if job is hang_on_one else 60)
    assert len(run_ranks(own_pid, 2, "new")) == 2


@pytest.mark.parametrize("P", [0, 9])
def test_world_sizes_are_limited(P: int) -> None:
    with pytest.raises(ValueError, match=r"world_size must be 1\.\.8"):
        run_ranks(own_pid, P, "never")
