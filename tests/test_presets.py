"""Topologies by name: each preset is whole and says where its numbers come from; names tell nodes, ranks and network cards."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoseq.options import Options, parse_options
from autoseq.planning.presets import load_topology, names
from autoseq.planning.topology import KINDS
from autoseq.planning.topology_file import dump
from autoseq.runtime.errors import OptionError, TopologyError

NAMES = ["4xA10", "4xL20", "8xA100", "8xA800", "8xH100", "8xH200", "8xH800"]


def test_the_nodes_there_are() -> None:
    assert names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source(name: str) -> None:
    topology = load_topology(name)
    assert (topology.name, topology.nodes, topology.world_size) == (name, 1, int(name[0]))
    assert topology.host is None, "a GPU computes while others send"
    told = [field for source in topology.sources for field in re.findall(r"(?:^|[,;.] )([a-z_]\w*(?:\.[a-z_]\w*)*\.?)(?=[:,])", source)]
    numbers = [f"{link}.{kind}" for link in ("inside", "between") for kind in KINDS] + ["inside.latency_us", "between.latency_us"]
    numbers += [f"kernels.float32.{rate}" for rate in ("peak_tflops", "matmul_tflops", "attention_tflops", "attention_backward_tflops")]
    numbers += [field.replace("float32", "bfloat16") for field in numbers if "float32" in field]
    for field in [*numbers, "memory_gib", "memory_gbytes_per_s", "launch_us", "attention_tile"]:
        assert any(field == each or field.startswith(f"{each}.") for each in told), field
    for source in topology.sources:
        assert re.search(r"estimate|fitted|data sheet|vendors' pages|arXiv|github\.com|of the [AH]1|torch reports", source), source


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_a_little_less_than_what_its_source_says_in_the_same_unit(name: str) -> None:
    topology, said = load_topology(name), re.compile(r"less than the (\d+) GiB that the data sheet calls \1 GB")
    (sold,) = [int(gib) for source in topology.sources for gib in said.findall(source)]
    assert 0.9 * sold * 2**30 < topology.memory_bytes < sold * 2**30


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_in_order(name: str) -> None:
    """Kernels stay below the peak, and a message costs more between nodes than inside them."""
    topology = load_topology(name)
    for rates in topology.kernels.values():
        reached = (rates.matmul_flops_per_s, rates.attention_flops_per_s, rates.attention_backward_flops_per_s)
        assert rates.peak_flops_per_s > reached[0] >= reached[1] >= reached[2]
    assert topology.between is not None
    for kind in KINDS:
        inside, between = topology.inside.rate(kind), topology.between.rate(kind)
        assert inside.latency_s < between.latency_s
        assert inside.bytes_per_s > between.bytes_per_s


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("8xH100", (1, 8, 8), id="a node"),
        pytest.param("4xh100", (1, 4, 4), id="a part of a node, in small letters, with its share of the cards"),
        pytest.param("2x8xA800-4nic", (2, 8, 4), id="two nodes with four cards"),
        pytest.param("16x4xH200", (16, 4, 4), id="nodes of four"),
        pytest.param("3x1xA10-2nic", (3, 1, 2), id="nodes of one"),
    ],
)
def test_a_name_tells_the_shape(name: str, shape: tuple[int, int, int]) -> None:
    found = load_topology(name)
    assert found.between is not None
    assert (found.name, found.nodes, found.ranks_per_node, found.between.lanes) == (name, *shape)


@pytest.mark.parametrize("lanes", range(1, 9))
def test_more_cards_carry_more(lanes: int) -> None:
    one = load_topology("2x8xH100-1nic").seconds("all_to_all", 1e9, 0, ranks=16)
    assert load_topology(f"2x8xH100-{lanes}nic").seconds("all_to_all", 1e9, 0, ranks=16) == pytest.approx(one / lanes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("8xh10", r"nothing is known of h10 \(did you mean 'H100'\?\); there are 4xA10, ", id="a device misspelt"),
        pytest.param("H100", r"no topology 'H100' \(did you mean '8xH100'\?\); it is 8xH100, .* or a JSON", id="a device alone"),
        pytest.param("16xH100", r"is a node of 8xH100, so a node has 1 to 8 ranks", id="too many ranks in a node"),
        pytest.param("0x8xH100", r"one node or more", id="no node"),
        pytest.param("2x8xH100-9nic", r"1 to 8 network cards, not 9", id="too many cards"),
        pytest.param("2x8xH100-0nic", r"1 to 8 network cards, not 0", id="no card"),
        pytest.param("there-is-none.json", r"cannot be read: .*No such file", id="no such file"),
    ],
)
def test_names_that_say_nothing(name: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        load_topology(name)


def test_files(tmp_path: Path) -> None:
    mine, bytes_only = tmp_path / "mine.json", tmp_path / "other.json"
    mine.write_text(dump(load_topology("2x4xA100")).replace("2x4xA100", "mine"))
    assert load_topology(mine) == load_topology(str(mine))
    assert load_topology(mine).name == "mine"
    assert load_topology(load_topology(mine)) == load_topology(mine)
    bytes_only.write_bytes(b"\xff")
    with pytest.raises(TopologyError, match=r"other\.json' cannot be read: .*utf-8"):
        load_topology(bytes_only)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(TopologyError, match=r"cannot be read: .*directory"):
        load_topology(tmp_path / "folder.json")


def test_the_option_takes_a_name_a_file_or_the_record(tmp_path: Path) -> None:
    node = load_topology("8xH100")
    (tmp_path / "mine.json").write_text(dump(node))
    assert Options().topology is None
    for given in ("8xH100", tmp_path / "mine.json", str(tmp_path / "mine.json"), node):
        assert Options(topology=given).topology == node
    assert parse_options({"topology": node}) == Options(topology=node), "and compares by value, as torch.compile does"
    with pytest.raises(OptionError, match=r"option 'topology' is a topology's name, a JSON file, a Topology or None, not int"):
        Options(topology=8)  # type: ignore[arg-type]
    with pytest.raises(TopologyError, match="did you mean '8xH100'"):
        Options(topology="H100")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"launch_s": -1.0}, r"launch_us is a number above 0, not -1000000", id="negative"),
        pytest.param({"memory_bytes_per_s": float("nan")}, r"memory_g?bytes_per_s is a number above 0, not NaN", id="NaN"),
        pytest.param({"nodes": 2, "between": None}, r"between is null, but there are 2 nodes", id="nodes without a link"),
        pytest.param({"ranks_per_node": "8"}, r"ranks_per_node is a whole number, 1 or more, not the text '8'", id="a text"),
    ],
)
def test_a_record_is_held_to_what_a_file_is(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TopologyError, match=rf"^topology '8xH100': ({message})"):
        Options(topology=replace(load_topology("8xH100"), **changes))


def test_this_machine_is_no_preset_and_in_options_the_default() -> None:
    with pytest.raises(TopologyError, match=r"topology 'here' is this machine, .*: no file has it"):
        load_topology("here")
    assert Options(topology="here").topology is None
