"""Measuring a topology: lines through times, rates from the times of links, and real ranks that all get the same."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autoseq.launch import LaunchError
from autoseq.planning import measure as measuring
from autoseq.planning import shared_cores, time_kernels, time_links
from autoseq.planning.fitting import Line, Sample, fit_line
from autoseq.planning.measure import Request, _with_links, measure, world_of_launcher
from autoseq.planning.presets import load_topology
from autoseq.planning.shared_cores import Threads, ranks_here, turns, turns_here
from autoseq.planning.time_kernels import Clock, KernelEffort, seconds_of, time_launch
from autoseq.planning.time_links import Effort
from autoseq.planning.topology import KINDS, Host, Topology
from autoseq.planning.topology_file import dump, parse_topology
from autoseq.runtime import blockwise
from autoseq.runtime.errors import OptionError
from autoseq.runtime.timeline import MessageKind, Scope
from ranks import run_ranks
from unit_hardware import seconds_in

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


TIMES = dict[Scope, dict[MessageKind, list[Sample]]]


def times_of(topology: Topology, P: int, scopes: tuple[Scope, ...]) -> TIMES:
    """What timing would find on such hardware."""
    asked = (10**3, 10**6, 10**8)
    return {
        scope: {kind: [Sample(n, seconds_in(scope, topology, kind, n, 1, ranks=P)) for n in asked] for kind in KINDS} for scope in scopes
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
                expected = seconds_in(scope, hardware, kind, num_bytes, 1, ranks=P)
                assert seconds_in(scope, found, kind, num_bytes, 1, ranks=P) == pytest.approx(expected, rel=2e-3)
    if hardware.nodes == 1:
        assert found.between is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("later", [1.5, 3.0])
def test_messages_that_begin_later_among_all_ranks_than_across_have_one_rate(kind: MessageKind, later: float) -> None:
    """gloo begins an exchange with each other rank, so one with more of them has a longer latency, and bytes as fast."""
    hardware = load_topology("2x4xL20-1nic")
    assert hardware.between is not None
    times = times_of(hardware, 8, ("inside", "across", "flat"))
    start_s = 2e-3
    for scope, factor in (("across", 1.0), ("flat", later)):
        times[scope][kind] = [Sample(each.units, each.seconds + factor * start_s) for each in times[scope][kind]]
    found = _with_links(hardware, 8, Request(4), times)
    assert found.between is not None
    assert found.between.rate(kind).bytes_per_s == pytest.approx(hardware.between.rate(kind).bytes_per_s, rel=0.1)
    assert start_s <= found.between.rate(kind).latency_s <= later * start_s * 1.1


# Clocks of kernels ---------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def test_the_cost_of_a_call_is_of_many_in_a_row() -> None:
    calls = []
    assert 0 < seconds_of(lambda: calls.append(0), Clock(CPU), 3) < 1e-4
    assert len(calls) > 1000


def test_a_kernel_that_waits_for_a_core_is_not_slower_but_one_that_shares_it_is() -> None:
    def burn() -> None:
        end = time.thread_time() + 2e-3
        while time.thread_time() < end:
            pass

    def interrupted() -> None:
        burn()
        time.sleep(2e-2)

    alone, waiting, shared = (seconds_of(call, clock, 3) for call, clock in (
        (burn, Clock(CPU)), (interrupted, Clock(CPU)), (burn, Clock(CPU, turns=2.0))
    ))  # fmt: skip
    assert alone == pytest.approx(2e-3, rel=0.2)
    assert waiting == pytest.approx(alone, rel=0.3), "what others do meanwhile is not in it"
    assert shared == pytest.approx(2 * alone, rel=0.2), "what other ranks do is"


def test_a_launch_on_cpus_is_a_block_as_the_runtime_calls_it_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cost, which the clock of the calls stands for here, is the mean of forward and backward."""
    merged, clocks = monkeypatch_counting(monkeypatch), iter([0.0, 1e-4] * 3 + [0.0, 3e-4] * 3)
    larger: list[int] = []
    real = time_kernels._attention

    def attention(n: int, *args: Any) -> tuple[Callable[[], object], Callable[[], object]]:
        there, back = real(n, *args)
        return there, lambda: (larger.append(n), back())

    monkeypatch.setattr(time_kernels, "_attention", attention)
    monkeypatch.setattr(Clock, "now", lambda self: next(clocks))
    assert time_launch(torch.float32, Clock(CPU), SMALL[1]) == pytest.approx(2e-4)
    assert larger == [32] * 6, "the caches are another block's before each"
    assert merged == ["merge"] * 4 + ["accumulate"] * 3, "once to have an answer to differentiate, then what is timed"


def monkeypatch_counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the merging functions of the runtime, as they are called."""
    called: list[str] = []
    for name in ("merge", "accumulate"):
        real = getattr(blockwise, name)
        monkeypatch.setattr(blockwise, name, lambda *args, name=name, real=real: (called.append(name), real(*args))[1])
    return called


def test_a_clock_that_ticks_seldom_tells_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 0.0] * 7 + [0.0, 8e-3])
    monkeypatch.setattr(Clock, "now", lambda self: next(ticks))
    assert time_kernels._seconds_after(float, float, Clock(CPU), 8) == pytest.approx(1e-3)


TWO = frozenset({0, 1})


@pytest.mark.parametrize(
    ("of_ranks", "expected"),
    [
        pytest.param([Threads("a", TWO, 1)], [1.0], id="one rank"),
        pytest.param([Threads("a", TWO, 1)] * 2, [1.0] * 2, id="a core each"),
        pytest.param([Threads("a", TWO, 1)] * 4, [2.0] * 4, id="two ranks a core"),
        pytest.param([Threads("a", TWO, 2)] * 2, [2.0] * 2, id="threads count"),
        pytest.param([Threads("a", TWO, 1)] * 2 + [Threads("b", TWO, 1)] * 2, [1.0] * 4, id="two machines"),
        pytest.param([Threads("a", frozenset({i}), 1) for i in range(4)], [1.0] * 4, id="each has its own core"),
        pytest.param([Threads("a", TWO, 1)] * 3 + [Threads("b", TWO, 1)], [1.5] * 3 + [1.0], id="unequally many"),
    ],
)
def test_ranks_take_turns_on_cores(of_ranks: list[Threads], expected: list[float]) -> None:
    assert [turns(of_ranks, mine) for mine in range(len(of_ranks))] == expected
    assert [turns(of_ranks[::-1], mine) for mine in range(len(of_ranks))] == expected[::-1], "the order of ranks does not matter"


def test_a_process_by_itself_shares_its_cores_with_its_own_threads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_cores.os, "sched_getaffinity", lambda _: {0, 1})
    for threads, expected in ((1, 1.0), (2, 1.0), (6, 3.0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert turns_here() == expected


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        pytest.param(4, None, id="a core beside each rank's for the thread that sends"),
        pytest.param(3, Host(1e-4, 1e9, 1.0, 1), id="not for every rank"),
        pytest.param(1, Host(2e-4, 5e8, 2.0, 1), id="ranks that take turns"),
    ],
)
def test_messages_take_of_the_cores_where_none_is_left_for_them(cores: int, expected: Host | None, monkeypatch: pytest.MonkeyPatch) -> None:
    of_ranks = [Threads("a", frozenset(range(cores)), 1)] * 2

    def here(*, besides: int = 0) -> float:
        return turns([replace(each, number=1 + besides) for each in of_ranks], 0)

    monkeypatch.setattr(measuring, "turns_here", here)
    found = measuring._host([line(1e-4, 1e9), line(1e-4, 1e9)], CPU)
    assert found == expected
    assert measuring._host([], CPU) is None, "one rank sends nothing"
    assert measuring._host([line(1e-4, 1e9)], torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(None, 1.0, id="no control group"),
        pytest.param("max 100000\n", 1.0, id="no quota"),
        pytest.param("200000 100000\n", 2.0, id="two of four cores"),
        pytest.param("50000 100000\n", 4.0, id="half of one"),
    ],
)
def test_a_container_has_the_cores_of_its_quota(text: str | None, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_cores.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(shared_cores, "_CPU_MAX", tmp_path / "cpu.max")
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert turns_here() == expected


# Real ranks ----------------------------------------------------------------------------------------------------------

SMALL = Effort((256, 4096), 3), KernelEffort((16, 32), 2, 16, (16, 32), (64, 256), 3)


def turns_of(rank: int, world_size: int) -> tuple[float, int, int, int]:
    return turns_here(), ranks_here(), len(os.sched_getaffinity(0)), torch.get_num_threads()


def test_ranks_on_one_machine_find_each_other() -> None:
    for found, here, cores, threads in run_ranks(turns_of, 4):
        assert (found, here) == (max(1.0, 4 * threads / cores), 4)


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
    spare = 2 * ranks * torch.get_num_threads() <= len(os.sched_getaffinity(0))
    assert spare or (found.host is None) == (ranks == 1)
    assert found.name == f"measured: {ranks} x CPU"
    assert all("measured" in source or ":" in source for source in found.sources)
    fields = set(re.findall(r'"(\w+)":', texts[0]))
    named = {name for source in found.sources for name in re.findall(r"\b[a-z]+_[a-z_]+\b", source)}
    assert named <= fields, "what sources name is a field of the file"
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


def host_on_machines_of_their_own(rank: int, world_size: int) -> Host | None:
    """The first has a core left for messages, the second has not."""
    with pytest.MonkeyPatch.context() as patch:
        cores = (8, 1)[rank]
        patch.setattr(shared_cores, "_threads", lambda besides: Threads(f"machine {rank}", frozenset(range(cores)), 1 + besides))
        return measuring._host([line(1e-4, 1e9)], CPU)


def test_machines_with_other_cores_take_part_in_the_same_messages() -> None:
    first, second = run_ranks(host_on_machines_of_their_own, 2, timeout_s=20)
    assert first is None and second is not None


def test_a_launcher_that_says_too_little_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"the ranks cannot meet: .*MASTER_ADDR.*; without RANK, autoseq starts ranks of its own"):
        measuring.measure_launched(Request(2))


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
    monkeypatch.setattr(time_links, "_message", lambda kind, group, num_bytes, device: (lambda: float, num_bytes))
    steps: list[int] = []
    effort = Effort((256, 4096, 8192), 3)
    times = time_links.time_messages("send", None, CPU, effort, lambda: steps.append(1))  # type: ignore[arg-type]
    assert [sample.units for sample in times.seconds] == [sample.units for sample in times.host] == [256, 4096], "two at least"
    assert len(steps) == len(effort.message_bytes), "and the bar goes on"

