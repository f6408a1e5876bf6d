"""What a ring does besides giving the right numbers: when it posts, what it holds, and that it gives the same bits every time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attention_job import attend_on_rank, largest_held, site_of
from autoseq.runtime import circle
from autoseq.runtime.blockwise import Backward, Forward
from autoseq.runtime.strategies import STRATEGIES
from dense_attention import Case
from ranks import run_ranks

RINGS = ["ring", "bidirectional_ring"]
FULL = Case(64, 64, mask="none", kv_heads=2, dtype=torch.bfloat16)


def record_order(rank: int, P: int, strategy: str, case: Case) -> list[str]:
    """Posts, work and waits of a forward and a backward, in the order in which they happen."""
    events: list[str] = []
    posts = circle.post

    def post(op: str, group: Any, when: str, messages: Any) -> Any:
        pending = posts(op, group, when, messages)
        if not pending.works:
            return pending
        events.append("post")
        return _Waited(pending, events)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circle, "post", post)
        for kind in (Forward, Backward):
            patch.setattr(kind, "add", _recorded(kind.add, events))
        attend_on_rank(rank, P, strategy, "zigzag", case)
    return events


class _Waited:
    def __init__(self, pending: Any, events: list[str]) -> None:
        self._pending, self._events = pending, events

    def wait(self) -> None:
        self._events.append("wait")
        self._pending.wait()


def _recorded(add: Any, events: list[str]) -> Any:
    def recorded(self: Any, *args: Any) -> None:
        events.append("work")
        add(self, *args)

    return recorded


def test_every_hop_is_posted_before_the_block_it_hides_behind() -> None:
    """Forward: hop i+1 is in flight under block i. Backward: it starts with the keys that are there, and so does the way home."""
    hop = ["post", "work", "wait"]
    for events in run_ranks(record_order, 4, "ring", FULL):
        forward = [*hop * 3, "work"]
        assert events == forward + [*hop * 3, *hop]
    both = ["post", "post", "work", "work", "wait", "post", "wait", "post"]
    for events in run_ranks(record_order, 4, "bidirectional_ring", FULL):
        assert events[:3] == ["post", "post", "work"], "one's own keys are worked on under the first hop of both directions"
        assert "".join(event[0] for event in both[2:]) in "".join(event[0] for event in events)
        assert events.count("post") == events.count("wait") == 2 * (3 + 4)


@pytest.mark.parametrize("strategy", RINGS)
def test_what_a_ring_holds_does_not_grow_with_ranks(strategy: str) -> None:
    """Two buffers of keys and three of float32 gradients (leaving, arriving, found here), whatever P."""
    for P in (2, 4, 8):
        keys = FULL.kv_heads * (FULL.k_len // P) * (FULL.head_dim + FULL.value_dim)
        for held in run_ranks(largest_held, P, strategy, FULL):
            assert held <= 2 * keys * 2 + 3 * keys * 4


FEW = Case(8, 512, mask="none", kv_heads=4)


def test_the_bidirectional_ring_sends_whatever_is_less() -> None:
    """Keys for self-attention, also with many KV heads; queries and results where the queries are few."""
    for case, by_queries in [(FULL, False), (replace(FULL, kv_heads=4), False), (FEW, True), (replace(FEW, dtype=torch.float16), True)]:
        ring, both = (STRATEGIES[name].cost(site_of(case), 4, "contiguous") for name in RINGS)
        assert (both.step_bytes < ring.step_bytes) if by_queries else (both.step_bytes == ring.step_bytes)


def attend_twice(rank: int, P: int, strategy: str, case: Case) -> bool:
    first, second = (attend_on_rank(rank, P, strategy, "zigzag", case) for _ in range(2))
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("strategy", RINGS)
def test_a_ring_gives_the_same_bits_every_time(strategy: str) -> None:
    assert all(run_ranks(attend_twice, 4, strategy, Case(64, 64, kv_heads=2, dtype=torch.float32)))
