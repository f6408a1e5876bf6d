"""The one place where the ranks of a group meet before they run a program, and what they have agreed on there.

A rank that calls its program and a rank that compiles another find each other here, as neither waits elsewhere.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist

from autoseq.runtime.errors import RankMismatchError, RendezvousError
from autoseq.runtime.groups import SequenceGroup, process_group
from autoseq.runtime.rendezvous import exchange

WORDS_KEPT = 64
"""Calls by which one rank may be ahead of another and still be compared with it: collectives keep them closer than that."""


@dataclass(slots=True)
class Agreed:
    """What the ranks of a group have met for; the same on each, as nothing is added before all have come."""

    combinations: set[str] = field(default_factory=set)  # of a program and its shapes
    token: str = ""  # of this record, and of no other that a group of this name had
    calls: int = 0  # since there were two combinations
    words: deque[str] = field(default_factory=lambda: deque([""] * WORDS_KEPT, WORDS_KEPT))


# Kept by the group object, so a group that is made again under an old name starts anew on every rank.
_records: weakref.WeakKeyDictionary[dist.ProcessGroup, Agreed] = weakref.WeakKeyDictionary()


def agreed(group: SequenceGroup) -> Agreed:
    """The record of a group."""
    return _records.setdefault(process_group(group.name), Agreed())


def meet(group: SequenceGroup, purpose: str, payload: bytes, seconds: float) -> list[bytes]:
    """Each rank's payload, once all ranks came for the same purpose, which completes "rank 1 ...".

    Raises RankMismatchError when purposes differ, RendezvousError when a rank does not come.
    """
    mine = purpose.encode() + b"\0" + payload
    with forgotten_on_failure(group):
        replies = [reply.partition(b"\0") for reply in exchange(group, "program and inputs", mine, timeout_s=seconds)]
        purposes = [theirs.decode() for theirs, _, _ in replies]
        for rank, other in enumerate(purposes):
            if other != purposes[0]:
                raise RankMismatchError(
                    f"rank 0 of group {group.name!r} {purposes[0]}, and rank {rank} {other}. Nothing was sent. A call with other shapes "
                    "may need another program: every rank must make the same calls, in the same order, with the same full-length inputs."
                )
    return [theirs for _, _, theirs in replies]


@contextmanager
def forgotten_on_failure(group: SequenceGroup) -> Iterator[None]:
    """Ranks that disagreed may have counted differently since: if the program goes on, they meet anew."""
    try:
        yield
    except (RankMismatchError, RendezvousError):
        _records.pop(process_group(group.name), None)
        raise
