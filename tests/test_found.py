"""The topology found without timing anything: by the device's name, NVML, network cards; the same wherever machines are equal."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autoseq.planning import found, links
from autoseq.planning.found import found_topology
from autoseq.planning.links import Card, NVLinks, network_cards, nvlinks
from autoseq.planning.presets import load_topology


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def test_on_cpus_all_ranks_are_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    topology = found_topology(6)
    assert (topology.name, topology.nodes, topology.ranks_per_node) == ("found: CPU", 1, 6)
    assert topology == found_topology(6)
    assert found_topology(1).memory_bytes > topology.memory_bytes > 0
    assert topology.attention_tile == 512  # ATen's; that of CUDA's kernels is in the presets
    assert topology.host is not None, "gloo sends with the cores that compute"


@pytest.mark.parametrize(
    ("local", "world_size", "nodes"),
    [
        pytest.param("4", 8, 2, id="two whole nodes"),
        pytest.param("4", 2, 1, id="a part of a node"),
        pytest.param("8", 12, 3, id="what is no whole node is cut into smaller ones"),
        pytest.param("many", 8, 1, id="a launcher that says nothing"),
    ],
)
def test_a_launcher_tells_the_ranks_of_a_node(local: str, world_size: int, nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert found_topology(world_size).nodes == nodes
    assert found_topology(world_size).world_size == world_size


@pytest.mark.parametrize(
    ("ranks", "per_node", "nodes"),
    [
        pytest.param([0, 8, 16, 24], 1, 4, id="one of each node"),
        pytest.param([1, 3, 5, 7], 4, 1, id="within a node"),
        pytest.param([8, 9, 10, 11, 12, 13, 14, 15], 8, 1, id="the second node"),
        pytest.param([0, 4, 8, 12], 2, 2, id="two of each"),
        pytest.param([5, 6, 7, 8, 9, 10], 3, 2, id="across an edge"),
        pytest.param([6, 7, 8, 9, 10, 11], 2, 3, id="unequally many"),
    ],
)
def test_the_ranks_of_a_part_of_the_program_lie_where_the_launcher_put_them(
    ranks: list[int], per_node: int, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    topology = found_topology(len(ranks), ranks)
    assert (topology.ranks_per_node, topology.nodes) == (per_node, nodes)


def test_ranks_of_a_node_that_are_not_asked_about_use_their_share_of_its_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, "NVIDIA H100", NO_NVML, tuple(Card(f"mlx5_{i}", "infiniband", 25e9) for i in range(8)))
    for ranks, lanes in (([0, 8, 16, 24], 1), ([0, 4, 8, 12], 2), (list(range(16)), 8)):
        between = found_topology(len(ranks), ranks).between
        assert between is not None
        assert between.lanes == lanes


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("local", [None, 1, 2, 3, 4, 6, 8])
def test_hardware_is_found_for_any_number_of_ranks(cuda: bool, local: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, "NVIDIA A10", NO_NVML)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    for world_size in range(1, 33):
        assert found_topology(world_size).world_size == world_size


def on_gpus(monkeypatch: pytest.MonkeyPatch, name: str, nvlink: NVLinks, cards: tuple[Card, ...] = (), **other: object) -> None:
    device = {"name": name, "major": 9, "minor": 0, "total_memory": 77 * 2**30, "multi_processor_count": 100, **other}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**device))
    monkeypatch.setattr(found, "nvlinks", lambda: nvlink)
    monkeypatch.setattr(found, "network_cards", lambda: cards)


NO_NVML = NVLinks(0, "not installed")


@pytest.mark.parametrize(
    ("name", "nvlink", "kernels", "inside"),
    [
        pytest.param("NVIDIA H100 80GB HBM3", NO_NVML, "8xH100", "8xH100", id="by name"),
        pytest.param("NVIDIA A100-SXM4-80GB", NVLinks(12), "8xA100", "8xA100", id="with NVLink"),
        pytest.param("NVIDIA H100 PCIe", NO_NVML, "8xH100", "4xL20", id="PCIe by name"),
        pytest.param("NVIDIA H200", NVLinks(0), "8xH200", "4xL20", id="no NVLink is active"),
        pytest.param("NVIDIA A10", NO_NVML, "4xA10", "4xA10", id="a preset on PCIe"),
    ],
)
def test_a_known_device_has_the_rates_of_its_preset(
    name: str, nvlink: NVLinks, kernels: str, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpus(monkeypatch, name, nvlink)
    topology = found_topology(16)
    assert (topology.nodes, topology.ranks_per_node, topology.memory_bytes) == (2, 8, 77 * 2**30)
    assert topology.kernels == load_topology(kernels).kernels
    assert topology.inside == load_topology(inside).inside
    assert name in topology.name
    assert name in topology.sources[0]


def test_an_unknown_device_is_estimated_from_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, "Some GPU", NO_NVML, clock_rate=1_000_000, memory_bus_width=512, memory_clock_rate=1_000_000)
    topology = found_topology(8)
    assert topology.kernels["bfloat16"].peak_flops_per_s == pytest.approx(4096 * 100 * 1e9)
    assert topology.memory_bytes_per_s == pytest.approx(2 * 1e9 * 512 / 8)
    assert topology.inside == load_topology("4xL20").inside
    on_gpus(monkeypatch, "Old GPU", NO_NVML, major=7, minor=5)
    old = found_topology(8).kernels
    assert old["bfloat16"] == old["float32"] != old["float16"]


def test_network_cards_set_what_crosses(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus(monkeypatch, "NVIDIA H100", NO_NVML, tuple(Card(f"mlx5_{i}", "infiniband", 25e9) for i in range(4)))
    between = found_topology(16).between
    assert between is not None
    assert (between.lanes, between.all_gather.bytes_per_s, between.all_to_all.bytes_per_s) == (4, pytest.approx(23e9), pytest.approx(20e9))


def test_cards_as_linux_shows_them(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")

    for name, state in (("mlx5_1", "4: ACTIVE"), ("mlx5_0", "4: ACTIVE"), ("mlx5_2", "1: DOWN")):
        write(f"infiniband/{name}/ports/1/state", state)
        write(f"infiniband/{name}/ports/1/rate", "400 Gb/sec (4X NDR)")
    for name, state, speed in (("eth0", "up", "25000"), ("eth1", "down", "-1"), ("eth2", "up", "unknown"), ("veth9", "up", "10000")):
        write(f"net/{name}/operstate", state)
        write(f"net/{name}/speed", speed)
        if name != "veth9":
            (tmp_path / f"net/{name}/device").mkdir()
    assert network_cards(tmp_path) == (
        Card("mlx5_0", "infiniband", 50e9), Card("mlx5_1", "infiniband", 50e9), Card("eth0", "ethernet", 3.125e9),
    )  # fmt: skip
    assert network_cards(tmp_path / "nowhere") == ()


class NVMLError(Exception):
    pass


def fake_nvml(**changed: object) -> SimpleNamespace:
    def state(device: object, link: int) -> int:
        if link >= 3:
            raise NVMLError("Not Supported")
        return int(link < 2)

    shape = {
        "NVMLError": NVMLError, "NVML_FEATURE_ENABLED": 1, "nvmlInit": lambda: None, "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda _: "device", "nvmlDeviceGetNvLinkState": state,
    }  # fmt: skip
    return SimpleNamespace(**shape | changed)


def fails(*_: object) -> None:
    raise NVMLError("Driver Not Loaded")


@pytest.mark.parametrize(
    ("module", "links"),
    [
        pytest.param(None, NVLinks(0, "NVML's Python binding is not installed; pip install nvidia-ml-py"), id="not installed"),
        pytest.param(fake_nvml(), NVLinks(2), id="two of three are active"),
        pytest.param(
            fake_nvml(nvmlInit=fails), NVLinks(0, "NVML does not start (Driver Not Loaded); it comes with NVIDIA's driver"), id="no driver"
        ),
        pytest.param(fake_nvml(nvmlDeviceGetHandleByIndex=fails), NVLinks(0, "NVML finds no device (Driver Not Loaded)"), id="no device"),
    ],
)
def test_nvlinks(module: object, links: NVLinks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert nvlinks() == links


def test_this_machine_is_looked_at_without_an_error() -> None:
    assert isinstance(links.network_cards(), tuple)
    assert found_topology(2).world_size == 2
