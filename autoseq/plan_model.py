"""`autoseq plan`: a model is looked at on a pretended group of ranks, and everything else follows by calculation.

Other lengths follow from the same look where nothing but the length differs; else the model is looked at again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from autoseq.inspection import Made, why_whole, with_programs
from autoseq.logs import without_repeats, without_warnings
from autoseq.options import Options
from autoseq.planner import NamedSite, joined_sites
from autoseq.planning.degrees import Candidate, candidates
from autoseq.planning.gathered import gathers
from autoseq.planning.model_cost import ModelCost, model_cost
from autoseq.planning.presets import load_topology
from autoseq.planning.sweep import DOUBLINGS, UNITS, Looked, Over, Point, sweep, would_fit
from autoseq.planning.topology import Topology
from autoseq.planning.training import Training
from autoseq.program import Program, Warned
from autoseq.readable import readable_bytes, readable_seconds
from autoseq.runtime.errors import AutoSeqError, NoAttentionError, PlanError
from autoseq.runtime.layout import Layout, local_length

log = logging.getLogger("autoseq")

MEMORY = {
    "parameters": "parameters and buffers", "gradients": "gradients", "optimizer": "Adam's moments",
    "activations": "activations besides attention",
    "attention": "attention: kept, and buffers of messages", "largest": "logits and their gradient, or another largest tensor twice",
    "gathered": "the largest value that is gathered whole",
}  # fmt: skip
"""What the parts of a rank's memory are for."""

_LOOKED_AT_ON, _AND_ON = 2, 4  # ranks; the second only where some steps see all rows

# Whatever machine this is: what a look costs there is nobody's question.
_LOOK = Options(topology=replace(load_topology("8xH100"), memory_bytes=1 << 62))

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


def look_at(
    make: Callable[[], Made], *, batch: int, seq_len: int, world_size: int, shard_parameters: bool = False, told: set[str] | None = None
) -> Training:  # fmt: skip
    """The attentions of a model and the costs of the rest. Raises as `inspect_model`.

    `told`: the kinds of warnings that looks at the same model have given, which are not given again; it gets those of this one.
    """
    kinds = set[str]() if told is None else told

    def look(ranks: int, layout: str = "auto") -> _Look:
        def use(programs: Sequence[Program]) -> _Look:
            planned = joined_sites(program.plan for program in programs)
            if not planned:
                raise NoAttentionError(f"there is nothing to plan: every rank runs the whole model, because {why_whole(programs)}")
            layouts = list(dict.fromkeys(site.layout for site in planned))
            # The length that was asked for, whatever the program calls its sequence: patches of an image, or tokens and one more.
            tokens = batch * local_length(seq_len, ranks, layouts[0])
            cost = model_cost(programs, world_size=ranks, tokens=tokens)
            return _Look(tuple(site.site for site in planned), cost, layouts, _warnings(programs, ranks))

        with without_repeats(kinds):
            return with_programs(make, use, world_size=ranks, options=replace(_LOOK, layout=layout))

    seen = look(min(world_size, _LOOKED_AT_ON))
    if len(seen.layouts) > 1:  # of the parts of one model; their costs add up where ranks have as many rows in each
        seen = look(min(world_size, _LOOKED_AT_ON), "contiguous")
    shortest = min(min(named.site.q_len, named.site.k_len) for named in seen.sites)
    more = look(_AND_ON, seen.layouts[0]).cost if gathers(seen.cost) and shortest >= _AND_ON else None
    return Training(seen.sites, seen.cost, batch, seq_len, shard_parameters, more, seen.warnings)


def looks_at(make: Callable[[int], Made], *, batch: int, seq_len: int, shard_parameters: bool = False) -> Looked:
    """What gives `look_at` of the model that `make` returns for a length: for any length, and any number of ranks.

    It is calculated from the look at `seq_len` tokens where attentions are as long as the sequence, parameters and buffers are the same
    (not so with learned positions for each token), inputs are longer in proportion, and masks are the same at a length far off (not so
    with a window that is a share of the length); elsewhere the model is looked at again. Raises as `look_at`.
    """
    told = set[str]()

    def look(length: int, ranks: int) -> Training:
        asked = partial(make, length)
        return look_at(asked, batch=batch, seq_len=length, world_size=ranks, shard_parameters=shard_parameters, told=told)

    looks = cache(look)  # many ranks are looked at as few
    sizes, sites = cache(partial(_sizes, make)), cache(partial(_sites, make))

    def is_alike(first: Training, length: int) -> bool:
        if not all(named.site.q_len == named.site.k_len == seq_len for named in first.sites):
            return False
        # As far as a sweep goes, or further.
        far = seq_len << DOUBLINGS if length > seq_len else max(1, min(length, seq_len >> DOUBLINGS))
        return sizes(length) is not None and sizes(length) == sizes(seq_len) and sites(far) == first.at(seq_len=far).sites

    def at(length: int, ranks: int) -> Training:
        first = looks(seq_len, min(ranks, _LOOKED_AT_ON))
        return first.at(seq_len=length) if length == seq_len or is_alike(first, length) else looks(length, min(ranks, _LOOKED_AT_ON))

    return at


def _sizes(make: Callable[[int], Made], length: int) -> list[object] | None:
    """Of the parameters, the buffers and the inputs of a model, the dims of inputs that are the length without number.

    None for a model that its target cannot make without weights.
    """
    try:
        with torch.device("meta"):
            model, kwargs = make(length)
    except AutoSeqError as error:
        log.debug("the model is looked at for each length, because it cannot be made without weights: %s", error)
        return None

    def without_length(size: int) -> int | str:
        return "length" if size == length else size

    def given(x: Any) -> object:
        if isinstance(x, torch.Tensor):
            return tuple(map(without_length, x.shape))
        return without_length(x) if isinstance(x, int) else type(x)

    owned = [(name, tuple(x.shape), x.dtype) for each in (model.named_parameters, model.named_buffers) for name, x in each()]
    return [*owned, *map(given, tree_leaves(kwargs))]


def _sites(make: Callable[[int], Made], length: int) -> tuple[NamedSite, ...] | None:
    """The attentions of a model at a length; None if it has no such length, or cannot be made without weights.

    Nobody asked for that length, so what would be warned of there is not.
    """

    def use(programs: Sequence[Program]) -> tuple[NamedSite, ...]:
        return tuple(planned.site for planned in joined_sites(program.plan for program in programs))

    try:
        with without_warnings():
            return with_programs(partial(make, length), use, world_size=1, options=_LOOK, weights=False)
    except AutoSeqError as error:
        log.debug("masks are not compared at %d tokens: %s", length, error)
        return None


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
    looked: Looked, *, seq_len: int, world_size: int, topology: Topology, strategy: str = "auto", layout: str = "auto",
    memory_gib: float | None = None, reserve: float = 0.0, over: Over | None = None,
) -> Planned:  # fmt: skip
    """The plans for a model on so many ranks, which leave a share `reserve` of a rank's memory free. `looked`: see `looks_at`.

    Raises PlanError, which says what would fit, if nothing does.
    """
    memory = topology.memory_bytes if memory_gib is None else int(memory_gib * 2**30)
    reserved = int(memory * reserve)
    topology = replace(topology, memory_bytes=memory - reserved)
    asked: dict[str, str] = {"strategy": strategy, "layout": layout}
    training = looked(seq_len, world_size)
    found = candidates(training, world_size, topology, **asked)
    points = [] if over is None else sweep(looked, seq_len, world_size, topology, over, **asked)
    if not found[0].fits:
        others = would_fit(looked, seq_len, world_size, topology, **asked)
        raise PlanError(_nothing_fits(found[0], others, topology, reserved) + (f". {_swept(points, over)}" if over else ""))
    return Planned(training, world_size, topology, reserved, tuple(found), over, tuple(points))


def _swept(points: Sequence[Point], over: Over) -> str:
    """What of a sweep fits, where what was asked for does not."""
    served, unit = [(point.value, point.best) for point in points if point.best is not None], UNITS[over]
    told = [f"{value:,} {unit} ({readable_seconds(best.seconds)} a step, {readable_bytes(best.memory.total)})" for value, best in served]
    return f"Of the sweep fit {', '.join(told)}" if told else "Of the sweep nothing fits"


def _nothing_fits(least: Candidate, others: Sequence[tuple[str, int]], topology: Topology, reserved: int) -> str:
    parts = [(what, getattr(least.memory, name)) for name, what in MEMORY.items()]
    most = "; ".join(f"{readable_bytes(size)} for {name}" for name, size in sorted(parts, key=lambda part: -part[1]) if size)
    changes = "; or ".join(f"{change}: {readable_bytes(size)} a rank" for change, size in others)
    advice = f"What would fit: {changes}" if others else "Nothing near it fits either: the model needs larger devices"
    free = f" ({readable_bytes(reserved)} more are kept free, --reserve)" if reserved else ""
    return (
        f"no plan fits in {readable_bytes(topology.memory_bytes)} a rank{free}: the smallest, {least.split} ranks (data × sequence), needs "
        f"{readable_bytes(least.memory.total)} ({most}). {advice}"
    )
