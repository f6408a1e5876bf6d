"""`autoseq plan`: a model is looked at on a pretended group of ranks, and everything else follows by calculation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from autoseq.inspection import Made, with_programs
from autoseq.options import Options
from autoseq.planner import NamedSite
from autoseq.planning.degrees import Candidate, candidates
from autoseq.planning.gathered import gathers
from autoseq.planning.model_cost import ModelCost, model_cost
from autoseq.planning.sweep import Over, Point, sweep, would_fit
from autoseq.planning.topology import Topology
from autoseq.planning.training import Training
from autoseq.program import Program
from autoseq.runtime.errors import PlanError
from autoseq.runtime.layout import local_length

_LOOKED_AT_ON, _AND_ON = 2, 4  # ranks; the second only where some steps see all rows


@dataclass(frozen=True, slots=True)
class Planned:
    """Plans for a model, the best first, and what was asked."""

    training: Training
    world_size: int
    topology: Topology
    candidates: tuple[Candidate, ...]
    over: Over | None = None
    points: tuple[Point, ...] = ()

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


def look_at(make: Callable[[], Made], *, batch: int, seq_len: int, world_size: int, shard_parameters: bool = False) -> Training:
    """The attentions of a model and the costs of the rest. Raises as `inspect_model`."""

    def look(ranks: int, layout: str = "auto") -> tuple[tuple[NamedSite, ...], ModelCost, str]:
        def use(programs: Sequence[Program]) -> tuple[tuple[NamedSite, ...], ModelCost, str]:
            sites = tuple(planned.site for program in programs for planned in program.plan.sites)
            # The length that was asked for, whatever the program calls its sequence: patches of an image, or tokens and one more.
            taken = programs[0].plan.layout
            tokens = batch * local_length(seq_len, ranks, taken)
            return sites, model_cost(programs, world_size=ranks, tokens=tokens), taken

        return with_programs(make, use, world_size=ranks, options=Options(layout=layout))

    sites, cost, layout = look(min(world_size, _LOOKED_AT_ON))
    shortest = min(min(named.site.q_len, named.site.k_len) for named in sites)
    more = look(_AND_ON, layout)[1] if gathers(cost) and shortest >= _AND_ON else None
    return Training(sites, cost, batch, seq_len, shard_parameters, more)


def plan_training(
    training: Training, *, world_size: int, topology: Topology, strategy: str = "auto", layout: str = "auto",
    memory_gib: float | None = None, over: Over | None = None,
) -> Planned:  # fmt: skip
    """The plans for a model on so many ranks. Raises PlanError, which says what would fit, if nothing does."""
    if memory_gib is not None:
        topology = replace(topology, memory_bytes=int(memory_gib * 2**30))
    found = candidates(training, world_size, topology, strategy=strategy, layout=layout)
    if not found[0].fits:
        raise PlanError(_nothing_fits(found[0], training, world_size, topology, strategy, layout))
    points = sweep(training, world_size, topology, over, strategy=strategy, layout=layout) if over is not None else []
    return Planned(training, world_size, topology, tuple(found), over, tuple(points))


def _nothing_fits(least: Candidate, training: Training, world_size: int, topology: Topology, strategy: str, layout: str) -> str:
    gib = 2**30
    parts = [(name, getattr(least.memory, name)) for name in least.memory.__dataclass_fields__]
    most = ", ".join(f"{name} {size / gib:.1f}" for name, size in sorted(parts, key=lambda part: -part[1]) if size)
    others = would_fit(training, world_size, topology, strategy=strategy, layout=layout)
    advice = f"What would fit: {'; or '.join(others)}" if others else "Nothing near it fits either: the model needs larger devices"
    return (
        f"no plan fits in {topology.memory_bytes / gib:.1f} GiB a rank: the smallest, {least.split} ranks (data × sequence), needs "
        f"{least.memory.total / gib:.1f} ({most} GiB). {advice}"
    )
