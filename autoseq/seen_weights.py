"""The weights of a program as ranks compare them: whole, from time to time, and after writes of a new kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoseq.runtime.fingerprint import SKETCH, sketch

MOST_HABITS = 16
"""Ways to write to weights between two calls that are each a reason to compare them."""


@dataclass(frozen=True, eq=False, slots=True)
class Weights:
    """The whole parameters and buffers of one call of a program, and how often torch has counted a write to the parameters.

    What is known of them is kept by the program and by one of them, `owner`, because layers may share a program. It is the object and not
    its id, which Python may give to another object, on one rank earlier than on another.
    """

    program: int
    owner: Tensor | None
    names: Sequence[str]
    values: Sequence[Tensor]
    writes: int

    def sketches(self, device: torch.device) -> Tensor:
        """[n, 3] on `device`; the weights may be on several."""
        return torch.stack([whole_sketch(x).to(device, non_blocking=True) for x in self.values])


@dataclass(slots=True)
class SeenWeights:
    """Of weights: the writes to them when ranks were last seen to agree, and the number of the message that compared them.

    `habits` are the numbers of writes that lay between two calls, for each step of the optimizer or without one. Another number, such as
    that of loading a checkpoint, is a reason to compare.
    """

    writes: int
    compared_at: int
    before: tuple[int, int]  # writes and optimizer steps at the call before
    habits: set[tuple[int, int]] = field(default_factory=lambda: {(0, 0)})

    def note_habit(self, writes: int, steps: int) -> bool:
        """What was written since the call before; whether that is a new habit. A program that has many is compared on schedule alone."""
        more_writes, more_steps = writes - self.before[0], steps - self.before[1]
        self.before = writes, steps
        habit = divmod(more_writes, more_steps) if more_steps else (0, more_writes)
        if habit in self.habits or len(self.habits) >= MOST_HABITS:
            return False
        self.habits.add(habit)
        return True


def whole_sketch(x: Tensor) -> Tensor:
    """[3]; zeros for values that FSDP has freed."""
    if x.untyped_storage().size() == 0:
        return torch.zeros(SKETCH, device=x.device)
    return sketch(x.detach())
