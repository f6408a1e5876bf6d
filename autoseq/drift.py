"""Copies of the data whose parameters drift apart are noticed: nothing averages their gradients.

A program on one dim of a larger mesh splits a sequence; averaging over the other dim is DDP's or FSDP's, or the user's own. Whether
somebody will do that cannot be told from the program or from hooks: a loop may call `all_reduce` on gradients after the backward. So
parameters themselves are compared. Each copy writes into torch's store how its parameters have changed since its first training call,
in eight numbers, at its training calls 2, 4, 8, 16 …; the first rank of each sequence does that, nobody waits, and nothing else is sent.
Copies that were equal at first, have been written to equally often and have changed differently are not averaged.

Not compared: copies that start from different parameters (stages of a pipeline, runs with other seeds), and those written to more or
less often.
"""

from __future__ import annotations

import json
import logging
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from autoseq.call_shapes import DEFAULT_TIMEOUT_S, TIMEOUT_VARIABLE
from autoseq.meetings import meet
from autoseq.runtime.errors import OptionError, RankMismatchError
from autoseq.runtime.groups import SequenceGroup, group_from_mesh
from autoseq.runtime.rendezvous import first_word, timeout_s

log = logging.getLogger("autoseq")

SWITCH = "AUTOSEQ_CHECK_COPIES"
NUMBERS = 8
# Copies without an average differ by a large part of what changes. Those whose averages are summed in another order differ by rounding.
DIFFERENT = 0.01
# Below this part of the parameters a change is rounding of the sums themselves.
UNCHANGED = 1e-12


@dataclass(slots=True)
class _Parameters:
    """Parameters of a program, as they were at its first training call."""

    place: int  # among all that were looked at: a second run in one process may start from the same numbers
    members: tuple[int, ...]
    numbers: list[float]
    writes: int
    calls: int = 1


# Known by the first of them: programs of one model that were compiled for other lengths share it.
_known = WeakTensorKeyDictionary()
_places: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()
_warned: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


class Drift:
    """Looks at the parameters of one program at its training calls, where other ranks than its group's may train a copy of them."""

    def __init__(self, group: SequenceGroup, *, strict: bool) -> None:
        self._group, self._strict = group, strict
        self._copies = is_enabled() and bool(group.name) and group.size < dist.get_world_size()

    def look(self, values: Sequence[object]) -> None:
        """To be called before each call. Under `strict` copies that drift are a RankMismatchError on all ranks of the sequence."""
        if not self._copies or not torch.is_grad_enabled():
            return
        first = next((x for x in values if isinstance(x, nn.Parameter) and x.requires_grad), None)
        if first is None:
            return
        if first not in _known:
            _known[first] = _first_look(_trained(values))
            return
        known: _Parameters = _known[first]
        known.calls += 1
        if known.calls & (known.calls - 1) == 0:
            trained = _trained(values)
            if tuple(map(id, trained)) == known.members:
                self._compare(known, trained)

    def _compare(self, known: _Parameters, trained: Sequence[nn.Parameter]) -> None:
        said = _compared(known, trained) if self._group.rank == 0 else ""
        if self._strict:  # the ranks of a sequence stop together, or the others would wait for this one
            purpose = "compares its parameters with other copies of the data"
            said = next(filter(None, (reply.decode() for reply in self._meet(purpose, said))), "")
            if said:
                raise RankMismatchError(said)
        world = dist.group.WORLD
        if said and world is not None and world not in _warned:
            _warned.add(world)
            log.warning("%s", said)

    def _meet(self, purpose: str, said: str) -> list[bytes]:
        if self._group.size == 1:
            return [said.encode()]
        return meet(self._group, purpose, said.encode(), timeout_s(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S))


def is_enabled() -> bool:
    """Whether copies are compared. Raises OptionError if AUTOSEQ_CHECK_COPIES is neither 0 nor 1."""
    text = os.environ.get(SWITCH, "1")
    if text not in ("0", "1"):
        raise OptionError(f"{SWITCH} must be 0 or 1, got {text!r}.")
    return text == "1"


def _trained(values: Sequence[object]) -> list[nn.Parameter]:
    return [x for x in values if isinstance(x, nn.Parameter) and x.requires_grad]


def _first_look(trained: Sequence[nn.Parameter]) -> _Parameters:
    world = dist.group.WORLD
    assert world is not None
    place = _places[world] = _places.get(world, 0) + 1
    return _Parameters(place, tuple(map(id, trained)), _numbers(trained), _writes(trained))


def _writes(trained: Sequence[nn.Parameter]) -> int:
    """In-place writes so far. FSDP gathers parameters without counting, so there they stay as many."""
    return sum(x._version for x in trained)


@torch.no_grad()
def _numbers(trained: Sequence[nn.Parameter]) -> list[float]:
    """Sums and norms of all parameters, mixed into a few numbers: a change of any parameter changes them."""
    real = [torch.view_as_real(x) if x.is_complex() else x for x in trained]
    each = [[x.sum(dtype=torch.float64), torch.linalg.vector_norm(x, dtype=torch.float64)] for x in real]
    known = torch.tensor([float(x) for pair in each for x in pair], dtype=torch.float64)
    places = torch.arange(1, NUMBERS * len(known) + 1, dtype=torch.float64).view(NUMBERS, len(known))
    return (torch.cos(places) @ known).tolist()


def _compared(known: _Parameters, trained: Sequence[nn.Parameter]) -> str:
    """What is to be said of this copy beside the first one that came this far; empty if they agree."""
    now = _numbers(trained)
    change = [after - before for after, before in zip(now, known.numbers, strict=True)]
    writes = _writes(trained) - known.writes
    # Without counted writes (FSDP) copies are as far as each other after as many calls; before the first step they are equal anyway.
    moment = f"after {writes} writes" if writes else f"at call {known.calls}"
    start = ",".join(f"{x:.9e}" for x in known.numbers)
    world = group_from_mesh(None)
    mine = json.dumps([world.rank, change])
    other, theirs = json.loads(first_word(world, f"copies of {known.place}: {start} {moment}", mine, instead_of="") or mine)
    size = max(math.hypot(*change), math.hypot(*theirs))
    apart = math.hypot(*(x - y for x, y in zip(change, theirs, strict=True)))
    if apart <= max(DIFFERENT * size, UNCHANGED * math.hypot(*known.numbers)):
        return ""
    return _explain(world.rank, other, known.calls, apart / size)


def _explain(rank: int, other: int, calls: int, part: float) -> str:
    return (
        f"the model's parameters on ranks {other} and {rank} were equal at the first training call and have drifted apart: before call "
        f"{calls} their changes differ by {part:.0%}. Both train a copy of the data, and nothing averages their gradients: autoseq does so "
        "over the ranks of its own mesh only. Wrap the model for the copies, DistributedDataParallel(model, "
        'process_group=mesh["data"].get_group()) or fully_shard(model, mesh=mesh["data"]), with mesh = autoseq.sequence_mesh(...); the '
        f"weights trained so far are no copy's. Copies that are to differ (separate runs, averages of weights every few steps): {SWITCH}=0."
    )
