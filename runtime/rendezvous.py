"""Ranks meet and exchange small messages through the c10d store, and never hang.

A collective that one rank does not enter hangs the others. So wherever ranks might not all come (a gather the user's
program triggers, the comparison of plans at compile time), they first meet here: all come in time, or every rank that came
gets an error naming those that did not, and a rank that comes late gets one too.

The store keeps all state, so nothing is left in the process when a group ends. A round is one meeting of one group on one
topic; each rank's next round is numbered by the store. The round ends by one atomic decision, "all came" or "given up": a
rank cannot arrive just as another stops waiting for it and then go on alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from autoseq.runtime.errors import OptionError, RendezvousError
from autoseq.runtime.groups import SequenceGroup, process_group

log = logging.getLogger("autoseq")

TOLD_AFTER_S = 20.0
SHORTEST_NAP_S = 0.0005
LONGEST_NAP_S = 0.05

_ALL_CAME = "all"
_GIVEN_UP = "given up"


def exchange(group: SequenceGroup, topic: str, payload: bytes, *, timeout_s: float, advice: str = "") -> list[bytes]:
    """Each rank's payload, in rank order, once all ranks of the group came to this topic.

    Raises RendezvousError, within `timeout_s` and on every rank that comes, when some rank does not; `advice` ends its message. Costs
    about seven store requests per rank, and a poll now and then while waiting, which a warning names once where that takes long.
    """
    if group.size == 1:
        return [payload]
    try:
        meeting = _Round.next(group, topic, advice or _ADVICE)
        return meeting.attend(payload, timeout_s)
    except dist.DistNetworkError as error:
        raise RendezvousError(
            f"Rank {group.rank} lost the store while meeting its group {group.name!r} for {topic!r}: {error}. {_STORE_ADVICE}"
        ) from error


_ending_keys: list[str] = []


@contextmanager
def ended_by(key: str) -> Iterator[None]:
    """Within it, a meeting for which this rank waits is given up as soon as the store has `key`, and raises RendezvousError."""
    _ending_keys.append(key)
    try:
        yield
    finally:
        _ending_keys.remove(key)


def first_word(group: SequenceGroup, topic: str, word: str, *, instead_of: str) -> str:
    """What the first rank to come to a topic said: `word`, or what another rank said before. One store request; nobody is waited for.

    A topic serves again: `instead_of` is what was said there the last time, empty for nothing.
    """
    try:
        return _store().compare_set(f"autoseq/{_identity(group, topic)}/word", instead_of, word).decode()
    except dist.DistNetworkError as error:
        raise RendezvousError(f"Rank {group.rank} lost the store: {error}. {_STORE_ADVICE}") from error


def _identity(group: SequenceGroup, topic: str) -> str:
    # Groups of different ranks may share a c10d name, so the name alone would not tell them apart.
    ranks = dist.get_process_group_ranks(process_group(group.name))
    return hashlib.sha256(repr((group.name, ranks, topic)).encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class _Round:
    """One meeting: its keys live under one prefix of the store."""

    store: Any  # a dist.Store; torch's stub lacks has_extended_api and takes no bytes
    prefix: str
    group: SequenceGroup
    topic: str
    advice: str

    @classmethod
    def next(cls, group: SequenceGroup, topic: str, advice: str) -> _Round:
        store, identity = _store(), _identity(group, topic)
        number = store.add(f"autoseq/{identity}/rounds/{group.rank}", 1)
        return cls(store, f"autoseq/{identity}/{number}", group, topic, advice)

    def attend(self, payload: bytes, timeout_s: float) -> list[bytes]:
        self.store.set(self._payload_key(self.group.rank), payload)
        came = self.store.add(f"{self.prefix}/came", 1)
        decision = self._decide(_ALL_CAME) if came == self.group.size else self._await_decision(timeout_s)
        if decision != _ALL_CAME:
            missing = self._missing()
            self._leave()
            raise RendezvousError(self._explain(decision, missing, timeout_s))
        keys = [self._payload_key(rank) for rank in range(self.group.size)]
        payloads = self.store.multi_get(keys) if self.store.has_extended_api() else [self.store.get(key) for key in keys]
        self._leave()
        return payloads

    def _await_decision(self, timeout_s: float) -> str:
        # Store.wait would hold the store's connection, which other threads of the process need, for the whole time.
        start, has_told = time.monotonic(), False
        while not self.store.check([f"{self.prefix}/decision"]):
            waited_s = time.monotonic() - start
            if any(self.store.check([key]) for key in _ending_keys):
                return self._decide(f"{_GIVEN_UP} by rank {self.group.rank}, as another rank ended what it was for")
            if waited_s > timeout_s:
                return self._decide(f"{_GIVEN_UP} by rank {self.group.rank} after {timeout_s:g} s")
            if waited_s > TOLD_AFTER_S and not has_told:
                has_told = True
                self._tell(timeout_s)
            time.sleep(min(LONGEST_NAP_S, SHORTEST_NAP_S + waited_s / 10))
        return self.store.get(f"{self.prefix}/decision").decode()

    def _tell(self, timeout_s: float) -> None:
        """Of the ranks that wait, the first says so."""
        missing = self._missing()
        if missing and self.group.rank == min(rank for rank in range(self.group.size) if rank not in missing):
            log.warning(
                "waiting for %s of group %r to come to %r, since %g s; rank %d gives up after %g s",
                named_ranks(missing), self.group.name, self.topic, TOLD_AFTER_S, self.group.rank, timeout_s,
            )  # fmt: skip

    def _decide(self, decision: str) -> str:
        """The round's decision: this one, unless another rank decided before."""
        return self.store.compare_set(f"{self.prefix}/decision", "", decision).decode()

    def _missing(self) -> list[int]:
        return [rank for rank in range(self.group.size) if not self.store.check([self._payload_key(rank)])]

    def _leave(self) -> None:
        """The last rank out deletes the round; if not all come, the few keys stay, since a late rank must find them."""
        if self.store.add(f"{self.prefix}/left", 1) < self.group.size:
            return
        for rank in range(self.group.size):
            self.store.delete_key(self._payload_key(rank))
        for key in ("came", "decision", "left"):
            self.store.delete_key(f"{self.prefix}/{key}")

    def _payload_key(self, rank: int) -> str:
        return f"{self.prefix}/payload/{rank}"

    def _explain(self, decision: str, missing: list[int], timeout_s: float) -> str:
        where = f"the group {self.group.name!r} of {self.group.size} ranks met for {self.topic!r}"
        if not missing:
            return f"Rank {self.group.rank} came too late when {where}: the meeting was {decision}. {self.advice}"
        return (
            f"Ranks {missing} did not come within {timeout_s:g} s when {where}; the meeting was {decision}. "
            f"This is rank {self.group.rank}. {self.advice}"
        )


_ADVICE = (
    "Every rank must run the same program: look for an earlier error on a rank that is missing, or for a step that only "
    "some ranks take, such as a call of the model under `if rank == 0:`."
)


def named_ranks(ranks: list[int]) -> str:
    """`rank 1`, `ranks [1, 2]`."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks}"


_STORE_ADVICE = "The process that serves it (usually rank 0) has probably ended; look at its log first."


def _store() -> dist.Store:
    try:
        return _get_default_store()
    except ValueError as error:
        raise RendezvousError(
            "torch.distributed was shut down before this rank could meet its group. Use the model's outputs before "
            "destroy_process_group()."
        ) from error


def timeout_s(variable: str, default_s: float) -> float:
    """Seconds to wait, from an environment variable. Raises OptionError if it holds no positive number."""
    text = os.environ.get(variable, str(default_s))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise OptionError(f"{variable} must be a number of seconds above 0, got {text!r}.")
    return seconds
