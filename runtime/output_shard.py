"""What a deferred output holds: this rank's rows and, once something needs them, all rows, for which the ranks meet."""

from __future__ import annotations

import weakref
from itertools import count
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from autoseq.runtime.collectives import ShardedRows
from autoseq.runtime.errors import RankMismatchError, RendezvousError, UnsupportedError
from autoseq.runtime.groups import process_group
from autoseq.runtime.rendezvous import exchange, timeout_s
from autoseq.runtime.whole_value import WholeValue

TIMEOUT_VARIABLE = "AUTOSEQ_GATHER_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 60.0

_TOGETHER = (
    "All ranks read an output's values together: compute on all ranks, print or save on one, as in `value = output[0, 0].item()` before "
    "`if rank == 0: print(value)`. `output.local`, this rank's rows, needs no other rank. If a rank that is missing ended with an error, "
    f"that error comes first. {TIMEOUT_VARIABLE} sets how many seconds are waited."
)


class Watch(Protocol):
    """Hears what becomes of an output."""

    is_read: bool  # by something besides a later part of the program

    def before_read(self, sent_bytes: int) -> None:
        """An operation that is in no part of the program is about to read the values, which are not here; a rank sends so many bytes."""

    def before_gather(self) -> None:
        """The values are about to be gathered."""

    def gradient(self, grad: Tensor) -> None:
        """The gradient of the whole value has come back."""


class OutputShard:
    """What a deferred tensor and its aliases share: this rank's rows and, once it is needed, the whole value."""

    def __init__(self, name: str, shape: tuple[int, ...], local: Tensor, rows: ShardedRows | None, watch: Watch | None = None) -> None:
        self.name, self.shape, self.dtype, self.device = name, shape, local.dtype, local.device
        self.padded, self._rows, self.watch = local, rows, watch
        self.is_taken_in = False  # by a part of the program, which warned of the gather
        self.whole = WholeValue(name)
        self._serial = _next_serial(rows.group.name) if rows else 0

    @classmethod
    def gathered(cls, value: Tensor) -> OutputShard:
        """A whole value, as a compiled function gets it."""
        shard = cls("compiled input", tuple(value.shape), value, None)
        shard.whole.value = value
        return shard

    def replaced(self, value: Tensor) -> OutputShard:
        """Another value in this one's place, of which every rank has the whole."""
        shard = OutputShard(self.name, tuple(value.shape), value, None)
        shard._rows = self._rows if shard.shape == self.shape else None
        shard.whole, shard.is_taken_in = WholeValue(self.name, value.detach(), may_be_written=True), True
        return shard

    def before_read(self) -> None:
        """An operation is about to read the whole value."""
        if self.watch is not None and not (self.is_gathered or self.is_taken_in):
            self.watch.before_read((self.rows.group.size - 1) * self.padded.numel() * self.padded.element_size())

    def full(self) -> Tensor:
        """The whole value, without gradient. Gathered by the first call."""
        self.whole.check_aliases()
        if self.whole.value is None:
            self.whole.value = self._gather()
        return self.whole.value

    @property
    def is_gathered(self) -> bool:
        return self.whole.value is not None

    @property
    def rows(self) -> ShardedRows:
        """The sharded dim. Raises UnsupportedError for a value that came whole into a compiled function."""
        if self._rows is None:
            raise UnsupportedError(f".local of a {self.name} is not known inside torch.compile: take it outside.")
        return self._rows

    def _gather(self) -> Tensor:
        # Whoever watches operations (a FLOP counter, a fake mode) is not meant to see how the value gets here.
        with torch.no_grad(), _disable_current_modes():
            if self.watch is not None:
                self.watch.before_gather()
            self._meet()
            whole = self.rows.gather(self.padded.detach())
            # The value may be written to; the shard may be saved for the backward pass of whatever computed it.
            return whole.contiguous() if self.rows.group.size > 1 else whole.clone(memory_format=torch.contiguous_format)

    def _meet(self) -> None:
        """All ranks come for the same output, or each gets an error."""
        group = self.rows.group
        mine = f"{self.name!r} (number {self._serial} of this group's outputs, {_describe(self.shape, self.dtype)})"
        seconds = timeout_s(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S)
        try:
            theirs = exchange(group, "reading an output's values", mine.encode(), timeout_s=seconds, advice=_TOGETHER)
        except RendezvousError as error:
            raise RendezvousError(f"The output {mine} could not be gathered. {error}") from None
        for rank, other in enumerate(theirs):
            if other.decode() != mine:
                raise RankMismatchError(
                    f"Rank {group.rank} needs the values of the output {mine} while rank {rank} needs those of {other.decode()}. "
                    "Every rank must use the model's outputs in the same order: compute with them on all ranks, and print or save on one."
                )

    def __str__(self) -> str:
        state = "gathered" if self.is_gathered else "not gathered"
        local = tuple(self._rows.trim(self.padded).shape) if self._rows else self.shape
        return f"{self.name!r}, {_describe(self.shape, self.dtype)}, local shape {local}, {state}"


# How many outputs each living group has had: the n-th output on one rank belongs to the n-th on another. Kept by the group
# object, so a group that is made again under an old name counts from the start on every rank.
_counts: weakref.WeakKeyDictionary[dist.ProcessGroup, count[int]] = weakref.WeakKeyDictionary()


def _next_serial(group: str) -> int:
    return next(_counts.setdefault(process_group(group), count(1))) if group else 0


def _describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"shape {shape}, {dtype}"
