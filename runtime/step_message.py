"""The message by which ranks compare a step: 64 bytes of every rank, gathered by every rank, posted now and read later.

It is one collective among those of the program, so every rank posts it at the same place among them. Its bytes are counted apart from
the program's (`runtime.counting.check_counters`). On a GPU the answer is copied to the host behind the collective, on a stream of its own:
reading waits for that copy alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from autoseq.runtime.groups import SequenceGroup, process_group
from autoseq.runtime.messages import Described

MESSAGE_BYTES = 64
_WHAT = "the comparison of what ranks were given"

_posting = threading.local()


def posts_a_comparison() -> bool:
    """Whether this thread posts a comparison, not a message of the program."""
    return getattr(_posting, "now", False)


@contextmanager
def counted_apart() -> Iterator[None]:
    """Messages posted within it are a comparison's."""
    _posting.now = True
    try:
        yield
    finally:
        _posting.now = False


class StepMessage:
    """One group's message, used again for every step. `words` and `floats` are the same 64 bytes, 8 integers or 16 floats, to be filled."""

    def __init__(self, group: SequenceGroup, device: torch.device) -> None:
        self._group = group
        with torch.inference_mode(False):
            self.words = torch.zeros(MESSAGE_BYTES // 8, dtype=torch.int64, device=device)
            self.floats = self.words.view(torch.float32)
            self._all = torch.zeros(group.size * MESSAGE_BYTES // 8, dtype=torch.int64, device=device)
            self._host = torch.zeros_like(self._all, device="cpu", pin_memory=True) if device.type == "cuda" else self._all
        self.memory = self.words.numpy().view("uint8") if device.type == "cpu" else None  # of `words`, to be written without operators
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._work: dist.Work | None = None

    @property
    def device(self) -> torch.device:
        return self.words.device

    def post(self) -> None:
        """Send `words`. Sends (P-1) times 64 bytes."""
        with counted_apart(), Described(_WHAT, self._group):
            # Not dist.all_gather_into_tensor, which takes twice the host's time.
            self._work = process_group(self._group.name)._allgather_base(self._all, self.words)
        if self._copying is not None and self._copied is not None:
            with torch.cuda.stream(self._copying):
                self._wait()
                self._host.copy_(self._all, non_blocking=True)
                self._copied.record()

    def has_arrived(self) -> bool:
        """Whether `rows` would not wait."""
        if self._copied is not None:
            return self._copied.query()
        return self._work is None or self._work.is_completed()

    def rows(self) -> list[bytes]:
        """The 64 bytes of each rank. Waits for them. Raises MessageError."""
        if self._copied is not None:
            self._copied.synchronize()
        else:
            self._wait()
        self._work = None
        everyone = self._host.numpy().tobytes()
        return [everyone[start : start + MESSAGE_BYTES] for start in range(0, len(everyone), MESSAGE_BYTES)]

    def _wait(self) -> None:
        assert self._work is not None
        with Described(f"waiting for {_WHAT}", self._group):
            self._work.wait()
