"""Ranks compare the shapes of every call of a compiled program, before anything is sent.

With symbolic lengths one program serves many shapes, and a rank that calls it with another length than its peers would hang in
the middle of a collective, or crash there. The ranks meet through the store for every combination of program and shapes that is
new to them. One that all have met for before costs nothing while it is the only one of the group. From the second on, ranks
could be out of step with each other (one has the short batch where another has the long one), and a call costs one store request
that waits for nobody: the first rank says what it calls, the others hear whether it is what they call.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence

import torch
from torch import Tensor

from autoseq.agreement import COMPILE_TIMEOUT_S, COMPILE_TIMEOUT_VARIABLE
from autoseq.meetings import WORDS_KEPT, Agreed, agreed, forgotten_on_failure, meet
from autoseq.runtime.errors import RankMismatchError, RendezvousError
from autoseq.runtime.groups import SequenceGroup
from autoseq.runtime.rendezvous import first_word, timeout_s

TIMEOUT_VARIABLE = "AUTOSEQ_CALL_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 120.0
"""Ranks that call a program they have called before are apart by what a rank does alone between steps: logging, saving."""


class CallShapes:
    """One compiled program's inputs, of which some have sizes that may change from call to call."""

    def __init__(self, group: SequenceGroup, program: str, names: Sequence[str], inputs: Sequence[object]) -> None:
        self._group, self._program, self._names = group, program, names
        varying = [i for i, value in enumerate(inputs) if _is_symbolic(value)]
        self._varying = sorted(varying, key=lambda i: not isinstance(inputs[i], Tensor))  # sizes by themselves say less
        self._called = False

    def agree(self, values: Sequence[object]) -> None:
        """All ranks call this program with these shapes. Raises RankMismatchError or, of ranks that do not come, RendezvousError."""
        if self._group.size == 1:
            return
        combination, record = self._describe(values), agreed(self._group)
        with forgotten_on_failure(self._group):
            is_new = combination not in record.combinations
            if len(record.combinations) > 1:
                is_new = self._hear_first_word(record, combination, is_new)
            if is_new:
                self._meet(record, combination)
                record.combinations.add(combination)
        self._called = True

    def _describe(self, values: Sequence[object]) -> str:
        shapes = {self._names[i]: tuple(x.shape) if isinstance(x := values[i], Tensor) else x for i in self._varying}
        return f"program {self._program[:12]}" + "".join(f", {name}: {shape}" for name, shape in shapes.items())

    def _hear_first_word(self, record: Agreed, combination: str, is_new: bool) -> bool:
        """Say what this rank is about to do, and hear what the first rank said. Whether the ranks are to meet."""
        number, before = record.calls, record.words[0]
        word = f"{number}: {'meet for' if is_new else 'run'} {combination}"
        topic = f"call {number % WORDS_KEPT} of {record.token}"
        # A rank that had fallen so far behind that the topic served again heard then what was said for a call that is yet to come.
        heard = before if _number(before) >= number else first_word(self._group, topic, word, instead_of=before)
        record.calls += 1
        record.words.append(heard)
        if _number(heard) > number:
            return is_new  # what the first rank said is gone; it did not meet, or it would still wait
        # A first rank that waits in a meeting is told there; one that runs a program hears nothing until this rank is gone.
        if heard != word and ": run " in heard:
            raise RankMismatchError(self._explain(self._group.rank, combination, "another rank", heard.partition(": run ")[2]))
        return ": meet for " in heard

    def _meet(self, record: Agreed, combination: str) -> None:
        mine = json.dumps([combination, uuid.uuid4().hex]).encode()
        # Before the first call the ranks compiled, each as fast as it could.
        known = (TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S) if self._called else (COMPILE_TIMEOUT_VARIABLE, COMPILE_TIMEOUT_S)
        try:
            theirs = [json.loads(reply) for reply in meet(self._group, "calls a program with new shapes", mine, timeout_s(*known))]
        except RendezvousError as error:
            raise RendezvousError(
                f"The model is called with new shapes ({combination}), for which all ranks meet. {error} "
                f"{known[0]} sets how many seconds they wait; a rank that is missing may have called it with other shapes."
            ) from error
        for rank, (other, _) in enumerate(theirs):
            if other != theirs[0][0]:
                raise RankMismatchError(self._explain(0, theirs[0][0], f"rank {rank}", other))
        if not record.token:
            record.token = theirs[0][1]

    def _explain(self, rank: int, ours: str, other: str, theirs: str) -> str:
        return (
            f"rank {rank} of group {self._group.name!r} calls the model with {ours}, and {other} with {theirs}. Nothing was sent. "
            "Every rank of a sequence group gets the same, full-length inputs in the same order; autoseq takes each rank's part itself."
        )


def _number(word: str) -> int:
    """The call that a word was said at; -1 for none."""
    return int(word.partition(":")[0] or -1)


def _is_symbolic(value: object) -> bool:
    if isinstance(value, Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    return isinstance(value, torch.SymInt)
