"""Reads the table of a step's comparison: what differs, on which ranks, at which step, and how ranks get equal batches.

Every rank has the same table, so every rank comes to the same end.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from autoseq.runtime.errors import OptionError
from autoseq.runtime.fingerprint import RELATIVE_TOLERANCE, far_apart, far_apart_combined
from autoseq.runtime.groups import SequenceGroup
from autoseq.step_words import Head, fits, hash_in, sketch_in

TOLERANCE_VARIABLE = "AUTOSEQ_CHECK_TOLERANCE"

PARAMETER_TOLERANCE = 1e-4
"""Relative L2 difference of a parameter that ranks may have, at least: rounding adds up from step to step."""


def parameter_tolerance(dtype: torch.dtype) -> float:
    """For parameters, buffers and the inputs of a first call."""
    return max(PARAMETER_TOLERANCE, RELATIVE_TOLERANCE.get(dtype, 0.0)) * tolerance_factor()


EQUAL_BATCHES = (
    "Every rank of a sequence group gets the same, full-length inputs, labels and weights; autoseq takes each rank's part itself. "
    "In a plain loop: seed every rank alike, and let no sampler deal batches to the ranks of a group. DistributedSampler: with "
    "mesh = autoseq.sequence_mesh(n), num_replicas=mesh['data'].size() and rank=mesh['data'].get_local_rank(). Trainer: "
    "autoseq.hf.attach(trainer, sequence=n). accelerate: autoseq.hf.attach(accelerator, model, sequence=n) before prepare(). "
    "docs/equal_batches.md has more."
)


def tolerance_factor() -> float:
    """By how much the tolerances of floats are multiplied. Raises OptionError."""
    text = os.environ.get(TOLERANCE_VARIABLE, "1")
    try:
        factor = float(text)
    except ValueError:
        factor = -1.0
    if not factor >= 0:
        raise OptionError(f"{TOLERANCE_VARIABLE} must be a number, 0 or more, by which tolerances are multiplied; got {text!r}.")
    return factor


@dataclass(frozen=True, slots=True)
class Expected:
    """What a rank's own message says, in words."""

    number: int
    optimizer_steps: int
    calls: Sequence[str]
    integers: Sequence[str]
    floats: Sequence[tuple[str, float]]

    @property
    def fits(self) -> bool:
        """Whether each tensor has its own numbers there; else there is one for all."""
        return fits(len(self.integers), len(self.floats))


@dataclass(frozen=True)
class Compared:
    """The messages of all ranks of a group, beside what this rank knows of its own."""

    group: SequenceGroup
    rows: Sequence[bytes]
    expected: Expected

    @cached_property
    def heads(self) -> list[Head]:
        """Each rank's."""
        return [Head.unpack(row) for row in self.rows]

    @property
    def writes_differ(self) -> bool:
        """Whether ranks have written to their parameters differently often."""
        return len({head.writes for head in self.heads}) > 1

    @property
    def a_habit_is_new(self) -> bool:
        """Whether a rank has written to its parameters as it did not before."""
        return any(head.is_new_habit for head in self.heads)

    @property
    def due_differs(self) -> bool:
        """Whether ranks want different weights compared: they have not seen the same ones before."""
        return len({head.due for head in self.heads}) > 1

    def integers(self, place: int) -> list[int]:
        """Each rank's hash in the n-th place."""
        return [hash_in(row, place) for row in self.rows]

    def floats(self, place: int) -> list[tuple[float, ...]]:
        """Each rank's sketch in the n-th place."""
        num_hashes = len(self.expected.integers) if self.expected.fits else min(1, len(self.expected.integers))
        return [sketch_in(row, num_hashes, place) for row in self.rows]

    def where(self, values: Sequence[object]) -> str:
        """The ranks that differ from rank 0, and the step."""
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        ranks = f"ranks 0 and {others[0]}" if len(others) == 1 else f"rank 0 and ranks {', '.join(map(str, others))}"
        return f"At step {self.expected.number + 1} {ranks} of group {self.group.name!r}"

    def ending(self) -> str:
        """What a step is, and what to do."""
        steps = self.expected.optimizer_steps
        return (
            f"Steps are backward passes and calls without gradients of this group; the optimizer has made {steps} steps on this rank, none "
            f"with the gradients of this one. {EQUAL_BATCHES}"
        )


def first_difference(compared: Compared) -> str | None:
    """The error for what differs, if anything does."""
    expected = compared.expected
    logs, steps = [head.log for head in compared.heads], [head.optimizer_steps for head in compared.heads]
    if len(set(logs)) > 1:
        return (
            f"{compared.where(logs)} made other calls, or were in other modes (gradients, random state) there. "
            f"This is rank {compared.group.rank}, whose calls since the comparison before were: {'; '.join(expected.calls) or 'none'}. "
            f"A rank has left out or repeated a part of its loop. {compared.ending()}"
        )
    if len(set(steps)) > 1:
        return (
            f"{compared.where(steps)} had made different numbers of optimizer steps: {', '.join(map(str, steps))}. A rank has left out or "
            f"repeated a step, such as one whose error was caught on this rank only. {compared.ending()}"
        )
    return _difference_of_integers(compared) or _difference_of_floats(compared)


def _difference_of_integers(compared: Compared) -> str | None:
    names = list(compared.expected.integers)
    if not compared.expected.fits and names:
        names = [f"one of {', '.join(dict.fromkeys(names))}"]
    for place, name in enumerate(names):
        if len(set(values := compared.integers(place))) > 1:
            return f"{compared.where(values)} were given different values of {name}. {compared.ending()}"
    return None


def _difference_of_floats(compared: Compared) -> str | None:
    floats, factor = compared.expected.floats, tolerance_factor()
    if not compared.expected.fits and len(floats) > 1:
        tolerances = [tolerance * factor for _, tolerance in floats]
        values = compared.floats(0)
        apart = [far_apart_combined([values[0], other], tolerances) for other in values]
        return _floats_text(compared, f"one of {', '.join(dict.fromkeys(name for name, _ in floats))}", apart)
    for place, (name, tolerance) in enumerate(floats):
        values = compared.floats(place)
        apart = [far_apart([values[0], other], tolerance * factor) for other in values]
        if any(apart):
            return _floats_text(compared, name, apart)
    return None


def _floats_text(compared: Compared, name: str, apart: Sequence[bool]) -> str | None:
    if not any(apart):
        return None
    return (
        f"{compared.where(apart)} were given different values of {name}, by more than rounding. {compared.ending()} "
        f"{TOLERANCE_VARIABLE} multiplies the tolerance of floats."
    )


def difference_of_parameters(
    compared: Compared, weights: Sequence[tuple[str, Tensor]], sketches: Sequence[Sequence[Sequence[float]]]
) -> str | None:
    """The error for the first parameter or buffer that differs; `sketches` are by rank."""
    for (name, value), *values in zip(weights, *sketches, strict=True):
        apart = [far_apart([values[0], other], parameter_tolerance(value.dtype)) for other in values]
        if any(apart):
            return (
                f"{compared.where(apart)} had different values of the parameter or buffer {name}. It was changed on some of them only: "
                f"load, initialize and update weights alike on every rank. {compared.ending()}"
            )
    return None
