"""Seconds of a pass: what overlaps counts by its longest part, what does not adds up, and the formula says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseq.planning import time_formulas as formulas
from autoseq.planning.asked_ranks import asked_ranks
from autoseq.planning.exchange_times import NodeLoad, crossing_seconds, exchange_seconds
from autoseq.planning.prediction import dtype_of, pass_seconds, pass_time, step_seconds
from autoseq.planning.time_formulas import exchange_symbol, host_symbol, phase_formulas, uses_links_together
from autoseq.planning.topology import Host, KernelRates, Topology
from autoseq.runtime.errors import PlanError
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site, Strategy
from autoseq.runtime.timeline import NO_WORK, WAYS, Exchange, Exchanges, MessageKind, Peer, Phase, Scope, Way, Work, alone, sends_to
from unit_hardware import SITE, link, topology

HALF = sympy.Rational(1, 2)
WORK, IN_MESSAGES = 4.0, 6.0


class Scripted(Strategy):
    """A pass of WORK seconds of work, and exchanges of IN_MESSAGES seconds each."""

    name = "scripted"

    def __init__(self, *phases: Phase, scopes: dict[str, str] | None = None) -> None:
        self._phases, self._scopes = phases, scopes or {"keys": "flat"}

    def formulas(self) -> dict[str, sympy.Expr]:
        return {}

    def exchanged(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Exchanges:
        """To the next rank inside a node of two, to the same place of the other, or to whoever is next."""
        peers = {"inside": rank ^ 1, "across": (rank + 2) % 4, "flat": (rank + 1) % 4}
        found = {name: (scope, (Peer(peers[scope], int(IN_MESSAGES), 1),)) for name, scope in self._scopes.items()}
        return {name: sends_to(scope, to, to) for name, (scope, to) in found.items()}  # type: ignore[arg-type]

    def phases(self, way: Way) -> tuple[Phase, ...]:
        return self._phases

    def work(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Work:
        return Work(pairs=1, launches=0, merged_elements=0, full_pairs=1)  # of one key and one value column: 4 flops forward


def sends(**shares: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((name, sympy.sympify(share)) for name, share in shares.items())


ONE, ZERO = sympy.Integer(1), sympy.Integer(0)
TIMES = {
    "one after the other": ([Phase(ZERO, sends(keys=1)), Phase(ONE)], 10),
    "side by side": ([Phase(ONE, sends(keys=1))], 6),
    "half of the messages under the work": ([Phase(ONE, sends(keys=HALF)), Phase(ZERO, sends(keys=HALF))], 4 + 3),
    "phases that repeat": ([Phase(HALF, sends(keys=HALF), sympy.Integer(2))], 2 * 3),
    "phases that do not occur": ([Phase(ONE, sends(keys=1)), Phase(ONE, (), ZERO)], 6),
}


@pytest.mark.parametrize(("phases", "seconds"), TIMES.values(), ids=TIMES)
def test_a_phase_takes_as_long_as_its_longest_part(phases: Sequence[Phase], seconds: float) -> None:
    found = pass_time(Scripted(*phases), SITE, 4, "contiguous", 0, topology(), "forward")
    assert (found.seconds, found.work_s, found.message_s) == (seconds, WORK, IN_MESSAGES)


HOSTED = {
    "side by side": ([Phase(ONE, sends(keys=1))], WORK + 5),
    "half of them under the work": ([Phase(ONE, sends(keys=HALF)), Phase(ZERO, sends(keys=HALF))], WORK + 2.5 + 3),
    "nothing to compute beside": ([Phase(ZERO, sends(keys=1)), Phase(ONE)], IN_MESSAGES + WORK),
}


@pytest.mark.parametrize(("phases", "seconds"), HOSTED.values(), ids=HOSTED)
def test_messages_that_need_the_cores_make_the_work_longer(phases: Sequence[Phase], seconds: float) -> None:
    """One message of 6 bytes takes 2 seconds, and 2 bytes a second, of the cores that compute."""
    found = pass_time(Scripted(*phases), SITE, 4, "contiguous", 0, topology(host=Host(2.0, 2.0)), "forward")
    assert (found.seconds, found.work_s, found.message_s) == (seconds, WORK, IN_MESSAGES)


class OnSharedCores(Scripted):
    """Each rank's seconds of work, while all compute."""

    def __init__(self, *seconds: int) -> None:
        super().__init__(Phase(ONE))
        self._seconds = seconds

    def work(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Work:
        return Work(pairs=self._seconds[rank], launches=0, merged_elements=0, full_pairs=self._seconds[rank])


SHARED_CORES = {
    "all have as much to do": ((2, 2, 2, 2), 2, 4, (2, 2, 2, 2)),
    "the longest has a core for itself once the others are done": ((1, 2, 2, 3), 2, 4, (1, 2, 2, 2)),
    "but is no faster than that": ((0, 0, 0, 4), 2, 4, (0, 0, 0, 2)),
    "not those of another machine": ((0, 0, 2, 4), 2, 2, (0, 0, 2, 3)),
    "a core for each": ((1, 2, 2, 3), 1, 4, (1, 2, 2, 3)),
}


@pytest.mark.parametrize(("seconds", "ranks_per_core", "sharing", "expected"), SHARED_CORES.values(), ids=SHARED_CORES)
def test_ranks_that_are_done_leave_their_cores_to_others(
    seconds: Sequence[int], ranks_per_core: int, sharing: int, expected: Sequence[int]
) -> None:
    hardware = topology(host=Host(1e-9, 1e9, ranks_per_core, sharing))
    found = [pass_time(OnSharedCores(*seconds), SITE, 4, "contiguous", rank, hardware, "forward").work_s for rank in range(4)]
    assert found == [WORK * each for each in expected]


def test_links_of_two_kinds_carry_messages_side_by_side_and_one_link_one_after_the_other() -> None:
    both = [Phase(ONE, sends(a=1, b=1))]
    nodes = topology(ranks_per_node=2, between=replace(link(), lanes=2))
    apart = Scripted(*both, scopes={"a": "inside", "b": "across"})
    same = Scripted(*both, scopes={"a": "inside", "b": "inside"})
    assert pass_seconds(apart, replace(SITE, mesh=(2, 2)), 4, "contiguous", 0, nodes, "forward") == IN_MESSAGES
    assert pass_seconds(same, replace(SITE, mesh=(2, 2)), 4, "contiguous", 0, nodes, "forward") == 2 * IN_MESSAGES


class HeadsInside(Scripted):
    """An all-to-all of 210 bytes from every rank, as many to each other one of its node of the mesh."""

    def exchanged(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Exchanges:
        ranks = site.mesh[1]
        others = [other for other in range(rank // ranks * ranks, (rank // ranks + 1) * ranks) if other != rank]
        peers = tuple(Peer(other, 210 // len(others), 1) for other in others)
        return {"keys": Exchange("all_to_all", "inside", 210, 1, peers, peers)}


@pytest.mark.parametrize(
    ("mesh", "ranks_per_node", "seconds"),
    [
        # Six ranks a node of the mesh on nodes of four: the middle one has two of each, which send to four elsewhere through two cards.
        pytest.param((2, 6), 4, 2 * 2 * 210 * 4 / 5 / 2, id="more than a node, not whole ones"),
        pytest.param((4, 3), 4, 210 * 1, id="less than a node, and some in two"),
        pytest.param((2, 8), 4, 4 * 210 * 4 / 7 / 2, id="whole nodes"),
        pytest.param((4, 2), 4, 210, id="halves of a node"),
        pytest.param((2, 3), 6, 210, id="all in one node"),
    ],
)
def test_nodes_of_a_mesh_that_are_no_nodes_of_the_hardware_cross(mesh: tuple[int, int], ranks_per_node: int, seconds: float) -> None:
    P = mesh[0] * mesh[1]
    hardware = topology(ranks_per_node=ranks_per_node, between=replace(link(), lanes=2)).at(P)
    site = replace(SITE, mesh=mesh)
    found = [exchange_seconds(HeadsInside(), site, P, "contiguous", rank, hardware, "forward")["keys"] for rank in range(P)]
    assert max(found) == pytest.approx(seconds)


def test_every_strategy_is_priced_on_every_mesh_and_hardware() -> None:
    for P, R in ((12, 4), (12, 3), (12, 6), (8, 8), (12, 1)):
        hardware = topology(ranks_per_node=R, between=link()).at(P)
        for mesh in ((nodes, P // nodes) for nodes in range(2, P) if P % nodes == 0):
            site = replace(SITE, heads=P, kv_heads=P, q_len=4 * P, k_len=4 * P, mesh=mesh)
            serving = [each for each in STRATEGIES.values() if each.cannot_serve(site, P) is None]
            assert {"hybrid", "double_ring"} <= {each.name for each in serving}
            assert all(step_seconds(each, site, P, "contiguous", hardware, [0]) > 0 for each in serving)


def test_on_one_node_messages_of_both_levels_take_the_same_link() -> None:
    both = Scripted(Phase(ONE, sends(a=1, b=1)), scopes={"a": "inside", "b": "across"})
    site = replace(SITE, mesh=(2, 2))
    found = pass_time(both, site, 4, "contiguous", 0, topology(), "forward")
    assert found.seconds == 2 * IN_MESSAGES
    assert {segment.lane for segment in found.segments} == {"compute", "links"}


def seconds_of_links(strategy: Strategy, site: Site, P: int, layout: Layout, rank: int, hardware: Topology, way: Way) -> dict[str, float]:
    """How long each physical link of a rank is busy with all of its messages, that between nodes with those of its node."""
    busy, R = {"inside": 0.0, "between": 0.0}, hardware.ranks_per_node
    exchanges = strategy.exchanges(site, P, layout, rank, way)
    if P <= R:
        return {"inside": sum(hardware.seconds(each.kind, each.bytes, each.messages, ranks=P) for each in exchanges.values())}
    of_node = [strategy.crossings(site, P, layout, other, way, R) for other in range(rank // R * R, (rank // R + 1) * R)]
    for name, each in exchanges.items():
        own = of_node[rank % R][name]
        busy["inside"] += hardware.seconds(each.kind, each.bytes - own.sent_bytes, own.inside_messages, ranks=R)
        busy["between"] += crossing_seconds(hardware, each.kind, NodeLoad.of([of_rank[name] for of_rank in of_node]), P)
    return busy


RATES = st.sampled_from([1e8, 1e9, 1e10, 1e11])


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    st.sampled_from([name for name in STRATEGIES if name != "local"]), st.sampled_from([(2, 2), (2, 4), (4, 2)]),
    st.sampled_from([2, 4, 8]), RATES, RATES, st.sampled_from([0.0, 1e-4]), st.sampled_from([None, 0]),
    st.sampled_from(WAYS), st.sampled_from(get_args(Layout)),
)  # fmt: skip
def test_a_pass_is_never_shorter_than_the_messages_of_a_link(
    name: str, mesh: tuple[int, int], ranks_per_node: int, inside: float, between: float, latency_s: float, max_ahead: int | None, way: Way,
    layout: Layout,
) -> None:  # fmt: skip
    strategy, P = STRATEGIES[name], mesh[0] * mesh[1]
    site = replace(SITE, q_len=512, k_len=512, heads=8, kv_heads=8, head_dim=64, value_dim=64, mesh=mesh, max_ahead=max_ahead)
    if strategy.cannot_serve(site, P) is not None or strategy.cannot_lay_out(layout) is not None:
        return
    fast = {"float32": KernelRates(*[1e15] * 4)}
    links = {"inside": link(latency_s, inside), "between": link(latency_s, between)}
    hardware = topology(ranks_per_node=ranks_per_node, kernels=fast, memory_bytes_per_s=1e15, **links).at(P)
    for rank in (0, P - 1):
        found = pass_seconds(strategy, site, P, layout, rank, hardware, way)
        for where, busy in seconds_of_links(strategy, site, P, layout, rank, hardware, way).items():
            assert found >= busy * (1 - 1e-9), where


HOST = Host(0.5, 3.0)
PLACES = {
    "several nodes": (topology(ranks_per_node=2), False),
    "one node, whose messages share a link": (topology(), True),
    "one node, whose messages need the cores that compute": (replace(topology(inside=link(0.0, 1e9)), host=HOST), True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "local"])
@pytest.mark.parametrize(("hardware", "one_link"), PLACES.values(), ids=PLACES)
def test_the_formula_gives_the_predicted_seconds(hardware: Topology, one_link: bool, name: str, way: Way) -> None:
    strategy = STRATEGIES[name]
    site = replace(SITE, q_len=512, k_len=512, heads=8, kv_heads=8, mesh=(2, 2), max_ahead=0, max_behind=99)
    asked = (strategy, site, 4, "contiguous", 1, hardware, way)
    found, exchanges = pass_time(*asked), strategy.exchanges(site, 4, "contiguous", 1, way)
    values = {exchange_symbol(of): each for of, each in exchange_seconds(*asked).items()}
    values |= {host_symbol(of): HOST.latency_s * each.messages + each.bytes / HOST.bytes_per_s for of, each in exchanges.items()}
    phases = phase_formulas(strategy, way, one_link=one_link, host=hardware.host is not None)
    formula = sum((times * seconds for times, seconds in phases), start=sympy.Integer(0))
    numbers = values | {formulas.WORK: found.work_s} | strategy.sizes(site, 4, "contiguous", 1)
    assert float(formula.subs(numbers)) == pytest.approx(found.seconds)
    if hardware.host is not None:
        assert found.seconds > pass_seconds(strategy, site, 4, "contiguous", 1, replace(hardware, host=None), way)


@pytest.mark.parametrize("way", WAYS)
def test_messages_inside_a_node_go_beside_others_only_in_a_double_ring(way: Way) -> None:
    assert [name for name, strategy in STRATEGIES.items() if name != "local" and uses_links_together(strategy, way)] == ["double_ring"]


def test_elements_without_a_rate_are_an_error_that_says_what_to_do() -> None:
    with pytest.raises(PlanError, match=r"16 bytes.*Cast q, k and v"):
        dtype_of(replace(SITE, element_bytes=16))


def test_segments_fill_the_lanes_and_end_with_the_pass() -> None:
    phases = [Phase(ZERO, sends(keys=HALF)), Phase(HALF, sends(keys=sympy.Rational(1, 4)), sympy.Integer(2))]
    found = pass_time(Scripted(*phases), SITE, 4, "contiguous", 0, topology(), "forward")
    lanes = {lane: [(s.start_s, s.seconds) for s in found.segments if s.lane == lane] for lane in ("compute", "links")}
    assert lanes == {"links": [(0, 3), (3, 1.5), (5, 1.5)], "compute": [(3, 2), (5, 2)]}
    assert found.seconds == 7
    assert {s.name for s in found.segments if s.lane == "links"} == {"keys"}


def test_a_pass_of_thousands_of_steps_is_drawn_in_few_segments() -> None:
    hops = sympy.Integer(10**6)
    found = pass_time(Scripted(Phase(1 / hops, sends(keys=1 / hops), hops)), SITE, 4, "contiguous", 0, topology(), "forward")
    assert len(found.segments) == 2
    assert found.segments[1].seconds == pytest.approx(IN_MESSAGES)


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_one_rank_takes_its_work_and_no_more(way: Way) -> None:
    local = STRATEGIES["local"]
    found = pass_time(local, SITE, 1, "contiguous", 0, topology(), way)
    flops = {"forward": 4, "backward": 10}[way] * 4 * 64 * 64
    assert found.message_s == 0
    assert found.seconds == found.work_s >= flops


def test_launches_and_merges_take_time() -> None:
    ring = STRATEGIES["ring"]
    plain, launched = topology(), topology(launch_s=1.0)
    work = ring.work(SITE, 4, "contiguous", 0, "forward")
    seconds = [pass_time(ring, SITE, 4, "contiguous", 0, each, "forward").work_s for each in (plain, launched)]
    assert seconds[1] - seconds[0] == pytest.approx(work.launches)
    merged = 3 * 4 * work.merged_elements
    assert seconds[0] == pytest.approx(4 * work.pairs + merged)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.sampled_from(list(STRATEGIES)), st.sampled_from(WAYS), st.sampled_from([None, 0]), st.sampled_from([None, 40, 1500]),
    st.sampled_from(["", "k < c0(b)"]), st.sampled_from([1, 128, 512]),
)  # fmt: skip
def test_the_formula_of_work_is_what_is_predicted(
    name: str, way: Way, max_ahead: int | None, max_behind: int | None, predicate: str, tile: int
) -> None:
    site = replace(SITE, q_len=4096, k_len=4096, head_dim=8, value_dim=4, max_ahead=max_ahead, max_behind=max_behind, predicate=predicate)
    site, strategy, P = replace(site, mesh=(2, 2)), STRATEGIES[name], 1 if name == "local" else 4
    if strategy.cannot_serve(site, P) is not None:
        return
    hardware = topology(kernels={"float32": KernelRates(5, 5, 2, 3)}, memory_bytes_per_s=7.0, launch_s=0.5, attention_tile=tile)
    work = strategy.work(site, P, "contiguous", P - 1, way)
    values = {
        formulas.FULL: work.full_pairs, formulas.MASKED: work.masked_pairs, formulas.SQUARES: work.causal_pairs,
        formulas.ROWS: work.causal_rows, formulas.TILE: tile, formulas.LAUNCHES: work.launches, formulas.LAUNCH_S: 0.5,
        formulas.MERGED: work.merged_elements, formulas.MEMORY_BYTES_PER_S: 7, formulas.FLOPS_PER_S: 2 if way == "forward" else 3,
        formulas.D: 8, formulas.V: 4, formulas.a: 4, formulas.PACKED: work.packed_bytes,
    }  # fmt: skip
    found = float(formulas.work_formula(way).subs(values))
    assert found == pytest.approx(pass_time(strategy, site, P, "contiguous", P - 1, hardware, way).work_s)


def test_a_window_costs_its_tiles() -> None:
    """A window of half a tile leaves a third of the pairs of its tiles; what they take beside is the reading of masks and merging."""
    site = replace(SITE, q_len=4096, k_len=4096, max_ahead=0, max_behind=255)
    work = STRATEGIES["local"].work(site, 1, "contiguous", 0, "forward")
    free = topology(memory_bytes_per_s=1e30)
    assert work.masked_pairs == pytest.approx(3 * work.pairs, rel=0.05)
    found, masked = (pass_time(STRATEGIES["local"], site, 1, "contiguous", 0, each, "forward").work_s for each in (free, topology()))
    assert found == 4 * work.computed_pairs(1)
    assert masked - found == pytest.approx(4 * (work.masked_pairs + 3 * work.merged_elements))


def test_the_slowest_rank_decides_and_imbalance_is_seen() -> None:
    causal = replace(SITE, q_len=4096, k_len=4096, max_ahead=0)
    ring, fast = STRATEGIES["ring"], topology(inside=link(0.0, 1e12), memory_bytes_per_s=1e12)
    contiguous, zigzag = (step_seconds(ring, causal, 4, layout, fast, asked_ranks(4)) for layout in ("contiguous", "zigzag"))
    # The last of 4 ranks sees 3 1/2 of 4 shards; with zigzag rows all see 2.
    assert contiguous / zigzag == pytest.approx(3.5 / 2, rel=0.01)


def test_a_rank_with_whose_collectives_none_of_those_asked_takes_part_counts_alone() -> None:
    site = replace(SITE, q_len=128, k_len=128, heads=8, kv_heads=8, mesh=(8, 8))
    assert 5 not in asked_ranks(64)
    found = exchange_seconds(STRATEGIES["hybrid_outer"], site, 64, "contiguous", 5, topology(ranks_per_node=8), "forward")
    assert all(seconds > 0 for seconds in found.values())


class Uneven(Strategy):
    """Rank 0 gives most keys and gets fewest gradients, rank 1 the other way round; by `kind` of message, among the ranks of a scope."""

    name = "uneven"

    def __init__(self, kind: MessageKind, scope: Scope = "flat") -> None:
        self._kind: MessageKind = kind
        self._scope: Scope = scope

    def formulas(self) -> dict[str, sympy.Expr]:
        return {}

    def exchanged(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Exchanges:
        return {"keys": Exchange(self._kind, self._scope, 9 - rank, 1), "grads": Exchange(self._kind, self._scope, 1 + rank, 1)}

    def phases(self, way: Way) -> tuple[Phase, ...]:
        return alone("keys", "grads")

    def work(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Work:
        return NO_WORK


@pytest.mark.parametrize(
    ("strategy", "rank", "seconds"),
    [
        pytest.param(Uneven("send"), 0, 9 + 1, id="messages between two ranks end with these"),
        pytest.param(Uneven("send"), 3, 6 + 4, id="and so do those of others"),
        pytest.param(Uneven("all_to_all"), 0, 9 + 4, id="each collective of all ranks ends with its own slowest"),
        pytest.param(Uneven("all_to_all"), 3, 9 + 4, id="for everyone"),
        pytest.param(Uneven("all_gather", "inside"), 1, 9 + 2, id="of a node's ranks, with the slowest of the first node"),
        pytest.param(Uneven("all_gather", "inside"), 2, 7 + 4, id="or of the second"),
        pytest.param(Uneven("all_gather", "across"), 3, 8 + 4, id="of ranks at one place, with the slowest there"),
    ],
)
def test_a_collective_waits_for_whoever_has_most(strategy: Strategy, rank: int, seconds: float) -> None:
    site = replace(SITE, mesh=(2, 2))
    assert pass_seconds(strategy, site, 4, "contiguous", rank, topology(), "backward") == seconds


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "local"])
def test_faster_hardware_never_takes_longer(name: str) -> None:
    site = replace(SITE, q_len=4096, k_len=4096, heads=8, kv_heads=2, head_dim=64, value_dim=64, mesh=(2, 2), max_ahead=0, max_behind=99)
    slow = topology(ranks_per_node=2, inside=link(1e-3, 1e9), between=link(1e-2, 1e8), launch_s=1e-4)
    faster = [
        replace(slow, inside=link(1e-3, 2e9)), replace(slow, between=link(1e-2, 3e8)), replace(slow, launch_s=1e-5),
        replace(slow, between=link(1e-4, 1e8)), replace(slow, kernels={"float32": KernelRates(2, 2, 2, 2)}),
    ]  # fmt: skip
    before, *after = (step_seconds(STRATEGIES[name], site, 4, "contiguous", each, [0, 1, 2, 3]) for each in (slow, *faster))
    assert all(seconds <= before for seconds in after)


def test_of_many_ranks_some_are_asked() -> None:
    assert asked_ranks(3) == [0, 1, 2]
    assert asked_ranks(16) == list(range(16))
    assert asked_ranks(4096) == [0, 2048, 4095]
