"""The topology that a plan is made for when nobody gave one: what torch, NVML and the system tell of this machine.

Nothing is timed, so every rank of equal machines finds the same. Known devices have the rates of their preset; others have estimates from
what torch says of them. `autoseq topology measure` is better than either.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from autoseq.planning.links import Card, network_cards, nvlinks
from autoseq.planning.presets import load_topology, names
from autoseq.planning.topology import KINDS, Host, KernelRates, Link, Rate, Topology

_GIB = 1 << 30
# The share of a card's rate that messages reach, as in the presets.
_CARD_SHARE, _CARD_SHARE_ALL_TO_ALL = 0.92, 0.8
# Floating-point operations a clock and multiprocessor by compute capability: in half precision (tensor cores, dense), in float32.
# From the tables of NVIDIA's architecture papers; a later one than these counts as the last.
_OPERATIONS = {(7, 0): (1024, 128), (8, 0): (2048, 128), (8, 6): (1024, 256), (9, 0): (4096, 256), (10, 0): (8192, 256)}
_ON_PCI_EXPRESS = ("4xA10", "4xL20")


def found_topology(world_size: int, ranks: Sequence[int] | None = None) -> Topology:
    """The hardware under `world_size` ranks, as far as it can be told without trying it; it serves any number of them.

    `ranks` are theirs among all ranks of the program, where they are not its first ones.
    """
    members = range(world_size) if ranks is None else ranks
    local = _local_ranks() or max(members) + 1
    sharing = min(local, max(members) + 1)  # ranks that may be on the first node, of this group or not
    base = _cuda(sharing) if _on_cuda() else _cpu(sharing)
    # Other ranks of a node use their share of its cards.
    return base.cut_into(_ranks_per_node(members, local)).at(world_size)


def _on_cuda() -> bool:
    if not torch.cuda.is_available():
        return False
    return not (dist.is_available() and dist.is_initialized()) or dist.get_backend() != "gloo"


def _local_ranks() -> int:
    """How many ranks a node has, as a launcher says, else a rank for each device; 0 where nobody says. Nodes are equally large."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(told) if told.isdecimal() and int(told) > 0 else torch.cuda.device_count() if _on_cuda() else 0


def _ranks_per_node(members: Sequence[int], local: int) -> int:
    """How many of these ranks lie in one block of `local`; where blocks have unequally many, the most that cuts all of them."""
    return math.gcd(*Counter(rank // local for rank in members).values())


# GPUs ----------------------------------------------------------------------------------------------------------------


def _cuda(per_node: int) -> Topology:
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    base = _known(device) or _unknown(device)
    between = _with_cards(base.between, [card for card in network_cards() if card.kind == "infiniband"])
    return replace(base, name=f"found: {device.name}", between=between, ranks_per_node=per_node, memory_bytes=device.total_memory)


def _known(device: Any) -> Topology | None:
    """The preset of the device's name: its links too, unless the device sits on PCI Express."""
    for name in names():
        model = name.partition("x")[2]
        if re.search(rf"\b{model}\b", device.name):
            preset = load_topology(name)
            source = f"all but the size of memory and the count of cards: as {name}, for a device called {device.name}"
            if name in _ON_PCI_EXPRESS or _has_nvlink(device.name):
                return replace(preset, sources=(source, *preset.sources))
            on_pci = load_topology(_ON_PCI_EXPRESS[-1])
            return replace(preset, inside=on_pci.inside, sources=(source, f"inside: PCI Express, as {on_pci.name}", *preset.sources))
    return None


def _has_nvlink(name: str) -> bool:
    """As NVML counts; where it is not there, as the name says."""
    links = nvlinks()
    return links.count > 0 if not links.why_not else re.search("pcie", name, re.IGNORECASE) is None


def _unknown(device: Any) -> Topology:
    capability = (device.major, device.minor)
    halves, singles = _OPERATIONS[max((each for each in _OPERATIONS if each <= capability), default=(7, 0))]
    clock_hz = getattr(device, "clock_rate", 1_500_000) * 1e3
    width, memory_hz = getattr(device, "memory_bus_width", 0), getattr(device, "memory_clock_rate", 0) * 1e3
    peak = {"bfloat16": halves * device.multi_processor_count * clock_hz, "float32": singles * device.multi_processor_count * clock_hz}
    # bfloat16 of a device before 8.0 is computed in float32.
    peak["float16"] = peak["bfloat16"]
    if capability < (8, 0):
        peak["bfloat16"] = peak["float32"]
    inside = load_topology("8xA800" if nvlinks().count > 0 else _ON_PCI_EXPRESS[-1])
    return Topology(
        "found", 1, 1, inside.inside, inside.between, {dtype: _estimated(rate) for dtype, rate in peak.items()},
        device.total_memory, 2 * memory_hz * width / 8 or 5e11, 5e-6,
        (f"kernels: estimates from {device.multi_processor_count} multiprocessors of compute capability {device.major}.{device.minor}",
         f"inside, between: as {inside.name}"), inside.attention_tile,
    )  # fmt: skip


def _estimated(peak: float) -> KernelRates:
    return KernelRates(peak, 0.7 * peak, 0.5 * peak, 0.4 * peak)


def _with_cards(between: Link | None, cards: list[Card]) -> Link | None:
    """The link between nodes through these cards, the slowest of which sets the pace."""
    if between is None or not cards:
        return between
    rate = min(card.bytes_per_s for card in cards)
    shares = dict.fromkeys(KINDS, _CARD_SHARE) | {"all_to_all": _CARD_SHARE_ALL_TO_ALL}
    faster = {kind: replace(between.rate(kind), bytes_per_s=share * rate) for kind, share in shares.items()}
    return replace(between, **faster, lanes=len(cards))


# CPUs ----------------------------------------------------------------------------------------------------------------


def _cpu(per_node: int) -> Topology:
    """A few cores a rank, and gloo: the same numbers whatever the CPU, so that ranks on different machines agree."""
    inside = Link(Rate(60e-6, 2e9), Rate(150e-6, 1e9), Rate(150e-6, 1e9), Rate(200e-6, 7e8), Rate(200e-6, 7e8))
    between = Link(Rate(120e-6, 1e9), Rate(300e-6, 8e8), Rate(300e-6, 9e8), Rate(400e-6, 7e8), Rate(400e-6, 7e8))
    kernels = {"float32": KernelRates(2e11, 1e11, 5e10, 4e10), "bfloat16": KernelRates(2e11, 4e10, 2e10, 1.5e10)}
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Whole GiB: equal machines differ by what their firmware keeps.
    memory = max(1, pages // per_node // _GIB) * _GIB
    return Topology(
        "found: CPU", per_node, 1, inside, between, kernels, memory, 1e10, 1e-5,
        ("all but the size of memory: estimates for any CPU, gloo and 10 Gb/s between machines; `autoseq topology measure` knows better",
         "attention_tile: the keys that ATen's flash attention takes at once (kv_split_size in FlashAttentionKernel.cpp)"), 512,
        Host(300e-6, 1e9),
    )  # fmt: skip
