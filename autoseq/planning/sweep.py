"""The same question for many lengths or many ranks: what is fastest, how fast each strategy would be, and where one overtakes another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from autoseq.planning.degrees import Candidate, candidates, splits
from autoseq.planning.topology import Topology
from autoseq.planning.training import Training, memory_besides_attention, tokens_of_rank
from autoseq.runtime.errors import AutoSeqError, PlanError, StrategyError
from autoseq.runtime.strategies import STRATEGIES

Over = Literal["seq-len", "world-size"]
Looked = Callable[[int, int], Training]
"""The model with sequences of so many tokens, for so many ranks. Raises AutoSeqError where it has no such length."""

_HALVINGS, _DOUBLINGS = 4, 4


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


def values_of(over: Over, *, seq_len: int, world_size: int, topology: Topology) -> list[int]:
    """Powers of two around the length, or up to the number of ranks as far as they fill a part of a node or whole nodes."""
    if over == "seq-len":
        return [n for k in range(-_HALVINGS, _DOUBLINGS + 1) if (n := round(seq_len * 2.0**k)) >= world_size]
    R = topology.at(world_size).ranks_per_node
    counts = sorted({world_size} | {2**k for k in range(world_size.bit_length())})
    return [n for n in counts if n <= world_size and (n <= R or n % R == 0)]


def sweep(
    training: Training, world_size: int, topology: Topology, over: Over, *, strategy: str = "auto", layout: str = "auto",
    asked: Looked | None = None,
) -> list[Point]:  # fmt: skip
    """A point for each value, as a plan for that value; one that nothing serves or fits has no best, and says why."""
    names, points = STRATEGIES if strategy == "auto" else (), list[Point]()
    for value in values_of(over, seq_len=training.seq_len, world_size=world_size, topology=topology):
        length, ranks = (value, world_size) if over == "seq-len" else (training.seq_len, value)
        try:
            at = _at(training, asked, length, ranks)
        except AutoSeqError as error:  # the model has no such length
            points.append(Point(value, None, dict.fromkeys(names), str(error)))
            continue
        best, why_not = _best(at, ranks, topology, strategy, layout)
        alone = {name: _alone(at, ranks, topology, name, layout) for name in names}
        points.append(Point(value, best, alone, why_not))
    return points


def _at(training: Training, asked: Looked | None, seq_len: int, ranks: int) -> Training:
    """As it was looked at for so many tokens and ranks, or calculated."""
    return training.at(seq_len=seq_len) if asked is None else asked(seq_len, ranks)


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
    asked = splits(world_size, topology, batch=training.batch, seq_len=training.seq_len)
    held = [
        memory_besides_attention(
            training, tokens_of_rank(training, split.data, split.sequence, "contiguous"), split.sequence, world_size
        ).total
        for split in asked
    ]
    return not held or min(held) <= topology.memory_bytes


def would_fit(
    training: Training, world_size: int, topology: Topology, *, strategy: str = "auto", layout: str = "auto",
    asked: Looked | None = None,
) -> list[tuple[str, int]]:  # fmt: skip
    """What can be changed so that some plan fits, and the bytes that a rank needs then: one thing at a time, else several together."""
    found: list[tuple[str, int]] = []

    def tried(change: str, changed: Callable[[Training], Training], ranks: int = world_size, length: int = training.seq_len) -> bool:
        try:
            best, _ = _best(changed(_at(training, asked, length, ranks)), ranks, topology, strategy, layout)
        except AutoSeqError:  # no such number of ranks, or length of the model
            return False
        if best is not None:
            found.append((change, best.memory.total))
        return best is not None

    def more_ranks(change: str, changed: Callable[[Training], Training]) -> None:
        for ranks in (world_size << k for k in range(1, 8)):
            if tried(f"{ranks:,} ranks{change}", changed, ranks):
                return

    if not training.shard_parameters:
        tried("parameters sharded over all ranks (--shard-parameters)", Training.sharded)
    tried("activation checkpointing of each layer", Training.checkpointed)
    if not found and not training.shard_parameters:
        tried("--shard-parameters and activation checkpointing of each layer", lambda each: each.sharded().checkpointed())
    for length in (training.seq_len >> k for k in range(1, 12)):
        if length and tried(f"a sequence of {length:,} tokens", Training.at, length=length):
            break
    more_ranks("", Training.at)
    if not found:
        more_ranks(" with --shard-parameters and activation checkpointing", lambda each: each.sharded().checkpointed())
    return found
