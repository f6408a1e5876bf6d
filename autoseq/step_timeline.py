"""When each rank is busy with what in one predicted training step: attention by its phases, the rest of the model between them.

The rest of the model takes the seconds that its dry run predicts, handed out over its operators by their products and by the bytes they
make. Each attention begins on all ranks at once and ends with the slowest, so a mask that leaves ranks uneven work shows as gaps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import groupby

import torch
from torch import fx

from autoseq.html_lines import product
from autoseq.node_traffic import NodeTraffic, Sent
from autoseq.passes.sizes import num_bytes
from autoseq.passes.source import dotted
from autoseq.planner import SitePlan
from autoseq.planning.asked_ranks import asked_ranks
from autoseq.planning.model_cost import ModelCost
from autoseq.planning.prediction import Lane, Segment, pass_time
from autoseq.planning.topology import Topology
from autoseq.planning.training import rest_seconds
from autoseq.program import Program
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.timeline import WAYS, Way

MOST_SEGMENTS = 2**15
"""Of all attentions of all ranks that are asked: more make a file that no viewer opens at once."""


@dataclass(frozen=True, slots=True)
class Span:
    """What keeps a lane of a rank busy, from the step's begin on; `details` are words and numbers for a reader."""

    rank: int
    lane: Lane
    name: str
    start_s: float
    seconds: float
    details: tuple[tuple[str, str | int], ...] = ()


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step on the ranks that were asked, of `world_size`."""

    world_size: int
    ranks: tuple[int, ...]
    topology: str
    seconds: float
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """A stretch of the program: an attention, or messages outside one, or operators of one module with their products and bytes."""

    name: str
    site: SitePlan | None = None
    sent: Sent | None = None
    flops: int = 0
    num_bytes: int = 0


def step_timeline(
    programs: Sequence[Program], traffic: Sequence[NodeTraffic], cost: ModelCost, topology: Topology, world_size: int
) -> Timeline:  # fmt: skip
    """Forward, then backward in reverse order. `traffic` is that of `node_traffic`, `cost` that of `model_cost` on as many ranks."""
    parts = [part for program, sent in zip(programs, traffic, strict=True) for part in _parts(program, sent)]
    clock = _Clock(cost, topology.at(world_size), world_size, parts)
    for way in WAYS:
        for part in parts if way == "forward" else reversed(parts):
            clock.advance(part, way)
    return Timeline(world_size, tuple(clock.ranks), topology.name, clock.now_s, tuple(clock.spans))


def _parts(program: Program, traffic: NodeTraffic) -> Iterator[_Part]:
    """The local graph's nodes in order, those of one module that follow each other together."""
    sites = {planned.site.name: planned for planned in program.plan.sites}
    found = [_part(node, traffic.get(node), sites) for node in program.gm.graph.nodes if node.op == "call_function"]
    for (name, alone), same in groupby(found, key=lambda part: (part.name, part.site is not None or part.sent is not None)):
        several = list(same)
        if alone:
            yield from several
        else:
            yield reduce(lambda a, b: _Part(name, flops=a.flops + b.flops, num_bytes=a.num_bytes + b.num_bytes), several)


def _part(node: fx.Node, sent: Sent | None, sites: Mapping[str, SitePlan]) -> _Part:
    if "attention" in node.meta:
        planned = sites[node.meta["attention"]["name"]]
        return _Part(planned.site.name, site=planned)
    stack = node.meta.get("nn_module_stack")
    name = (dotted(next(reversed(stack.values()))[0]) if stack else "") or "the model itself"
    made = node.meta.get("val")
    tensors = made if isinstance(made, (list, tuple)) else [made]
    size = sum(num_bytes(x) for x in tensors if isinstance(x, torch.Tensor))
    moves_nothing = getattr(node.target, "__name__", "") in ("vary", "vary_many", "getitem")
    multiplied = product(node)
    return _Part(name, sent=sent, flops=multiplied.flops if multiplied else 0, num_bytes=0 if moves_nothing else size)


class _Clock:
    """The step so far."""

    def __init__(self, cost: ModelCost, topology: Topology, P: int, parts: Sequence[_Part]) -> None:
        self._topology, self._P = topology, P
        self.ranks = asked_ranks(P)
        passes = len(WAYS) * sum(part.site is not None for part in parts)
        self._most_segments = MOST_SEGMENTS // max(1, passes * len(self.ranks))
        self.now_s = 0.0
        self.spans: list[Span] = []
        self._flops, self._bytes = sum(part.flops for part in parts), sum(part.num_bytes for part in parts)
        self._products_s, self._traffic_s = dict[Way, float](), dict[Way, float]()
        for way in WAYS:
            self._products_s[way], self._traffic_s[way] = rest_seconds(cost.way(way), topology)
        self._known: dict[tuple[object, ...], tuple[float, list[tuple[Segment, ...]]]] = {}

    def advance(self, part: _Part, way: Way) -> None:
        """All ranks go through a part; an attention that wants no gradient has no backward."""
        if part.site is not None:
            if way in part.site.site.ways:
                self._attend(part.site, way)
            return
        self._compute(part, way)
        for op, sent in ((part.sent.forward if way == "forward" else part.sent.backward) if part.sent else {}).items():
            # A kind of message that the topology knows; what is sent outside attention is of one kind each.
            seconds = self._topology.seconds(op, sent.bytes, sent.messages, ranks=self._P)  # type: ignore[arg-type]
            details = (("bytes", sent.bytes), ("messages", sent.messages), ("module", part.name))
            self._all("links", f"{op.replace('_', '-')}, {way}", seconds, details)

    def _compute(self, part: _Part, way: Way) -> None:
        by_flops = part.flops / self._flops if self._flops else part.num_bytes / max(1, self._bytes)
        seconds = self._products_s[way] * by_flops + self._traffic_s[way] * part.num_bytes / max(1, self._bytes)
        products = 1 if way == "forward" else 2
        self._all("compute", part.name, seconds, (("pass", way), ("product flops", part.flops * products)))

    def _all(self, lane: Lane, name: str, seconds: float, details: tuple[tuple[str, str | int], ...]) -> None:
        if seconds > 0:
            self.spans += [Span(rank, lane, name, self.now_s, seconds, details) for rank in self.ranks]
        self.now_s += seconds

    def _attend(self, planned: SitePlan, way: Way) -> None:
        seconds, of_ranks = self._attention(planned, way)
        details = (("pass", way), ("site", planned.site.name), ("strategy", planned.strategy), ("mask", planned.site.mask))
        for rank, segments in zip(self.ranks, of_ranks, strict=True):
            self.spans += [
                Span(rank, each.lane, f"{planned.strategy}: {each.name}", self.now_s + each.start_s, each.seconds, details)
                for each in segments
            ]
        self.now_s += seconds

    def _attention(self, planned: SitePlan, way: Way) -> tuple[float, list[tuple[Segment, ...]]]:
        """How long the slowest rank takes, and what each rank does; layers that are alike are asked once."""
        key = (planned.site.site, planned.strategy, planned.layout, way)
        if key not in self._known:
            strategy, site = STRATEGIES[planned.strategy], planned.site.site
            asked, most = (self._P, planned.layout), self._most_segments
            times = [pass_time(strategy, site, *asked, rank, self._topology, way, most_segments=most) for rank in self.ranks]
            self._known[key] = max(time.seconds for time in times), [time.segments for time in times]
        return self._known[key]
