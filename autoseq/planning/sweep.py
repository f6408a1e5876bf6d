"""The same question for many lengths or many ranks: what is fastest, how fast each strategy would be, and where one overtakes another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from autoseq.planning.degrees import Candidate, candidates, splits
from autoseq.planning.topology import Topology
from autoseq.planning.training import Training, memory_besides_attention
from autoseq.runtime.errors import AutoSeqError, PlanError, StrategyError
from autoseq.runtime.strategies import STRATEGIES

Over = Literal["seq-len", "world-size"]
UNITS: dict[Over, str] = {"seq-len": "tokens", "world-size": "ranks"}
Looked = Callable[[int, int], Training]
"""A model with sequences of so many tokens, for so many ranks. Raises AutoSeqError where it has no such length."""

DOUBLINGS = 4
"""Of the length, and as many halvings."""


@dataclass(frozen=True, slots=True)
class Point:
    """One length or number of ranks. `alone`: the best with every attention by one strategy, None where it cannot serve or fit."""

    value: int
    best: Candidate | None
    alone: dict[str, Candidate | None]
    why_not: str = ""  # where there is no best

    @property
    def seconds(self) -> dict[str, float | None]:
        """Of a step, by strategy."""
        return {name: found and found.seconds for name, found in self.alone.items()}


def values_of(over: Over, training: Training, world_size: int, topology: Topology) -> list[int]:
    """The value that was asked for, and powers of two around the length for which there are splits, or up to the number of ranks as far as
    they fill a part of a node or whole nodes.
    """
    if over == "seq-len":
        lengths = [round(training.seq_len * 2.0**k) for k in range(-DOUBLINGS, DOUBLINGS + 1)]
        return [n for n in lengths if n == training.seq_len or (n and any(splits(training.at(seq_len=n), world_size, topology)))]
    R = topology.at(world_size).ranks_per_node
    counts = sorted({world_size} | {2**k for k in range(world_size.bit_length())})
    return [n for n in counts if n <= world_size and (n <= R or n % R == 0)]


def sweep(
    looked: Looked, seq_len: int, world_size: int, topology: Topology, over: Over, *, strategy: str = "auto", layout: str = "auto"
) -> list[Point]:  # fmt: skip
    """A point for each value, as a plan for that value; one that nothing serves or fits has no best, and says why."""
    names, points = STRATEGIES if strategy == "auto" else (), list[Point]()
    for value in values_of(over, looked(seq_len, world_size), world_size, topology):
        length, ranks = (value, world_size) if over == "seq-len" else (seq_len, value)
        try:
            at = looked(length, ranks)
        except AutoSeqError as error:  # the model has no such length
            points.append(Point(value, None, dict.fromkeys(names), str(error)))
            continue
        best, why_not = _best(at, ranks, topology, strategy, layout)
        alone = {name: _alone(at, ranks, topology, name, layout) for name in names}
        points.append(Point(value, best, alone, why_not))
    return points


def overtakings(points: Sequence[Point]) -> list[tuple[int, str, str]]:
    """(value, what was taken before, what is from there on)."""
    found = []
    served = [point for point in points if point.best is not None]
    for before, after in pairwise(served):
        old, new = (mix(point.best) for point in (before, after) if point.best is not None)
        if old != new:
            found.append((after.value, old, new))
    return found


def mix(candidate: Candidate) -> str:
    """`26× halo, 6× ring`, or the name of the only strategy."""
    taken = candidate.strategies
    return next(iter(taken)) if len(taken) == 1 else ", ".join(f"{count}× {name}" for name, count in taken.items())


def _best(training: Training, world_size: int, topology: Topology, strategy: str, layout: str) -> tuple[Candidate | None, str]:
    """The first plan if it fits, or None and why there is none."""
    try:
        found = _fitting(training, world_size, topology, strategy, layout)
    except (PlanError, StrategyError) as error:
        return None, str(error)
    return (found[0], "") if found else (None, "nothing fits")


def _alone(training: Training, world_size: int, topology: Topology, strategy: str, layout: str) -> Candidate | None:
    """The best that really has this strategy: where each rank has whole sequences none does but `local`."""
    try:
        found = _fitting(training, world_size, topology, strategy, layout)
    except (PlanError, StrategyError):
        return None
    return next((each for each in found if set(each.strategies) == {strategy}), None)


def _fitting(training: Training, world_size: int, topology: Topology, strategy: str, layout: str) -> list[Candidate]:
    if not _may_fit(training, world_size, topology):
        return []
    return [each for each in candidates(training, world_size, topology, strategy=strategy, layout=layout) if each.fits]


def _may_fit(training: Training, world_size: int, topology: Topology) -> bool:
    """Whether there is room for all but attention, in the split that leaves most; asked first, because it is quickly answered."""
    held = [memory_besides_attention(training, split, "contiguous").total for split in splits(training, world_size, topology)]
    return not held or min(held) <= topology.memory_bytes


def would_fit(
    looked: Looked, seq_len: int, world_size: int, topology: Topology, *, strategy: str = "auto", layout: str = "auto"
) -> list[tuple[str, int]]:  # fmt: skip
    """What can be changed so that some plan fits, and the bytes that a rank needs then: one thing at a time, else several together."""
    found: list[tuple[str, int]] = []

    def as_it_is(training: Training) -> Training:
        return training

    def smallest(training: Training) -> Training:
        return training.sharded().checkpointed()

    def tried(change: str, changed: Callable[[Training], Training] = as_it_is, ranks: int = world_size, length: int = seq_len) -> bool:
        try:
            best, _ = _best(changed(looked(length, ranks)), ranks, topology, strategy, layout)
        except AutoSeqError:  # no such number of ranks, or length of the model
            return False
        if best is not None:
            found.append((change, best.memory.total))
        return best is not None

    def more_ranks(change: str, changed: Callable[[Training], Training]) -> None:
        for ranks in (world_size << k for k in range(1, 8)):
            if tried(f"{ranks:,} ranks{change}", changed, ranks):
                return

    is_sharded = looked(seq_len, world_size).shard_parameters
    if not is_sharded:
        tried("parameters sharded over all ranks (--shard-parameters)", Training.sharded)
    tried("activation checkpointing of each layer", Training.checkpointed)
    if not found and not is_sharded:
        tried("--shard-parameters and activation checkpointing of each layer", smallest)
    for length in (seq_len >> k for k in range(1, 12)):
        if length and tried(f"a sequence of {length:,} tokens", length=length):
            break
    more_ranks("", as_it_is)
    if not found:
        more_ranks(" with --shard-parameters and activation checkpointing", smallest)
    return found
