"""What `plan_choice.py` sets against the planner: places with ranks, attentions, and what each rank does there.

In one job of the ranks of a place: `autoseq topology measure` times links and kernels, the planner predicts every strategy that serves
each attention on what was measured, and every strategy is timed, all in turn, round after round.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist

from autoseq.planner import NamedSite, SitePlan, make_plan, offer
from autoseq.planning.asked_ranks import asked_ranks
from autoseq.planning.measure import Request, measure
from autoseq.planning.prediction import pass_time
from autoseq.planning.time_kernels import KernelEffort
from autoseq.planning.time_links import Effort
from autoseq.planning.topology import Topology
from autoseq.planning.topology_file import dump
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.timeline import WAYS
from contenders import Contender, layout_for, served_by
from measuring import Record, check_numbers
from rank_processes import Seat
from work import Work

LOCAL = "local"

ATTENTIONS: dict[str, dict[str, Any]] = {
    "mha": dict(heads=8, kv_heads=8),
    "gqa": dict(heads=8, kv_heads=2),
    "window": dict(heads=8, kv_heads=8, mask="window"),
}
"""What `Work` takes beside the length; all are causal."""

LEAST_ROUNDS = 3
"""Of long steps, which differ less from round to round."""

# Enough to run and far too little to trust.
QUICK = Effort((1 << 12, 1 << 16), 3), KernelEffort((32, 64), 2, 16, (32, 64), (1 << 12, 1 << 14), 3)


@dataclass(frozen=True, slots=True)
class Place:
    """Where ranks run: on this machine's loopback, or on nodes whose links carry `rate`."""

    nodes: int
    ranks_per_node: int
    rate: str = ""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def kind(self) -> str:
        """As `--only` calls it."""
        return f"{self.nodes}x{self.ranks_per_node}" if self.rate else LOCAL

    @property
    def name(self) -> str:
        return f"{self.kind} at {self.rate}" if self.rate else f"{LOCAL}, {self.world_size} ranks"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A strategy on rows in a layout."""

    strategy: str
    layout: Layout


@dataclass(frozen=True, slots=True)
class Asked:
    """What the ranks are to do."""

    works: tuple[Work, ...]
    strategies: tuple[str, ...]  # none means all
    rounds: int  # at most
    seconds: float  # for the rounds of an attention; a few there are in any case
    quick: bool
    check: bool


def run_place(seat: Seat, asked: Asked) -> dict[str, Any]:
    """The topology as JSON text and, for each attention, the choice and the candidates' records; see `run_work`."""
    start = time.perf_counter()
    topology = measure(Request(seat.ranks_per_node, efforts=QUICK if asked.quick else None), torch.device("cpu"))
    measuring_s = time.perf_counter() - start
    return {
        "topology": dump(topology),
        "measuring_s": measuring_s,
        "works": [run_work(seat, work, topology, asked) for work in asked.works],
    }


def run_work(seat: Seat, work: Work, topology: Topology, asked: Asked) -> dict[str, Any]:
    """What the planner would choose for an attention, and this rank's seconds with every candidate."""
    planned, layout = choice(work, seat, topology)
    chosen = Candidate(planned.strategy, layout)
    made: list[tuple[Candidate, Contender]] = []
    answer = work.answer() if asked.check else None
    found = candidates(work, seat, layout)
    for candidate in [each for each in found if not asked.strategies or each.strategy in asked.strategies or each == chosen]:
        contender = served_by(candidate.strategy, work, seat, candidate.layout)
        check_numbers(Record(contender.name, contender.kind, layout=contender.layout), contender, answer, seat, work)  # warms up, too
        made.append((candidate, contender))
    seconds: list[list[tuple[float, float]]] = [[] for _ in made]
    start = time.perf_counter()
    while more_rounds(len(seconds[0]), time.perf_counter() - start, asked):
        for (_, contender), times in zip(made, seconds, strict=True):
            times.append(_timed(contender))
    records = [
        asdict(candidate) | prediction(candidate, work, seat, topology) | {"seconds": times}
        for (candidate, _), times in zip(made, seconds, strict=True)
    ]
    why_not = {name: reason for name, strategy in _all() if (reason := strategy.cannot_serve(work.site(seat.mesh), seat.world_size))}
    return {"chosen": asdict(chosen), "candidates": records, "why_not": why_not}


def more_rounds(done: int, taken_s: float, asked: Asked) -> bool:
    """Whether another round is to follow so many; every rank asks at once and gets the same answer."""
    slowest = torch.tensor(taken_s)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return done < min(LEAST_ROUNDS, asked.rounds) or (done < asked.rounds and slowest.item() < asked.seconds)


def choice(work: Work, seat: Seat, topology: Topology) -> tuple[SitePlan, Layout]:
    """What a compiled program with this one attention would get."""
    named = NamedSite("attention", "benchmark", work.mask, work.site(seat.mesh))
    plan = make_plan([named], group_size=seat.world_size, strategy="auto", layout="auto", topology=topology)
    return plan.sites[0], plan.layout


def candidates(work: Work, seat: Seat, planned: Layout) -> list[Candidate]:
    """Every strategy that serves, in the layout of the plan and in the one that divides its own work evenly."""
    layouts: tuple[Layout, ...] = get_args(Layout)
    return [
        Candidate(name, layout)
        for name, strategy in _all()
        if strategy.cannot_serve(work.site(seat.mesh), seat.world_size) is None
        for layout in layouts
        if layout in (planned, layout_for(name, work)) and strategy.cannot_lay_out(layout) is None
    ]


def prediction(candidate: Candidate, work: Work, seat: Seat, topology: Topology) -> dict[str, float]:
    """The planner's seconds of a step; and of its slowest rank each way, what the pass, its work and its messages would take."""
    site, P, name = work.site(seat.mesh), seat.world_size, candidate.strategy
    found = {"predicted_s": offer(name, site, P, candidate.layout, topology).seconds}
    for way in WAYS:
        ranks = [pass_time(STRATEGIES[name], site, P, candidate.layout, rank, topology, way) for rank in asked_ranks(P)]
        slowest = max(ranks, key=lambda of_rank: of_rank.seconds)
        found |= {f"{way}_s": slowest.seconds, f"{way}_work_s": slowest.work_s, f"{way}_message_s": slowest.message_s}
    return found


def slowest_rank(per_rank: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Round by round the whole step of the rank that took longest, and the longest forward."""
    return [(max(step for step, _ in ranks), max(forward for _, forward in ranks)) for ranks in zip(*per_rank, strict=True)]


def _all() -> list[tuple[str, Any]]:
    return [(name, strategy) for name, strategy in STRATEGIES.items() if name != "local"]


def _timed(made: Contender) -> tuple[float, float]:
    """Seconds of a step and of its forward."""
    dist.barrier()
    start = time.perf_counter()
    out = made.attention(*made.leaves)
    middle = time.perf_counter()
    torch.autograd.grad(out, made.leaves, made.grad)
    return time.perf_counter() - start, middle - start
