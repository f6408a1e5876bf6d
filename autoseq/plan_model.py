"""`autoseq plan`: a model is looked at on a pretended group of ranks, and everything else follows by calculation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from autoseq.inspection import Made, with_programs
from autoseq.options import Options
from autoseq.planner import NamedSite, joined_sites
from autoseq.planning.degrees import Candidate, candidates
from autoseq.planning.gathered import gathers
from autoseq.planning.model_cost import ModelCost, model_cost
from autoseq.planning.sweep import Over, Point, sweep, would_fit
from autoseq.planning.topology import Topology
from autoseq.planning.training import Training
from autoseq.program import Program, Warned
from autoseq.report import readable_bytes
from autoseq.runtime.errors import PlanError, StrategyError
from autoseq.runtime.layout import Layout, local_length
from autoseq.runtime.strategy import MESH_ADVICE

_LOOKED_AT_ON, _AND_ON = 2, 4  # ranks; the second only where some steps see all rows


@dataclass(frozen=True, slots=True)
class Planned:
    """Plans for a model, the best first, and what was asked."""

    training: Training
    world_size: int
    topology: Topology  # with the memory that plans may use
    reserved_bytes: int
    candidates: tuple[Candidate, ...]
    over: Over | None = None
    points: tuple[Point, ...] = ()

    @property
    def best(self) -> Candidate:
        return self.candidates[0]


def look_at(make: Callable[[], Made], *, batch: int, seq_len: int, world_size: int, shard_parameters: bool = False) -> Training:
    """The attentions of a model and the costs of the rest. Raises as `inspect_model`."""

    def look(ranks: int, layout: str = "auto") -> _Look:
        def use(programs: Sequence[Program]) -> _Look:
            planned = joined_sites(program.plan for program in programs)
            layouts = list(dict.fromkeys(site.layout for site in planned))
            # The length that was asked for, whatever the program calls its sequence: patches of an image, or tokens and one more.
            tokens = batch * local_length(seq_len, ranks, layouts[0])
            cost = model_cost(programs, world_size=ranks, tokens=tokens)
            return _Look(tuple(site.site for site in planned), cost, layouts, _warnings(programs, ranks))

        return with_programs(make, use, world_size=ranks, options=Options(layout=layout))

    seen = look(min(world_size, _LOOKED_AT_ON))
    if len(seen.layouts) > 1:  # of the parts of one model; their costs add up where ranks have as many rows in each
        seen = look(min(world_size, _LOOKED_AT_ON), "contiguous")
    shortest = min(min(named.site.q_len, named.site.k_len) for named in seen.sites)
    more = look(_AND_ON, seen.layouts[0]).cost if gathers(seen.cost) and shortest >= _AND_ON else None
    return Training(seen.sites, seen.cost, batch, seq_len, shard_parameters, more, seen.warnings)


@dataclass(frozen=True, slots=True)
class _Look:
    """What one look at a model finds."""

    sites: tuple[NamedSite, ...]
    cost: ModelCost
    layouts: list[Layout]
    warnings: tuple[Warned, ...]


def _warnings(programs: Sequence[Program], ranks: int) -> tuple[Warned, ...]:
    """What a run warns of; the sizes are those of whole values, whatever the ranks."""
    if ranks == 1:
        return ()
    found = [each for program in programs for each in program.warned()]
    return tuple(replace(each, gathered_bytes=each.gathered_bytes * ranks // (ranks - 1)) for each in found)


def plan_training(
    training: Training, *, world_size: int, topology: Topology, strategy: str = "auto", layout: str = "auto",
    memory_gib: float | None = None, reserve: float = 0.0, over: Over | None = None,
) -> Planned:  # fmt: skip
    """The plans for a model on so many ranks, which leave a share `reserve` of a rank's memory free.

    Raises PlanError, which says what would fit, if nothing does.
    """
    memory = topology.memory_bytes if memory_gib is None else int(memory_gib * 2**30)
    reserved = int(memory * reserve)
    topology = replace(topology, memory_bytes=memory - reserved)
    try:
        found = candidates(training, world_size, topology, strategy=strategy, layout=layout)
    except StrategyError as error:
        raise StrategyError(in_a_plan(str(error))) from None
    if not found[0].fits:
        raise PlanError(_nothing_fits(found[0], training, world_size, topology, reserved, strategy, layout))
    points = sweep(training, world_size, topology, over, strategy=strategy, layout=layout) if over is not None else []
    return Planned(training, world_size, topology, reserved, tuple(found), over, tuple(points))


def in_a_plan(reason: str) -> str:
    """A refusal without the advice to give the model a mesh: a plan tries all meshes that there are."""
    return reason.replace(f": {MESH_ADVICE}", ", which a sequence of this plan has not")


def _nothing_fits(
    least: Candidate, training: Training, world_size: int, topology: Topology, reserved: int, strategy: str, layout: str
) -> str:  # fmt: skip
    parts = [(name, getattr(least.memory, name)) for name in least.memory.__dataclass_fields__]
    most = ", ".join(f"{name} {readable_bytes(size)}" for name, size in sorted(parts, key=lambda part: -part[1]) if size)
    others = would_fit(training, world_size, topology, strategy=strategy, layout=layout)
    changes = "; or ".join(f"{change}: {readable_bytes(size)} a rank" for change, size in others)
    advice = f"What would fit: {changes}" if others else "Nothing near it fits either: the model needs larger devices"
    free = f" ({readable_bytes(reserved)} more are kept free, --reserve)" if reserved else ""
    return (
        f"no plan fits in {readable_bytes(topology.memory_bytes)} a rank{free}: the smallest, {least.split} ranks (data × sequence), needs "
        f"{readable_bytes(least.memory.total)} ({most}). {advice}"
    )
