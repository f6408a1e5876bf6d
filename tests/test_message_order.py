"""Point-to-point messages by NCCL's rules, without a GPU: no tags, and the batches of a group one after the other.

Over gloo a message is found by its tag, so ranks that post theirs in different orders get along. Over NCCL they would wait for each
other for ever. What ranks post and wait for is recorded over gloo and replayed by the stricter rules.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch.distributed as dist

from attention_job import SPLIT, Run, attend_on_rank, runs_of
from autoseq.runtime import messages
from dense_attention import MASKS, Case
from ranks import run_ranks


@dataclass
class Batch:
    """Messages that were posted together, as (peer, elements), or the wait for a batch."""

    number: int
    sends: list[tuple[int, int]] = field(default_factory=list)
    receives: list[tuple[int, int]] = field(default_factory=list)
    is_wait: bool = False


def record(rank: int, P: int, runs: dict[str, Run]) -> list[list[Batch]]:
    """What this rank posts and waits for, run by run."""
    logs = []
    for run in runs.values():
        log: list[Batch] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(messages.dist, "batch_isend_irecv", _recorded(dist.batch_isend_irecv, log))
            attend_on_rank(rank, P, *run)
        logs.append(log)
    return logs


def _recorded(post: Any, log: list[Batch]) -> Any:
    def recorded(operations: list[dist.P2POp]) -> list[Any]:
        batch = Batch(len(log))
        for one in operations:
            (batch.sends if one.op is dist.isend else batch.receives).append((one.group_peer, one.tensor.numel()))
        log.append(batch)
        return [_Work(work, batch.number, log) for work in post(operations)]

    return recorded


class _Work:
    def __init__(self, work: Any, number: int, log: list[Batch]) -> None:
        self._work, self._number, self._log = work, number, log

    def wait(self) -> None:
        self._log.append(Batch(self._number, is_wait=True))
        self._work.wait()


def stuck(logs: list[list[Batch]]) -> list[int]:
    """The ranks that never come to an end. A rank's first batch runs, the others wait for it; a batch is done when all is matched."""
    todo, running = [deque(log) for log in logs], [deque() for _ in logs]
    done: set[tuple[int, int]] = set()
    moved = True
    while moved:
        moved = False
        for rank, log in enumerate(todo):
            while log and (not log[0].is_wait or (rank, log[0].number) in done):
                step = log.popleft()
                moved = True
                if not step.is_wait:
                    running[rank].append(Batch(step.number, list(step.sends), list(step.receives)))
        moved |= sum(_match(rank, running) for rank in range(len(logs))) > 0
        for rank, queue in enumerate(running):
            while queue and not queue[0].sends and not queue[0].receives:
                done.add((rank, queue.popleft().number))
                moved = True
    return [rank for rank in range(len(logs)) if todo[rank] or running[rank]]


def _match(rank: int, running: list[deque[Batch]]) -> bool:
    """Deliver what the running batch of a rank sends to running batches that receive it."""
    matched = False
    for peer, elements in list(running[rank][0].sends) if running[rank] else []:
        expected = [message for message in running[peer][0].receives if message[0] == rank] if running[peer] else []
        if expected:
            assert expected[0][1] == elements, f"rank {rank} sends {elements} elements where rank {peer} expects {expected[0][1]}"
            running[rank][0].sends.remove((peer, elements))
            running[peer][0].receives.remove(expected[0])
            matched = True
    return matched


def test_the_rules_find_a_deadlock() -> None:
    """Two ranks that post the same messages in opposite orders."""
    here = [Batch(0, sends=[(1, 8)]), Batch(1, receives=[(1, 8)]), Batch(1, is_wait=True)]
    same = [Batch(0, receives=[(0, 8)]), Batch(1, sends=[(0, 8)]), Batch(1, is_wait=True)]
    other = [Batch(0, sends=[(0, 8)]), Batch(1, receives=[(0, 8)]), Batch(1, is_wait=True)]
    assert stuck([here, same]) == []
    assert stuck([here, other]) == [0, 1]


@pytest.mark.parametrize("P", [3, 4])
def test_no_strategy_waits_for_ever(P: int) -> None:
    cases = {f"{mask}, {n}": Case(n, n, mask=mask, seed=1) for mask in MASKS for n in (24, 60)}
    runs = {f"{strategy}: {name}": run for strategy in SPLIT for name, run in runs_of(strategy, P, cases).items()}
    per_rank = run_ranks(record, P, runs)
    assert sum(len(log) for log in per_rank[0]) > 0
    assert [name for i, name in enumerate(runs) if stuck([logs[i] for logs in per_rank])] == []
