"""What `autoseq topology` prints: tables of links and kernels, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from rich.console import Console

from autoseq.planning.topology import KINDS, KernelRates, Link, Rate, Topology
from autoseq.readable import readable_bytes, readable_seconds
from autoseq.tables import table


def print_topologies(console: Console, topologies: Sequence[Topology]) -> None:
    """One line each."""
    columns = ("name", ":ranks", ":memory", ":bfloat16 peak", "all-to-all inside", "between nodes, all-to-all")
    console.print(table("Topologies", columns, [_line(each) for each in topologies]))
    console.print("2x8xH100 is two nodes; 2x8xH100-4nic is two nodes of four network cards each, 1 to 8; 4xH100 is a part of a node.")
    console.print("GB are 10^9 bytes: a card that is sold with 80 GB has 80 GiB of 2^30, or 85.9 GB, and a little less for programs.")


def print_topology(console: Console, topology: Topology) -> None:
    """Everything, in tables."""
    nodes = "1 node" if topology.nodes == 1 else f"{topology.nodes} nodes"
    memory = f"{readable_bytes(topology.memory_bytes)} ({topology.memory_bytes / 2**30:.4g} GiB) each"
    console.print(f"{topology.name}: {nodes} of {topology.ranks_per_node} ranks, {memory}. GB are 10^9 bytes, GiB 2^30.")
    links = [("inside a node", topology.inside, ""), ("between nodes", topology.between, " a card")]
    for title, link, per in links:
        if link is not None:
            cards = f", {link.lanes} network card{'' if link.lanes == 1 else 's'} a node" if per else ""
            shape = f"{link.duplex} duplex{cards}"
            rows = [(kind, *_rate(link.rate(kind))) for kind in KINDS]
            console.print(table(f"Links {title} ({shape})", ("message", ":latency", f":each way{per}"), rows))
    rows = [(dtype, *_rates(rates)) for dtype, rates in topology.kernels.items()]
    console.print(table("Kernels", ("dtype", ":peak", ":products", ":attention", ":its backward"), rows))
    console.print(f"memory at {readable_bytes(topology.memory_bytes_per_s)}/s, {_time(topology.launch_s)} for each kernel call")
    console.print(f"attention past a causal diagonal is left out in pieces of {topology.attention_tile} keys")
    if topology.host is not None:
        latency, rate = _rate(topology.host)
        console.print(f"each message takes {latency} of the cores that compute, and its bytes as at {rate}")
        if topology.host.ranks_per_core > 1:
            sharing = f"{topology.host.ranks_per_core:g} of {topology.host.sharing_ranks} ranks share a core"
            console.print(f"{sharing}; kernels have the rates of when all compute")
    for source in topology.sources:
        console.print(f"- {source}")


def _line(topology: Topology) -> tuple[str, ...]:
    peak = topology.kernel_rates("bfloat16").peak_flops_per_s
    memory = readable_bytes(topology.memory_bytes)
    between = _link(topology.between) if topology.between else ""
    return topology.name, str(topology.world_size), memory, _flops(peak, peak), _link(topology.inside), between


def _link(link: Link) -> str:
    latency, rate = _rate(link.all_to_all)
    return f"{f'{link.lanes} x ' if link.lanes > 1 else ''}{rate}, {latency}"


def _rate(rate: Rate) -> tuple[str, str]:
    return _time(rate.latency_s), f"{readable_bytes(rate.bytes_per_s)}/s"


def _time(seconds: float) -> str:
    return readable_seconds(seconds)


def _rates(rates: KernelRates) -> list[str]:
    """In one unit, that of the largest."""
    values = [getattr(rates, each.name) for each in fields(rates)]
    return [_flops(value, max(values)) for value in values]


def _flops(rate: float, largest: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if largest >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"
