"""Topologies: how long messages take, by who talks to whom; nodes grow and shrink; what cannot be is an error that says why."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoseq.planning.topology import KINDS, KernelRates, Link, Rate, Topology
from autoseq.runtime.errors import TopologyError
from autoseq.runtime.timeline import MessageKind, Scope
from unit_hardware import seconds_in

KERNELS = KernelRates(4e12, 3e12, 2e12, 1e12)
# Inside a node 10 us and 100 GB/s; between nodes 20 us and 10 GB/s a card.
INSIDE = Link(*[Rate(1e-5, 1e11)] * 5)
BETWEEN = Link(*[Rate(2e-5, 1e10)] * 5, lanes=2)
ONE = Topology("one", 4, 1, INSIDE, None, {"float32": KERNELS}, 10**9, 1e12, 1e-6)
TWO = replace(ONE, name="two", nodes=2, between=BETWEEN)

MB = 10**6
RING = ("all_gather", "reduce_scatter", "all_reduce")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", ["flat", "inside"])
def test_in_one_node_messages_cost_latency_and_bytes_the_rate(kind: MessageKind, scope: Scope) -> None:
    assert seconds_in(scope, ONE, kind, 6 * MB, 3, ranks=4) == pytest.approx(3e-5 + 6e-5)
    assert seconds_in("inside", TWO, kind, 6 * MB, 3, ranks=8) == pytest.approx(3e-5 + 6e-5)


@pytest.mark.parametrize(
    ("kind", "scope", "seconds"),
    [
        pytest.param("send", "flat", 2e-5 + 1e-4, id="a ring crosses on one rank a node, through one card"),
        pytest.param("all_to_all", "flat", 2e-5 + 4 / 7 * 1e-4 * 4 / 2, id="four ranks share two cards for 4/7 of an all-to-all"),
        *(pytest.param(kind, "flat", 2e-5 + 1e-4 / 2, id=f"{kind} enters a node once, through two cards") for kind in RING),
        *(pytest.param(kind, "across", 2e-5 + 1e-4 * 4 / 2, id=f"{kind} across: four ranks share two cards") for kind in KINDS),
    ],
)
def test_over_two_nodes(kind: MessageKind, scope: Scope, seconds: float) -> None:
    assert seconds_in(scope, TWO, kind, MB, 1, ranks=8) == pytest.approx(seconds)
    assert scope != "flat" or TWO.seconds(kind, MB, 1, ranks=8) == pytest.approx(seconds)


def test_more_cards_than_ranks_do_not_speed_up_one_message() -> None:
    many = replace(TWO, between=replace(BETWEEN, lanes=8))
    assert seconds_in("across", many, "send", MB, 1, ranks=8) == pytest.approx(2e-5 + 1e-4)
    assert seconds_in("across", many, "all_to_all", MB, 1, ranks=8) == pytest.approx(2e-5 + 1e-4 / 2)


def test_inside_and_crossing_go_on_at_once_and_the_slower_counts() -> None:
    slow_inside = replace(TWO, inside=Link(*[Rate(1e-5, 1e8)] * 5))
    assert slow_inside.seconds("all_to_all", MB, 1, ranks=8) == pytest.approx(1e-5 + 3 / 7 * 1e-2)
    assert slow_inside.seconds("all_gather", MB, 1, ranks=8) == pytest.approx(1e-5 + 1e-2)
    assert [path.where for path in TWO.paths("all_to_all", ranks=8)] == ["inside", "between"]


def test_half_duplex_links_carry_what_arrives_too() -> None:
    half = replace(ONE, inside=replace(INSIDE, duplex="half"))
    assert half.seconds("send", MB, 1, ranks=4) == pytest.approx(1e-5 + 2e-5)


def test_nodes_of_one_rank_have_no_inside() -> None:
    single = replace(TWO, ranks_per_node=1, nodes=4, between=replace(BETWEEN, lanes=1))
    assert [path.where for path in single.paths("all_gather", ranks=4)] == ["between"]
    assert single.seconds("all_to_all", MB, 1, ranks=4) == pytest.approx(2e-5 + 1e-4)


@pytest.mark.parametrize("scope", ["flat", "inside", "across"])
def test_a_rank_by_itself_sends_nothing_and_a_node_by_itself_crosses_nothing(scope: Scope) -> None:
    assert seconds_in(scope, TWO, "send", 0, 0, ranks=1) == 0 == TWO.seconds("send", 0, 0, ranks=1)
    assert seconds_in(scope, TWO, "send", MB, 1, ranks=4) == pytest.approx(1e-5 + 1e-5)


@pytest.mark.parametrize(
    ("P", "ranks", "seconds"),
    [
        pytest.param(2, 2, 1e-5 + 1e-5, id="both in one node"),
        pytest.param(2, 4, 2e-5 + 1e-4 * 2 / 2, id="two of each node: each two groups send through two cards"),
        pytest.param(4, 2, 2e-5 + 1e-4 * 4 / 2, id="one of each node: four groups send through two cards"),
        pytest.param(8, 2, 2e-5 + 1e-4 * 4 / 2, id="one of each second node"),
        pytest.param(1, 8, 2e-5 + 1e-4 / 2, id="all ranks"),
    ],
)
def test_ranks_at_one_place_of_each_sequence(P: int, ranks: int, seconds: float) -> None:
    """While those at the other places send likewise."""
    asked = TWO.at(P * ranks).every(P)
    assert asked.world_size == ranks
    assert asked.seconds("all_reduce", MB, 1, ranks=ranks) == pytest.approx(seconds)


def test_as_many_nodes_as_the_ranks_take() -> None:
    assert (TWO.at(4096).nodes, TWO.at(4096).world_size) == (1024, 4096)
    assert (TWO.at(2).nodes, TWO.at(2).ranks_per_node) == (1, 2)
    assert TWO.at(8) == TWO


@pytest.mark.parametrize(
    ("topology", "ranks", "message"),
    [
        pytest.param(ONE, 8, r"'one' has one node of 4 ranks and says nothing of a network .* 8 ranks", id="no network"),
        pytest.param(TWO, 10, r"'two': 10 ranks are not whole nodes of 4; the nearest that are: 8 and 12", id="a part of a node"),
        pytest.param(TWO, 0, r"1 rank or more, not 0", id="no rank"),
    ],
)
def test_ranks_that_do_not_fit(topology: Topology, ranks: int, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        topology.at(ranks)
    if ranks:
        with pytest.raises(TopologyError, match=message):
            topology.seconds("send", 1, 1, ranks=ranks)


def test_kernels_of_a_dtype_nobody_measured_are_those_of_the_nearest() -> None:
    halves = replace(KERNELS, peak_flops_per_s=9e12)
    both = replace(ONE, kernels={"float32": KERNELS, "bfloat16": halves})
    assert [both.kernel_rates(each) for each in ("float64", "float16")] == [KERNELS, halves]
    assert list(both.kernels) == ["bfloat16", "float32"], "in one order, whatever it was made from"
    with pytest.raises(TopologyError, match=r"'one' knows no dtype 'int8'; kernels have rates for bfloat16, float16, float32, float64"):
        ONE.kernel_rates("int8")


def test_a_topology_is_a_value() -> None:
    assert pickle.loads(pickle.dumps(TWO)) == TWO
    assert hash(replace(TWO)) == hash(TWO)
    assert replace(TWO, nodes=3) != TWO


COUNT = st.integers(1, 8)
RATES = st.builds(Rate, st.floats(1e-7, 1e-2), st.floats(1e6, 1e12))
LINKS = st.builds(Link, RATES, RATES, RATES, RATES, RATES, st.sampled_from(["full", "half"]), COUNT)


@given(COUNT, COUNT, LINKS, LINKS, st.sampled_from(KINDS), st.sampled_from(get_args(Scope)), st.integers(0, 10**9), st.integers(0, 100))
def test_more_takes_longer_and_faster_links_take_less(
    R: int, nodes: int, inside: Link, between: Link, kind: MessageKind, scope: Scope, num_bytes: int, messages: int
) -> None:
    topology = replace(ONE, ranks_per_node=R, nodes=nodes, inside=inside, between=between)
    P = topology.world_size

    def seconds(hardware: Topology, num_bytes: int, messages: int) -> float:
        return seconds_in(scope, hardware, kind, num_bytes, messages, ranks=P)

    taken = seconds(topology, num_bytes, messages)
    assert (taken > 0) == (P > 1 and num_bytes + messages > 0)
    assert seconds(topology, num_bytes + 1000, messages) >= taken
    assert seconds(topology, num_bytes, messages + 1) >= taken
    assert seconds(topology, 2 * num_bytes, 2 * messages) == pytest.approx(2 * taken)
    fast = replace(inside, **{kind: Rate(inside.rate(kind).latency_s / 2, inside.rate(kind).bytes_per_s * 2)})
    lanes = replace(between, lanes=between.lanes + 1)
    assert seconds(replace(topology, inside=fast, between=lanes), num_bytes, messages) <= taken
    assert seconds(topology.at(P), num_bytes, messages) == taken
