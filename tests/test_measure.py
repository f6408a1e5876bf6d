"""Measuring a topology: lines through times, rates from the times of links, and real ranks that all get the same."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from dataclasses import replace

import pytest
import torch

from autoseq.planning import measure as measuring
from autoseq.planning import time_links
from autoseq.planning.fitting import Line, Sample, fit_line
from autoseq.planning.measure import Request, _with_links, measure, world_of_launcher
from autoseq.planning.presets import load_topology
from autoseq.planning.time_kernels import KernelEffort, seconds_of
from autoseq.planning.time_links import Effort
from autoseq.planning.topology import KINDS, Kind, Scope, Topology
from autoseq.planning.topology_file import dump, parse_topology
from autoseq.runtime.errors import OptionError
from ranks import run_ranks

SIZES = (10**3, 10**5, 10**7)


def line(latency_s: float, units_per_s: float) -> list[Sample]:
    return [Sample(units, latency_s + units / units_per_s) for units in SIZES]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        pytest.param(line(1e-4, 1e9), Line(1e-4, 1e9), id="a line"),
        pytest.param(line(0, 2e9), Line(1e-9, 2e9), id="through the origin"),
        pytest.param([Sample(1000, 1e-3)], Line(1e-9, 1e6), id="one sample"),
        pytest.param([Sample(10, 1e-3), Sample(1000, 1e-3)], Line(1e-3, 2e7), id="times that do not grow"),
        pytest.param([Sample(10, 4e-3), Sample(1000, 1e-3)], Line(1.6e-3, 2e7), id="times that shrink"),
        pytest.param([Sample(10, 1e-6), Sample(100, 9e-5)], Line(1e-9, 9.989e6), id="times that grow faster than the work"),
    ],
)
def test_a_line_has_a_latency_and_a_rate_above_zero(samples: list[Sample], expected: Line) -> None:
    assert fit_line(samples) == expected


@pytest.mark.parametrize("strange", range(5))
def test_one_strange_time_does_not_move_the_line(strange: int) -> None:
    """The machine did something else for a while; the latency is a ten-thousandth of the largest time, and still right."""
    samples = [Sample(n, 1e-5 + n / 1e8) for n in (10**3, 10**4, 10**5, 10**6, 10**7)]
    samples[strange] = Sample(samples[strange].units, 8 * samples[strange].seconds)
    fitted = fit_line(samples)
    assert (fitted.latency_s, fitted.units_per_s) == (pytest.approx(1e-5, rel=0.15), pytest.approx(1e8, rel=0.05))


TIMES = dict[Scope, dict[Kind, list[Sample]]]


def times_of(topology: Topology, P: int, scopes: tuple[Scope, ...]) -> TIMES:
    """What timing would find on such hardware."""
    asked = (10**3, 10**6, 10**8)
    return {
        scope: {kind: [Sample(n, topology.seconds(kind, n, 1, ranks=P, scope=scope)) for n in asked] for kind in KINDS} for scope in scopes
    }


@pytest.mark.parametrize(
    ("name", "lanes", "scopes"),
    [
        pytest.param("4xH800", 1, ("flat",), id="a node"),
        pytest.param("2x4xA800-2nic", 2, ("inside", "across", "flat"), id="two nodes with two cards"),
        pytest.param("2x4xA800-8nic", 8, ("inside", "across", "flat"), id="more cards than ranks"),
        pytest.param("4x2xL20-1nic", 1, ("inside", "across", "flat"), id="four nodes on PCI Express"),
        pytest.param("6x1xA10", 1, ("flat",), id="nodes of one rank"),
    ],
)
def test_the_rates_of_links_are_found_again_from_their_times(name: str, lanes: int, scopes: tuple[Scope, ...]) -> None:
    hardware = load_topology(name)
    P, request = hardware.world_size, Request(hardware.ranks_per_node, lanes)
    found = _with_links(load_topology("8xH100"), P, request, times_of(hardware, P, scopes))
    assert (found.nodes, found.ranks_per_node) == (hardware.nodes, hardware.ranks_per_node)
    for scope in scopes:
        for kind in KINDS:
            for num_bytes in SIZES:
                expected = hardware.seconds(kind, num_bytes, 1, ranks=P, scope=scope)
                assert found.seconds(kind, num_bytes, 1, ranks=P, scope=scope) == pytest.approx(expected, rel=2e-3)
    if hardware.nodes == 1:
        assert found.between is None


def test_the_cost_of_a_call_is_of_many_in_a_row() -> None:
    calls = []
    assert 0 < seconds_of(lambda: calls.append(0), torch.device("cpu"), 3) < 1e-4
    assert len(calls) > 1000


# Real ranks ----------------------------------------------------------------------------------------------------------

SMALL = Effort((256, 4096), 3), KernelEffort((16, 32), 2, 16, (16, 32), (64, 256), 3)


def measured(rank: int, world_size: int, request: Request) -> tuple[str, str]:
    shown = io.StringIO()
    with redirect_stderr(shown):
        return dump(measure(request, torch.device("cpu"))), shown.getvalue()


@pytest.mark.parametrize(
    ("ranks", "request_", "nodes"),
    [
        pytest.param(2, Request(2, efforts=SMALL), 1, id="one node"),
        pytest.param(4, Request(2, 2, ("float32", "bfloat16"), SMALL), 2, id="two nodes, two dtypes"),
        pytest.param(3, Request(1, efforts=SMALL), 3, id="nodes of one rank"),
        pytest.param(1, Request(1, efforts=SMALL), 1, id="one rank"),
    ],
)
def test_ranks_measure_and_agree(ranks: int, request_: Request, nodes: int) -> None:
    texts, shown = zip(*run_ranks(measured, ranks, request_), strict=True)
    assert len(set(texts)) == 1, "every rank has what rank 0 has"
    found = parse_topology(texts[0], "measured")
    assert (found.nodes, found.world_size) == (nodes, ranks)
    assert set(found.kernels) == set(request_.dtypes or ("float32",))
    for rates in found.kernels.values():
        reached = (rates.matmul_flops_per_s, rates.attention_flops_per_s, rates.attention_backward_flops_per_s)
        assert rates.peak_flops_per_s >= max(reached)
    assert (found.between is None) == (nodes == 1) or ranks == 1, "one rank times no link, and keeps those that are found"
    if found.between is not None:
        assert found.between.lanes == request_.lanes
    assert found.name == f"measured: {ranks} x CPU"
    assert all("measured" in source or ":" in source for source in found.sources)
    assert "timing links and kernels" in shown[0], "rank 0 shows progress"
    assert not any(shown[1:])


def test_ranks_are_started_where_there_are_none() -> None:
    assert measuring.measure_here(Request(2, efforts=SMALL), 2).world_size == 2


def test_ranks_of_a_launcher_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert measuring.measure_launched(Request(1, efforts=SMALL)).world_size == 1
    assert not torch.distributed.is_initialized(), "and left as they were"


def test_a_request_that_cannot_be() -> None:
    with pytest.raises(OptionError, match=r"no dtype 'flaot32' \(did you mean 'float32'\?\); kernels are timed in bfloat16, float16"):
        measuring.measure_here(Request(1, dtypes=("flaot32",)), 4)
    with pytest.raises(OptionError, match=r"4 ranks are not whole nodes of 3"):
        measuring.measure_here(Request(3), 4)


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        pytest.param({}, 0, id="nothing launched this"),
        pytest.param({"RANK": "1", "WORLD_SIZE": "4"}, 4, id="torchrun"),
        pytest.param({"WORLD_SIZE": "4"}, 0, id="a variable alone"),
    ],
)
def test_whether_a_launcher_started_this(variables: dict[str, str], ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert world_of_launcher() == ranks


@pytest.mark.gpu
def test_a_gpu_by_itself() -> None:
    found = measuring.measure_here(replace(Request(1), dtypes=("bfloat16",)), 1)
    rates = found.kernels["bfloat16"]
    assert rates.peak_flops_per_s > rates.matmul_flops_per_s > 1e13
    assert rates.attention_flops_per_s > 1e12


def test_slow_links_stop_at_the_size_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_links, "slowest", lambda seconds, device: seconds)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(time_links, "_TOO_LONG_S", 0.0)
    monkeypatch.setattr(time_links, "_message", lambda kind, group, num_bytes, device: (float, num_bytes))
    steps: list[int] = []
    samples = time_links.time_messages("send", None, torch.device("cpu"), SMALL[0], lambda: steps.append(1))  # type: ignore[arg-type]
    assert [sample.units for sample in samples] == [256]
    assert len(steps) == len(SMALL[0].message_bytes), "and the bar goes on"

