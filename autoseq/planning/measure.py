"""The topology of the running group, by timing its links and kernels: `autoseq topology measure`.

Links: messages of each kind and several sizes, inside nodes, across them and over all ranks; the rates are those with which
`Topology.seconds` comes nearest to the times. Kernels: products and attention of several sizes on all ranks at once, since ranks may share
what they compute on. Of messages it is the slowest rank's time, of kernels the middle one's, and of both the median.
Rank 0's result is everyone's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from autoseq.launch import LaunchError, Rank, device_kind, run_ranks
from autoseq.planning.fitting import Line, Sample, fit_line, four_digits
from autoseq.planning.found import found_topology
from autoseq.planning.shared_cores import ranks_here, turns_here
from autoseq.planning.time_kernels import Clock, KernelEffort, KernelTimes, time_kernels, time_launch, time_memory
from autoseq.planning.time_links import Effort, groups_of, time_messages
from autoseq.planning.topology import DTYPES, KINDS, Host, KernelRates, Link, Rate, Topology
from autoseq.planning.topology_file import dump, parse_topology
from autoseq.runtime.errors import OptionError, did_you_mean
from autoseq.runtime.groups import SequenceGroup, group_from_mesh
from autoseq.runtime.nodes import on_nodes
from autoseq.runtime.timeline import MessageKind, Scope

_CPU = (
    Effort((1 << 12, 1 << 16, 1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22), 50),
    KernelEffort((128, 256, 512, 1024), 4, 64, (128, 256, 512, 1024), (1 << 20, 1 << 23), 15),
)
_CUDA = (
    Effort((1 << 12, 1 << 16, 1 << 20, 1 << 23, 1 << 25, 1 << 27), 30),
    KernelEffort((1024, 2048, 4096, 8192), 16, 128, (2048, 4096, 8192), (1 << 24, 1 << 26), 30),
)
# A ring or exchange over all ranks tells of the link between nodes only where that is what it waits for.
_CROSSING_DECIDES = 0.7


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure. Without `dtypes`, bfloat16 and float32 on CUDA and float32 on CPUs; without `efforts`, enough for the device."""

    ranks_per_node: int
    lanes: int = 1
    dtypes: tuple[str, ...] = ()
    efforts: tuple[Effort, KernelEffort] | None = None


def measure(request: Request, device: torch.device) -> Topology:
    """Time this program's links and kernels; every rank calls it, and all get the same."""
    group = group_from_mesh(None)
    scopes = _scopes(on_nodes(group, request.ranks_per_node))
    links, kernels = request.efforts or (_CUDA if device.type == "cuda" else _CPU)
    dtypes = request.dtypes or (("bfloat16", "float32") if device.type == "cuda" else ("float32",))
    steps = len(KINDS) * len(links.message_bytes) * len(scopes) + kernels.steps * len(dtypes)
    with _progress(steps, shown=group.rank == 0) as advance:
        base = _with_kernels(replace(found_topology(group.size), name=_name(group, device)), dtypes, device, kernels, advance)
        times = {scope: {kind: time_messages(kind, each, device, links, advance) for kind in KINDS} for scope, each in scopes.items()}
    seconds = {scope: {kind: each.seconds for kind, each in of_scope.items()} for scope, of_scope in times.items()}
    linked = _with_links(base, group.size, request, seconds)
    host = _host([each.host for of_scope in times.values() for each in of_scope.values()], device)
    return _rank_0s(replace(linked, host=host, sources=_sources(group, request)), device)


def _scopes(group: SequenceGroup) -> dict[Scope, SequenceGroup]:
    """The groups to time, by who talks to whom."""
    if group.size == 1:
        return {}
    if not group.axes:
        return {"flat": group}
    across, inside = groups_of(group)
    return {"inside": inside, "across": across, "flat": group}


# Links ---------------------------------------------------------------------------------------------------------------

_Times = dict[MessageKind, list[Sample]]


def _with_links(base: Topology, P: int, request: Request, times: dict[Scope, _Times]) -> Topology:
    """The topology whose rates come nearest to the times."""
    if not times:
        return base
    R = request.ranks_per_node
    if R >= P:
        return replace(base, ranks_per_node=P, nodes=1, inside=_link({kind: fit_line(times["flat"][kind]) for kind in KINDS}), between=None)
    # With nodes of one rank nothing is inside; what stands there is never asked.
    inside = _link({kind: fit_line(times["inside" if R > 1 else "flat"][kind]) for kind in KINDS})
    unit = Link(*[Rate(1.0, 1.0)] * len(KINDS), lanes=request.lanes)
    shaped = replace(base, ranks_per_node=R, nodes=P // R, inside=inside, between=unit)
    between = _link({kind: fit_line(_crossing(shaped, P, kind, times)) for kind in KINDS})
    return replace(shaped, between=replace(between, lanes=request.lanes))


def _crossing(unit: Topology, P: int, kind: MessageKind, times: dict[Scope, _Times]) -> list[Sample]:
    """The times that the link between nodes decides, with bytes as they load one card; `unit` has a rate of 1 there."""
    samples = []
    for scope in ("across", "flat"):
        *inside, between = unit.paths(kind, ranks=P, scope=scope)
        samples += [
            Sample(sample.units * between.s_per_byte, sample.seconds)
            for sample in times.get(scope, {}).get(kind, ())
            if scope == "across" or all(path.seconds(sample.units, 1) < _CROSSING_DECIDES * sample.seconds for path in inside)
        ]
    return samples


def _link(lines: dict[MessageKind, Line]) -> Link:
    return Link(**{kind: _rate(line) for kind, line in lines.items()})


def _rate(line: Line) -> Rate:
    return Rate(line.latency_s, line.units_per_s)


def _host(times: Sequence[list[Sample]], device: torch.device) -> Host | None:
    """What messages take of the cores that compute: on CPUs where no core is left for the thread that sends."""
    if device.type != "cpu" or not times:
        return None
    # All ranks take part in all of it, whatever is left on their own machines: in the end rank 0's counts.
    turns, with_senders, sharing = turns_here(), turns_here(besides=1), ranks_here()
    line = fit_line([Sample(each.units, turns * each.seconds) for each in _middle([each for of_kind in times for each in of_kind])])
    return Host(line.latency_s, line.units_per_s, four_digits(turns), sharing) if with_senders > 1 else None


# Kernels -------------------------------------------------------------------------------------------------------------


def _with_kernels(
    base: Topology, dtypes: Sequence[str], device: torch.device, effort: KernelEffort, advance: Callable[[], None]
) -> Topology:
    clock = Clock(device, turns_here())
    launch = _middle([Sample(1, time_launch(getattr(torch, dtypes[0]), clock, effort))])[0].seconds
    memory = fit_line(_middle(time_memory(clock, effort))).units_per_s
    known = base.kernels if device.type == "cuda" else {}
    rates = {dtype: _rates(known.get(dtype), time_kernels(getattr(torch, dtype), clock, effort, advance)) for dtype in dtypes}
    return replace(base, kernels=rates, memory_bytes_per_s=memory, launch_s=four_digits(launch))


def _rates(known: KernelRates | None, times: KernelTimes) -> KernelRates:
    """The peak is that of the known device; of a CPU, the most that was reached."""
    samples = [_middle(each) for each in (times.matmul, times.attention, times.attention_backward)]
    reached = [fit_line(each).units_per_s for each in samples]
    best = max(four_digits(sample.units / sample.seconds) for each in samples for sample in each)
    return KernelRates(max(best, *reached, *([known.peak_flops_per_s] if known else [])), *reached)


def _middle(samples: Sequence[Sample]) -> list[Sample]:
    """The median of all ranks, the same on each."""
    mine = [sample.seconds for sample in samples]
    theirs: list[list[float]] = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        theirs = [mine for _ in range(dist.get_world_size())]
        dist.all_gather_object(theirs, mine)
    return [Sample(sample.units, median(times)) for sample, times in zip(samples, zip(*theirs, strict=True), strict=True)]


# What is said of it --------------------------------------------------------------------------------------------------


def _name(group: SequenceGroup, device: torch.device) -> str:
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"measured: {group.size} x {what}"


def _sources(group: SequenceGroup, request: Request) -> tuple[str, ...]:
    version, torch_version = metadata.version("autoseq"), torch.__version__
    kernels = "kernels, rate of memory, launches: fitted while all ranks compute; the peak is the device's if known, else the best"
    if group.size == 1:
        return f"measured by autoseq {version} with torch {torch_version}", "inside, between: as found, there is one rank", kernels
    nodes = f"{group.size} ranks in nodes of {request.ranks_per_node}, {dist.get_backend()}"
    links = "inside, between, host: fitted to medians"
    return f"measured by autoseq {version} with torch {torch_version}, {nodes}", links, kernels


def _rank_0s(topology: Topology, device: torch.device) -> Topology:
    """The same on every rank, whatever their rounding."""
    if not dist.is_initialized():
        return topology
    texts = [dump(topology)]
    dist.broadcast_object_list(texts, src=0, device=device if device.type == "cuda" else None)
    return parse_topology(texts[0], "what rank 0 measured")


@contextmanager
def _progress(steps: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr, of one rank; all ranks meet where it advances."""
    columns = TextColumn("timing links and kernels"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task("", total=steps)

        def advance() -> None:
            if dist.is_initialized():
                dist.barrier()
            progress.advance(task)

        yield advance
        progress.update(task, completed=steps)


# Who runs it ---------------------------------------------------------------------------------------------------------


def world_of_launcher() -> int:
    """How many ranks a launcher such as torchrun says there are; 0 if this process is no rank."""
    told = os.environ.get("WORLD_SIZE", "")
    return int(told) if "RANK" in os.environ and told.isdecimal() else 0


def measure_here(request: Request, world_size: int) -> Topology:
    """Start ranks on this machine and measure them. Raises what they raise."""
    _check(request, world_size)
    return run_ranks(_as_rank, world_size, request)[0]


def measure_launched(request: Request) -> Topology:
    """Measure the ranks that a launcher started, of which this is one."""
    _check(request, world_of_launcher())
    local_rank, local_ranks = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    on_cuda = device_kind(max(1, local_ranks)) == "cuda"
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        told = "RANK and WORLD_SIZE say that a launcher started this rank, and torchrun sets MASTER_ADDR and MASTER_PORT beside them"
        raise LaunchError(f"the ranks cannot meet: {error}. {told}; without RANK, autoseq starts ranks of its own") from error
    try:
        return measure(request, device)
    finally:
        dist.destroy_process_group()


def _check(request: Request, world_size: int) -> None:
    """Before anything starts."""
    if unknown := [name for name in request.dtypes if name not in DTYPES]:
        raise OptionError(f"there is no dtype {unknown[0]!r}{did_you_mean(unknown[0], DTYPES)}; kernels are timed in {', '.join(DTYPES)}")
    if world_size % request.ranks_per_node:
        raise OptionError(f"{world_size} ranks are not whole nodes of {request.ranks_per_node}; --ranks-per-node must divide them")


def _as_rank(rank: Rank, request: Request) -> Topology:
    return measure(request, rank.device)
