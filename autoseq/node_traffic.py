"""Which node of a local graph sends what in a training step: the counts of the dry run, told apart by node.

Forward, the node that runs is known. Backward, autograd names the step it is at by the number that the forward gave it, and each
node's run covers a range of these numbers. Summed over nodes this is what `step_traffic` counts.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autoseq.dry_run import CountCollectives, Counts, Place, Step, add_counts, gather_counts, place_of, run_backward
from autoseq.planner import SitePlan
from autoseq.program import Program
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.traffic import SILENT, Traffic


@dataclass(frozen=True, slots=True)
class Sent:
    """What rank 0 sends for one node, forward and backward, by the kind of message."""

    forward: Counts = field(default_factory=dict)
    backward: Counts = field(default_factory=dict)

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(add_counts(self.forward, other.forward), add_counts(self.backward, other.backward))

    @property
    def ops(self) -> tuple[str, ...]:
        """The kinds of messages, in both passes."""
        return tuple(dict.fromkeys([*self.forward, *self.backward]))

    @property
    def step(self) -> Counts:
        """Both passes."""
        return add_counts(self.forward, self.backward)


NOTHING_SENT = Sent()
NodeTraffic = Mapping[fx.Node | None, Sent]
"""By node of the local graph; under None what no node could be found for."""


def node_traffic(program: Program, world_size: int) -> NodeTraffic:
    """What rank 0 sends in one forward and backward of a program, node by node; needs the process group of its trace."""
    if world_size == 1:
        return {}
    counted = _CountByNode(world_size)
    place = place_of(program)
    inputs = [place.convert(x) for x in program.inputs]
    with place.mode, torch.enable_grad(), counted:
        results = _NumberedStep(program.gm, place, counted).run(*inputs)
        run_backward(results, inputs)
    found: dict[fx.Node | None, Sent] = {}
    for node in [*counted.forward, *counted.backward]:
        found[node] = Sent(counted.forward.get(node, {}), counted.backward.get(node, {}))
    for each in program.gathered:
        maker: fx.Node = program.gm.graph.output_node().args[0][each.output]  # type: ignore[index, assignment]
        found[maker] = found.get(maker, NOTHING_SENT) + Sent(gather_counts(each, world_size))
    planned = {site.site.name: site for site in program.plan.sites}
    for node in program.gm.graph.nodes:
        if "attention" in node.meta and node.meta["attention"]["name"] in planned:
            seen = found.get(node, NOTHING_SENT)
            found[node] = seen + _hidden(planned[node.meta["attention"]["name"]], program, world_size, seen)
    return {node: sent for node, sent in found.items() if sent.ops}


def _hidden(site: SitePlan, program: Program, P: int, seen: Sent) -> Sent:
    """What an attention sends from inside opaque operators: the formulas of each pass, less what was seen of it."""
    opaque = STRATEGIES[site.strategy].opaque(site.site.site, P, program.plan.layout, site.site.ways)
    ops = " + ".join(op for op, traffic in opaque.items() if traffic != SILENT)
    cost = site.cost
    forward = _less(Traffic(cost.forward_messages, cost.forward_bytes), seen.forward)
    backward = _less(Traffic(cost.backward_messages, cost.backward_bytes), seen.backward)
    return Sent(*({ops: rest} if ops and rest != SILENT else {} for rest in (forward, backward)))


def _less(all_of_it: Traffic, seen: Counts) -> Traffic:
    known = sum(seen.values(), SILENT)
    return Traffic(all_of_it.messages - known.messages, all_of_it.bytes - known.bytes)


class _CountByNode(CountCollectives):
    """Counts under the node that runs, or whose gradient is being computed."""

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size)
        self.node: fx.Node | None = None
        self.starts: list[int] = []  # the first of autograd's numbers that belongs to a node, in ascending order
        self.nodes: list[fx.Node] = []
        self.forward: dict[fx.Node | None, Counts] = {}
        self.backward: dict[fx.Node | None, Counts] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        before = self.counts
        self.counts = {}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.counts:
            node, counts = (self.node, self.forward) if self.node is not None else (self._differentiated(), self.backward)
            counts[node] = add_counts(counts.get(node, {}), self.counts)
        self.counts = add_counts(before, self.counts) if self.counts else before
        return result

    def _differentiated(self) -> fx.Node | None:
        step = torch._C._current_autograd_node()
        place = bisect_right(self.starts, step._sequence_nr()) - 1 if step is not None else -1  # type: ignore[attr-defined]
        return self.nodes[place] if place >= 0 else None


class _NumberedStep(Step):
    """Notes at which of autograd's numbers each node begins."""

    def __init__(self, gm: fx.GraphModule, place: Place, counted: _CountByNode) -> None:
        super().__init__(gm, place)
        self._counted = counted

    def run_node(self, n: fx.Node) -> Any:
        start = torch.autograd._get_sequence_nr()
        self._counted.node = n
        try:
            return super().run_node(n)
        finally:
            self._counted.node = None
            if torch.autograd._get_sequence_nr() > start:
                self._counted.starts.append(start)
                self._counted.nodes.append(n)
