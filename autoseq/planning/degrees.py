"""Into how many copies of the data and parts of the sequence a number of ranks is split, and on how many nodes a sequence lies.

    ranks  =  data  ×  sequence,      sequence  =  nodes  ×  ranks in a node   (the mesh of strategies on two levels)

The ranks of a sequence lie beside each other, so they fill a part of a node or whole nodes. Each copy of the data gets as many
sequences as the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from autoseq.planner import Plan, SitePlan, make_plan
from autoseq.planning.choice import Placed, three_digits
from autoseq.planning.reasons import by_itself, of_rows
from autoseq.planning.topology import Topology
from autoseq.planning.training import Memory, Split, StepTime, Training, memory_besides_attention, sent_bytes, step_time
from autoseq.readable import readable_seconds
from autoseq.runtime.errors import PlanError, StrategyError
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import MESH_ADVICE, Site


@dataclass(frozen=True, slots=True)
class Candidate:
    """A split with the plan for it, and what a step takes."""

    split: Split
    plan: Plan
    time: StepTime
    memory: Memory
    sent_bytes: int
    fits: bool
    tokens_per_s: float
    mfu: float  # matrix products of the model by what the devices could do at their peak

    @property
    def seconds(self) -> float:
        return self.time.seconds

    @property
    def strategies(self) -> dict[str, int]:
        """How many attentions each strategy has."""
        return dict(Counter(planned.strategy for planned in self.plan.sites))


def splits(training: Training, world_size: int, topology: Topology) -> Iterator[Split]:
    """All that are possible, few ranks of a sequence first. Inside a node a mesh may have any shape, several nodes are its first dim.

    Raises TopologyError if the ranks are neither whole nodes nor a part of one.
    """
    R = topology.at(world_size).ranks_per_node
    for P in divisors(world_size):
        within = P <= R and R % P == 0
        if training.batch % (world_size // P) or training.shortest < P or not (within or P % R == 0):
            continue
        yield Split(world_size // P, P)
        for ranks in divisors(P)[1:-1] if within else [R] if R > 1 else []:
            yield Split(world_size // P, P, (P // ranks, ranks))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def candidates(
    training: Training, world_size: int, topology: Topology, *, strategy: str = "auto", layout: str = "auto"
) -> list[Candidate]:  # fmt: skip
    """A plan for each split, the fastest that fit first. Where steps take as long in three digits, fewer ranks a sequence come
    first, then what sends less, then what has no mesh. The first plan tells what its losers would take on other meshes of its ranks.

    Raises StrategyError if no split can be served, PlanError if the batch cannot be split.
    """
    asked = list(splits(training, world_size, topology))
    if not asked:
        raise PlanError(_cannot_share(training, world_size, topology))
    found: list[Candidate] = []
    refusals: list[StrategyError] = []
    for split in asked:
        try:
            found.append(candidate(training, split, topology, strategy=strategy, layout=layout))
        except StrategyError as refusal:
            refusals.append(refusal)
    if not found:
        raise refusals[-1]
    useful = [each for each in found if not each.split.mesh or _uses_mesh(each.plan)]

    def rank(each: Candidate) -> tuple[bool, float, int, int]:
        least = three_digits(each.seconds) if each.fits else each.memory.total
        return not each.fits, least, each.split.sequence, each.sent_bytes

    best, *others = sorted(useful or found, key=rank)
    return [beside_other_meshes(best, found), *others]


def candidate(training: Training, split: Split, topology: Topology, *, strategy: str = "auto", layout: str = "auto") -> Candidate:
    """The plan for one split. Raises StrategyError if an attention cannot be served."""
    of_copy = training.at(batch=training.batch // split.data)
    # The grain of zigzag rows may add a few rows of padding; it is not known yet which layout it will be.
    rest = memory_besides_attention(training, split, "contiguous")
    try:
        plan = make_plan(
            of_copy.on(split.mesh), group_size=split.sequence, strategy=strategy if split.sequence > 1 else "auto", layout=layout,
            topology=topology, reserved_bytes=rest.total,
        )  # fmt: skip
    except StrategyError as error:
        raise StrategyError(_in_a_plan(str(error))) from None
    return planned_candidate(training, split, replace(plan, sites=tuple(map(_told_in_a_plan, plan.sites))), topology)


def planned_candidate(training: Training, split: Split, plan: Plan, topology: Topology) -> Candidate:
    """What a step takes with a plan that is there already."""
    memory = replace(memory_besides_attention(training, split, plan.layout), attention=plan.memory_bytes())
    time = step_time(training, split, plan, topology)
    peak = topology.kernel_rates(training.dtype).peak_flops_per_s
    return Candidate(
        split, plan, time, memory, sent_bytes(training, split, plan),
        fits=memory.total <= topology.memory_bytes,
        tokens_per_s=training.tokens / time.seconds,
        mfu=training.step_flops / (time.seconds * split.ranks * peak),
    )  # fmt: skip


def _told_in_a_plan(planned: SitePlan) -> SitePlan:
    return replace(planned, losers=tuple((name, _in_a_plan(reason)) for name, reason in planned.losers))


def _in_a_plan(reason: str) -> str:
    """A refusal without the advice to give the model a mesh: a plan tries all meshes that there are."""
    return reason.replace(f": {MESH_ADVICE}", ", which a sequence of this plan has not")


def _cannot_share(training: Training, world_size: int, topology: Topology) -> str:
    """Why there is no split. As many sequences as there are ranks can always be shared, so some batch works."""
    works = next(n for n in range(1, world_size + 1) if any(splits(training.at(batch=n), world_size, topology)))
    shorter = f" (an attention has {training.shortest:,})" if training.shortest < training.seq_len else ""
    return (
        f"{world_size} ranks cannot share a batch of {training.batch} with {training.seq_len:,} tokens: the copies of the data must "
        f"divide the batch, a sequence needs a token for each of its ranks{shorter}, and its ranks fill whole nodes of "
        f"{topology.at(world_size).ranks_per_node} or a part of one. --batch {works} would work, and so would each multiple of it"
    )


def _uses_mesh(plan: Plan) -> bool:
    """Whether some strategy of a plan needs the mesh."""
    return any(_needs_mesh(p.strategy, p.site.site) for p in plan.sites)


def _needs_mesh(strategy: str, site: Site) -> bool:
    """Whether it could not serve without one."""
    return STRATEGIES[strategy].cannot_serve(replace(site, mesh=()), 2) is not None


def beside_other_meshes(best: Candidate, found: Sequence[Candidate]) -> Candidate:
    """A candidate whose losers tell what they would take on another mesh of as many ranks a sequence, where that suits them better.

    Of one that serves on none of these meshes, the reason is the one that it has there: not that it needs a mesh.
    """
    mesh, ranks = best.split.mesh, (best.split.data, best.split.sequence)
    others = [each for each in found if each.split.mesh not in ((), mesh) and (each.split.data, each.split.sequence) == ranks]
    if not others:
        return best
    sites = tuple(_beside_sites(planned, number, best, others) for number, planned in enumerate(best.plan.sites))
    return replace(best, plan=replace(best.plan, sites=sites))


def _beside_sites(planned: SitePlan, number: int, best: Candidate, others: Sequence[Candidate]) -> SitePlan:
    by_mesh = {each.split.mesh: each for each in others}
    site = planned.site.site
    theirs = [place for each in others for place in each.plan.sites[number].places if _needs_mesh(place.offer.strategy, site)]
    beside = replace(planned, elsewhere=(*planned.elsewhere, *theirs))

    def reason(name: str, told: str) -> str:
        place, on_first = beside.best_offer(name), others[0].plan.sites[number]
        if place is None:
            return dict(on_first.losers).get(name, told)
        return told if place.mesh == site.mesh else _why_not_there(place, planned, number, best, by_mesh[place.mesh])

    return replace(beside, losers=tuple((name, reason(name, told)) for name, told in planned.losers))


def _why_not_there(lost: Placed, planned: SitePlan, number: int, best: Candidate, other: Candidate) -> str:
    """Of a strategy on a mesh that was not taken; `other` is the plan for that mesh, which may have it or not."""
    told, is_reason = by_itself(lost, planned.place)
    there = other.plan.sites[number]
    if is_reason:
        return told
    if there.strategy == lost.offer.strategy:
        return f"{told}; {_step_lost(other, best)}"
    if there.layout != lost.layout:
        return f"{told}; {of_rows(there.layout)}"
    return f"on a mesh of {' × '.join(map(str, lost.mesh))}: {dict(there.losers)[lost.offer.strategy]}"


def _step_lost(other: Candidate, best: Candidate) -> str:
    """Why a plan comes after the best, which has as many ranks a sequence."""
    if best.fits and not other.fits:
        return "no plan for that mesh fits"
    if three_digits(other.seconds) > three_digits(best.seconds):
        return f"a whole step would take {readable_seconds(other.seconds)} with that mesh, not {readable_seconds(best.seconds)}"
    more = other.sent_bytes - best.sent_bytes
    what = f"it would send {more:,} bytes more" if more > 0 else "what is simpler comes first"
    return f"a whole step would take as long with that mesh, and {what}"
