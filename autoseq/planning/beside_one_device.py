"""What splitting a sequence brings: a step on its ranks beside the same step on one device, and from which length on it pays.

Both are predicted alike: attention by its strategies' formulas, the rest of the model by a dry run of the rewritten programs, and for one
device by a dry run of the programs as they were before.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from autoseq.passes.attention_site import is_attention
from autoseq.planner import Plan, joined_sites
from autoseq.planning.degrees import Candidate, candidate, planned_candidate
from autoseq.planning.gathered import gathers
from autoseq.planning.model_cost import model_cost
from autoseq.planning.topology import Topology
from autoseq.planning.training import Split, Training
from autoseq.program import Program
from autoseq.runtime.errors import PlanError, StrategyError
from autoseq.runtime.strategies import STRATEGIES

log = logging.getLogger("autoseq")

_DOUBLINGS = 12
"""Of the length, and as many halvings, among which the one is sought from which on splitting pays."""


@dataclass(frozen=True, slots=True)
class Beside:
    """One step on ranks, of which `ranks` share a sequence, and on one device. `pays_from` is a length in tokens, or None."""

    seq_len: int
    ranks: int
    topology: str
    one_device: Candidate
    split: Candidate
    pays_from: int | None


def beside_one_device(programs: Sequence[Program], *, ranks: int, topology: Topology) -> Beside | None:
    """Of the programs of a step, as they are planned; None where nothing is split, or, with a warning, where the dry run fails."""
    try:
        return _beside_one_device(programs, ranks, topology)
    except Exception as error:  # noqa: BLE001 (operators of a user's may compute nothing on fake tensors; what was asked for is more than this)
        log.warning("a step beside one device could not be predicted: %s: %s", type(error).__name__, error)
        return None


def _beside_one_device(programs: Sequence[Program], ranks: int, topology: Topology) -> Beside | None:
    sites = joined_sites(program.plan for program in programs)
    if not sites or ranks == 1:
        return None
    longest = max((planned.site.site for planned in sites), key=lambda site: max(site.q_len, site.k_len))
    alone = model_cost([_on_one_device(program) for program in programs], world_size=1)
    cost = model_cost(programs, world_size=ranks)
    seq_len, named = max(longest.q_len, longest.k_len), tuple(planned.site for planned in sites)
    whole = Training(named, alone, longest.batch, seq_len)
    shared = Training(named, cost, longest.batch, seq_len, cost_on_more=alone if gathers(cost) else None)
    split = Split(1, ranks, longest.mesh)
    planned = planned_candidate(shared, split, Plan(sites[0].layout, tuple(sites), topology.name), topology)
    return beside(whole, shared, planned, topology)


def beside(whole: Training, shared: Training, split: Candidate, topology: Topology) -> Beside:
    """A candidate beside the same batch on one device; `whole` and `shared` are the model as one device and as ranks have it."""
    one_device = candidate(whole, Split(1, 1), topology)
    pays_from = _pays_from(whole, shared, split.split, topology, is_faster=split.seconds < one_device.seconds)
    return Beside(shared.seq_len, split.split.sequence, topology.name, one_device, split, pays_from)


def _pays_from(whole: Training, shared: Training, split: Split, topology: Topology, *, is_faster: bool) -> int | None:
    """The shortest of the length and its doublings or halvings from which on ranks are faster, whatever their strategies there."""
    asked = replace(split, data=1)

    def pays(length: int) -> bool:
        try:
            there = candidate(shared.at(batch=of_copy, seq_len=length), asked, topology)
        except (PlanError, StrategyError):
            return False
        return there.seconds < candidate(whole.at(batch=of_copy, seq_len=length), Split(1, 1), topology).seconds

    of_copy, length = max(1, shared.batch // split.data), shared.seq_len
    if not is_faster:
        return next((length << k for k in range(1, _DOUBLINGS + 1) if pays(length << k)), None)
    # What pays at a length pays at longer ones, so the shortest is found by halving how often the length is halved.
    halved, too_often = 0, _DOUBLINGS + 1
    while too_often - halved > 1:
        middle = (halved + too_often) // 2
        shorter = length >> middle
        fits = shorter >= 1 and shared.at(seq_len=shorter).shortest >= split.sequence
        halved, too_often = (middle, too_often) if fits and pays(shorter) else (halved, middle)
    return length >> halved


def _on_one_device(program: Program) -> Program:
    """The program before it was split, each attention computed where it stands."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(program.before, copies)
    for node in graph.nodes:
        if is_attention(node):
            node.target = STRATEGIES["local"].attention
    ends = [node for node in graph.nodes if not node.users and node.op == "call_function"]
    graph.output(ends if returned is None else returned)
    return replace(program, gm=fx.GraphModule(program.gm, graph), gathered=())
