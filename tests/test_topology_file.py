"""Topologies as JSON: what is written comes back as it was, and each mistake is an error that names the field."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoseq.planning.topology import DTYPES, KINDS, Host, KernelRates, Link, Rate, Topology
from autoseq.planning.topology_file import dump, parse_topology
from autoseq.runtime.errors import TopologyError

RATES = {"latency_us": 10, "gbytes_per_s": 20}
WHOLE: dict[str, Any] = {
    "name": "mine", "ranks_per_node": 4, "nodes": 2,
    "inside": {"duplex": "full", **{kind: dict(RATES) for kind in KINDS}},
    "between": {"duplex": "half", "lanes": 3, **{kind: {"latency_ms": 0.5, "bytes_per_s": 12500000} for kind in KINDS}},
    "kernels": {"float32": {"peak_tflops": 4, "matmul_tflops": 3.5, "attention_flops_per_s": 2e12, "attention_backward_tflops": 1}},
    "memory_gib": 1.5, "memory_gbytes_per_s": 100, "launch_us": 2.5, "attention_tile": 64,
    "host": {"latency_ms": 0.25, "gbytes_per_s": 2, "ranks_per_core": 1.5, "sharing_ranks": 2}, "sources": ["all: made up"],
}  # fmt: skip


def changed(path: str, value: Any) -> str:
    """The file with a field set to a value, or without it (a KeyError stands for that)."""
    data = copy.deepcopy(WHOLE)
    *parents, name = path.split(".")
    place = data
    for parent in parents:
        place = place[parent]
    if value is KeyError:
        del place[name]
    else:
        place[name] = value
    return json.dumps(data)


def test_units_are_read_without_rounding() -> None:
    found = parse_topology(json.dumps(WHOLE), "a file")
    assert found.inside.send == Rate(1e-05, 2e10)
    assert found.between is not None
    assert (found.between.all_gather, found.between.duplex, found.between.lanes) == (Rate(5e-4, 1.25e7), "half", 3)
    assert found.kernels["float32"] == KernelRates(4e12, 3.5e12, 2e12, 1e12)
    assert (found.memory_bytes, found.memory_bytes_per_s, found.launch_s) == (3 * 2**29, 1e11, 2.5e-6)
    assert (found.name, found.nodes, found.ranks_per_node, found.sources) == ("mine", 2, 4, ("all: made up",))
    assert (found.attention_tile, found.host) == (64, Host(2.5e-4, 2e9, 1.5, 2))
    assert parse_topology(changed("host", None), "a file").host is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        pytest.param("inside.send.latency_us", KeyError, r"send\.latency_us is missing, or latency_ms, or latency_s$", id="missing"),
        pytest.param("launch_us", KeyError, r"launch_us is missing, or launch_s", id="missing at the top"),
        pytest.param("inside.send", KeyError, r"inside\.send is missing", id="a kind is missing"),
        pytest.param("inside.send.latency_us", -1, r"inside\.send\.latency_us is a number above 0, not -1", id="negative"),
        pytest.param("memory_gib", 0, r"memory_gib is a number above 0, not 0", id="zero"),
        pytest.param("inside.send.gbytes_per_s", float("nan"), r"inside\.send\.gbytes_per_s is a number above 0, not NaN", id="NaN"),
        pytest.param("inside.send.gbytes_per_s", float("inf"), r"inside\.send\.gbytes_per_s is a .* not Infinity", id="infinite"),
        pytest.param("inside.send.gbytes_per_s", "20", r"inside\.send\.gbytes_per_s is a .* not the text '20'", id="a text"),
        pytest.param("inside.send.gbytes_per_s", True, r"inside\.send\.gbytes_per_s is a number above 0, not true", id="a boolean"),
        pytest.param("launch_us", 1e-320, r"launch_us is out of range", id="too small for a float"),
        pytest.param("memory_gbytes_per_s", 1e305, r"memory_gbytes_per_s is out of range", id="too large for a float"),
        pytest.param("attention_tile", KeyError, r"attention_tile is missing$", id="a file from before it was asked for"),
        pytest.param("host", KeyError, r"host is missing$", id="nothing said of what messages take of the cores"),
        pytest.param("host.latency_ms", -1, r"host\.latency_ms is a number above 0, not -1", id="less than no time of the cores"),
        pytest.param("host.ranks_per_core", 0.5, r"host\.ranks_per_core is 1 or more, not 0\.5; 1 means", id="half a rank on a core"),
        pytest.param("nodes", 1.5, r"nodes is a whole number, 1 or more, not 1\.5", id="half a node"),
        pytest.param("between.lanes", 0, r"between\.lanes is a whole number, 1 or more, not 0", id="no card"),
        pytest.param("inside.lanes", 1, r"inside\.lanes is unknown; fields here are send, .*duplex", id="cards inside a node"),
        pytest.param("between.duplex", "both", r"between\.duplex is \"full\" or \"half\", not 'both'", id="no such duplex"),
        pytest.param("between", None, r"between is null, but there are 2 nodes", id="nodes without a link"),
        pytest.param("between", [], r"between is an object, not a list", id="a list for an object"),
        pytest.param("name", 3, r"name is a text, not 3", id="a number for a text"),
        pytest.param("sources", "none", r"sources is a list of texts", id="a text for a list"),
        pytest.param("kernels", {}, r"kernels has no dtype; give the rates of at least one of bfloat16, ", id="no dtype"),
        pytest.param("kernels.flaot32", {}, r"kernels\.flaot32 is unknown \(did you mean 'float32'\?\)", id="a dtype misspelt"),
        pytest.param("launch_s", 1e-6, r"launch_s says again what launch_us says", id="a number twice"),
        pytest.param("latency_us", 1, r"latency_us is unknown.*; fields here are name, ", id="unknown"),
        pytest.param("memory_gigabytes_per_s", 1, r"unknown \(did you mean 'memory_gbytes_per_s'\?\)", id="unknown but near"),
    ],
)  # fmt: skip
def test_a_mistake_names_its_field(path: str, value: Any, message: str) -> None:
    with pytest.raises(TopologyError, match=rf"^my\.json: .*{message}"):
        parse_topology(changed(path, value), "my.json")


@pytest.mark.parametrize(
    ("field", "message"),
    [("memory_gib", r"memory_gib is out of range: 1E\+999999$"), ("nodes", r"nodes is out of range: 1E\+999999$")],
)
def test_numbers_that_arithmetic_cannot_have(field: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        parse_topology(changed(field, 7777).replace("7777", "1e999999"), "my.json")
    with pytest.raises(TopologyError, match=r"my\.json is not JSON: "):
        parse_topology(changed(field, 7777).replace("7777", "1e" + 30 * "9"), "my.json")


def test_a_misspelt_field_is_missing_and_named() -> None:
    text = changed("inside.send.latency_us", KeyError).replace('"all_gather"', '"al_gather"')
    with pytest.raises(TopologyError, match=r"inside\.all_gather is missing; there is 'al_gather'"):
        parse_topology(text.replace('"send": {"gby', '"send": {"latency_us": 1, "gby'), "my.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{", r"my\.json is not JSON: ", id="no JSON"),
        pytest.param("[" * 100000, r"my\.json is not JSON: ", id="nested without end"),
        pytest.param("[]", r"my\.json: a topology is an object, not a list", id="no object"),
        pytest.param('{"name": "a", "name": "b"}', r"my\.json: the field 'name' is there twice", id="a field twice"),
    ],
)
def test_what_is_no_object(text: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        parse_topology(text, "my.json")


POSITIVE = st.floats(min_value=1e-12, max_value=1e18)
RATE = st.builds(Rate, POSITIVE, POSITIVE)
LINK = st.builds(Link, RATE, RATE, RATE, RATE, RATE, st.sampled_from(["full", "half"]))
COUNT = st.integers(1, 10**6)
KERNELS = st.dictionaries(st.sampled_from(DTYPES), st.builds(KernelRates, POSITIVE, POSITIVE, POSITIVE, POSITIVE), min_size=1)
TOPOLOGIES = st.builds(
    Topology, st.text(min_size=1), COUNT, COUNT, LINK, st.builds(lambda link, lanes: Link(*[link.send] * 5, lanes=lanes), LINK, COUNT),
    KERNELS, st.integers(1, 2**50), POSITIVE, POSITIVE, st.lists(st.text()).map(tuple), COUNT,
    st.none() | st.builds(Host, POSITIVE, POSITIVE, st.floats(1, 1e6), COUNT),
)  # fmt: skip


@given(TOPOLOGIES)
def test_what_is_written_is_read_as_it_was(topology: Topology) -> None:
    assert parse_topology(dump(topology), "dumped") == topology


def test_it_is_written_for_people() -> None:
    text = dump(parse_topology(json.dumps(WHOLE), "a file"))
    assert '    "send": {"latency_us": 500, "gbytes_per_s": 0.0125},\n' in text
    assert '  "memory_gib": 1.5,\n' in text
    assert max(map(len, text.splitlines())) < 130
    assert re.search(r'"name": "mine"', text)
