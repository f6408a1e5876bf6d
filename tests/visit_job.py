"""What a rank does in the tests of strategies whose ranks visit each other: attend, and tell what was posted and worked on, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from attention_job import Run, attend_on_rank
from autoseq.runtime import visit_op
from autoseq.runtime.blockwise import Backward, Forward
from autoseq.runtime.messages import Message, Pending

Sent = tuple[int, int, torch.dtype]
"""(to, elements, dtype)."""

Event = tuple[str, list[Sent]]
"""("post", what leaves), ("wait", []) or ("work", []); posts and waits where nothing leaves or comes are left out."""


def record_on_rank(rank: int, P: int, runs: Sequence[Run]) -> list[list[Event]]:
    """The events of each run, forward and backward."""
    return [_record(rank, P, *run) for run in runs]


def _record(rank: int, P: int, *run: Any) -> list[Event]:
    events: list[Event] = []
    posts = visit_op.post

    def post(op: str, group: Any, when: str, messages: Sequence[Message]) -> Any:
        pending = posts(op, group, when, messages)
        sent = [(m.to, m.leaving.numel(), m.leaving.dtype) for m in messages if m.leaving is not None]
        if pending.works:
            events.append(("post", sent))
        return _Waited(pending, events)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visit_op, "post", post)
        for kind in (Forward, Backward):
            patch.setattr(kind, "add", _recorded(kind.add, events))
        attend_on_rank(rank, P, *run)
    return events


class _Waited:
    def __init__(self, pending: Pending, events: list[Event]) -> None:
        self._pending, self._events = pending, events

    def wait(self) -> None:
        if self._pending.works:
            self._events.append(("wait", []))
        self._pending.wait()


def _recorded(add: Any, events: list[Event]) -> Any:
    def recorded(self: Any, *args: Any) -> None:
        events.append(("work", []))
        add(self, *args)

    return recorded


def kinds(events: Sequence[Event]) -> list[str]:
    return [kind for kind, _ in events]


def all_sent(events: Sequence[Event]) -> list[Sent]:
    return [sent for _, leaving in events for sent in leaving]


def attend_twice(rank: int, P: int, runs: Sequence[Run]) -> list[bool]:
    """Whether each run gives the same bits again."""
    twice = [(attend_on_rank(rank, P, *run), attend_on_rank(rank, P, *run)) for run in runs]
    return [all(torch.equal(x, y) for x, y in zip(*pair, strict=True)) for pair in twice]
