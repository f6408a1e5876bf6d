"""Every step, ranks of a group compare what they were given: inputs, gradients that come back, weights, calls, steps of the optimizer.

A rank takes fingerprints (`runtime.fingerprint`) of a program's inputs when it is called, and of the gradients that return into its
outputs. They go in one message (`runtime.step_message`): posted when the backward of the first of the calls begins, under which it
travels, and read when the backward ends, before the optimizer steps. A call without gradients posts its own, which is read before the next
is posted, before an output is gathered, or when the group is destroyed. All ranks read the same table, so all of them raise, or none.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.utils.weak import WeakIdKeyDictionary

from autoseq import optimizer_steps
from autoseq.apart import apart
from autoseq.given_differently import Compared, Expected, difference_of_parameters, first_difference
from autoseq.runtime.errors import RankMismatchError
from autoseq.runtime.fingerprint import RELATIVE_TOLERANCE, SKETCH, exact, sketch
from autoseq.runtime.groups import SequenceGroup, process_group
from autoseq.runtime.posted import Posted, post_all_gather
from autoseq.runtime.step_message import StepMessage, counted_apart
from autoseq.seen_weights import SeenWeights, Weights
from autoseq.step_words import Head, Values, fill_on_device, fill_on_host

CALLS_KEPT = 64
"""Calls with gradients that may wait for a backward; then their fingerprints are posted without one."""

FIRST_BACKOFF = 2

_checks: weakref.WeakKeyDictionary[dist.ProcessGroup, StepCheck] = weakref.WeakKeyDictionary()


def step_check(group: SequenceGroup) -> StepCheck:
    """The comparison of a group, which starts anew where the group is made again."""
    process = process_group(group.name)
    known = _checks.get(process)
    if known is None:
        known = _checks[process] = StepCheck(group, weakref.ref(process))
    return known


def checks_of(group: object) -> list[StepCheck]:
    """That of one process group, if it has one; of None, those of all groups."""
    return [check for process, check in _checks.items() if group is None or process is group]


@dataclass(eq=False, slots=True)
class _Pending:
    """What this rank was given since the last message."""

    calls: list[str] = field(default_factory=list)
    hashed: list[tuple[Sequence[str], Tensor | list[int]]] = field(default_factory=list)
    sketched: list[tuple[str, float, Tensor | list[float]]] = field(default_factory=list)
    weights: list[tuple[Weights, SeenWeights]] = field(default_factory=list)
    due: dict[int, Tensor] = field(default_factory=dict)  # sketches of those weights, by their places in `weights`
    is_new_habit: bool = False

    def __bool__(self) -> bool:
        return bool(self.calls or self.sketched)

    def due_bits(self) -> int:
        """12 bits that say which weights are due; 0 for none."""
        return 1 + zlib.crc32(repr([*self.due]).encode()) % 0xFFF if self.due else 0


class StepCheck:
    """What one group's ranks compare; `number` counts the messages."""

    def __init__(self, group: SequenceGroup, process: weakref.ref[dist.ProcessGroup]) -> None:
        self._group, self._process, self.number = group, process, 0
        self._log, self._steps_before = 0, optimizer_steps.count()
        self._pending, self._waiting = _Pending(), set[int]()
        self._device, self._messages = torch.device("cpu"), dict[torch.device, StepMessage]()
        self._posted: tuple[_Pending, Expected, StepMessage] | None = None
        self._task = -1
        self._seen: MutableMapping[Any, dict[int, SeenWeights]] = WeakIdKeyDictionary()  # of an owner: what is known by program
        self._backoff, self._trusted_until = FIRST_BACKOFF, 0

    # What was given

    def note(self, call: str, device: torch.device, *facts: object) -> None:
        """A program is called, whose tensors are on `device`; `facts` are numbers that ranks share."""
        if not self._pending.calls or device.type != "cpu":
            self._device = device
        self._pending.calls.append(call)
        self._log = hash((self._log, *facts)) & 0xFFFFFFFF

    def hash_integers(self, names: Sequence[str], values: Sequence[Tensor]) -> None:
        """Integers and booleans, which are to be equal."""
        devices = {x.device for x in values}
        if len(devices) == 1:
            self._pending.hashed.append((names, exact(values)))
            return
        for name, value in zip(names, values, strict=True):
            self._pending.hashed.append(([name], exact([value])))

    def sketch_floats(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        """Floats, which are to be equal up to rounding in `dtype`: `value` may be a wider form of them."""
        tolerance = RELATIVE_TOLERANCE.get(dtype, RELATIVE_TOLERANCE[torch.float32])
        sketched = sketch(value)
        self._pending.sketched.append((name, tolerance, sketched if sketched.is_cuda else sketched.tolist()))

    def have_weights(self, weights: Weights, *, every: int, agreed: bool = False) -> None:
        """Weights of a call. They are compared at the first, every so many messages, and when ranks wrote to them differently."""
        if not weights.values:
            return
        by_program = self._seen.setdefault(weights.owner, {})
        seen = by_program.get(weights.program)
        if seen is None or agreed:
            before = weights.writes, optimizer_steps.count()
            by_program[weights.program] = seen = SeenWeights(weights.writes, self.number if agreed else -1, before)
        if agreed:
            return
        self._pending.weights.append((weights, seen))
        self._pending.is_new_habit |= seen.note_habit(weights.writes, optimizer_steps.count())
        if seen.compared_at < 0 or (every and self.number - seen.compared_at >= every):
            seen.compared_at = self.number
            self._pending.due[len(self._pending.weights) - 1] = weights.sketches(self._device)

    def expect_backward(self, call: int) -> None:
        """The outputs of a call have a backward, which begins with `backward_of`."""
        self._waiting.add(call)
        if len(self._waiting) > CALLS_KEPT:
            self._waiting.clear()
            self.post()

    # When it is compared

    def backward_of(self, call: int) -> None:
        """The backward of a call begins: with that of the last that waits, everything has come."""
        self._waiting.discard(call)
        self.read_after_backward()
        if not self._waiting:
            self.post()

    def read_after_backward(self) -> None:
        """What is posted, or comes late, is read when the running backward ends."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            Variable._execution_engine.queue_callback(self._end_backward)
            self._task = task

    def _end_backward(self) -> None:
        self._waiting.clear()
        self.post()
        self.read()

    def post(self) -> None:
        """Send what is pending to all ranks, after reading what was sent before."""
        self.read()
        if not self._pending:
            return
        pending, self._pending = self._pending, _Pending()
        with apart():
            expected, message = self._fill(pending)
            message.post()
        self.number += 1
        self._posted = pending, expected, message

    def read(self) -> None:
        """Compare what was posted. Raises RankMismatchError on every rank of the group, and starts anew then."""
        if self._posted is None:
            return
        (pending, expected, message), self._posted = self._posted, None
        rows = message.rows()
        if not pending.due and not pending.is_new_habit and all(row == rows[0] for row in rows):
            return
        compared = Compared(self._group, rows, expected)
        difference = first_difference(compared)
        if difference is None:
            difference = self._compare_weights(compared, pending, message.device)
        if difference is not None:
            self._forget()
            raise RankMismatchError(difference)

    def drop(self) -> None:
        """The group ends."""
        self._posted = None
        self._forget()

    def _forget(self) -> None:
        process = self._process()
        if process is not None:
            _checks.pop(process, None)

    def has_arrived(self) -> bool:
        """Whether `read` would not wait."""
        return self._posted is None or self._posted[2].has_arrived()

    def _compare_weights(self, compared: Compared, pending: _Pending, device: torch.device) -> str | None:
        """Those that are due, or all of them where ranks wrote to them differently. The table of all ranks says which: they send alike."""
        writes_to_compare = compared.writes_differ and self.number > self._trusted_until
        is_all = compared.a_habit_is_new or compared.due_differs or writes_to_compare
        asked = [pending.weights[place] for place in (range(len(pending.weights)) if is_all else pending.due)]
        if not asked:
            return None
        with apart():
            sketches = self._sketches_of_all(pending, device, is_all=is_all, at_call=not compared.due_differs)
        named = [pair for weights, _ in asked for pair in zip(weights.names, weights.values, strict=True)]
        difference = difference_of_parameters(compared, named, sketches)
        for _, seen in asked:
            seen.compared_at = compared.expected.number
        if difference is None and compared.writes_differ and len(asked) == len(pending.weights):
            # Equal although written differently (a broadcast writes on its receivers alone): compare less and less often for that.
            if self.number > self._trusted_until:
                self._trusted_until, self._backoff = self.number + self._backoff, self._backoff * 2
            for weights, seen in asked:
                seen.writes = weights.writes
        return difference

    def _sketches_of_all(self, pending: _Pending, device: torch.device, *, is_all: bool, at_call: bool) -> list[Any]:
        """Of each rank, the asked weights' sketches: those of their call, if that is when all ranks took them, or of now."""
        known = pending.due if at_call else {}
        places = range(len(pending.weights)) if is_all else pending.due
        mine = [known[i].to(device) if i in known else pending.weights[i][0].sketches(device) for i in places]
        return _gathered(self._group, torch.cat(mine)).arrived().view(self._group.size, -1, SKETCH).tolist()

    # The message

    def _fill(self, pending: _Pending) -> tuple[Expected, StepMessage]:
        names = [name for group, _ in pending.hashed for name in group]
        floats = [(name, tolerance) for name, tolerance, _ in pending.sketched]
        steps = optimizer_steps.count() - self._steps_before
        writes = sum(weights.writes - seen.writes for weights, seen in pending.weights)
        log = hash((self._log, len(names), len(floats))) & 0xFFFFFF
        head = Head(log, steps, writes, pending.due_bits(), pending.is_new_habit)
        expected = Expected(self.number, steps, pending.calls, names, floats)
        hashes, sketches = [values for _, values in pending.hashed], [values for _, _, values in pending.sketched]
        message = self._message_for((*hashes, *sketches))
        if message.memory is None:
            fill_on_device(message, head, hashes, sketches, expected.fits)
        else:
            fill_on_host(message, head, [each for values in hashes for each in values], sketches, expected.fits)  # type: ignore[arg-type]
        return expected, message

    def _message_for(self, values: Sequence[Values]) -> StepMessage:
        """On the device of the programs that were called, whether or not this step has fingerprints there, for NCCL sends nothing else."""
        computed = (x.device for x in values if isinstance(x, Tensor))
        device = self._device if self._device.type != "cpu" else next(computed, self._device)
        if device not in self._messages:
            self._messages[device] = StepMessage(self._group, device)
        return self._messages[device]


def _gathered(group: SequenceGroup, sketches: Tensor) -> Posted:
    with counted_apart():
        return post_all_gather(group, sketches.contiguous().view(-1))
