"""How much longer kernels take on CPUs because ranks share cores, from who computes where rather than from a clock.

A clock on the wall also counts whatever else the machine does; the time that a thread had a core does not. That time, while every rank
computes, is what all of them take as soon as each has a core; where there are fewer cores than threads, they take turns.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class Threads:
    """What a rank computes with: its machine, the cores it may use, and how many threads."""

    machine: str
    cores: frozenset[int]
    number: int


def turns(of_ranks: Sequence[Threads], mine: int) -> float:
    """How many threads take turns on a core of rank `mine`'s machine while all ranks compute; 1 where there are cores enough."""
    here = [each for each in of_ranks if each.machine == of_ranks[mine].machine]
    return max(1.0, sum(each.number for each in here) / len(frozenset().union(*(each.cores for each in here))))


def turns_here(*, besides: int = 0) -> float:
    """The same for this rank among all of the program, which call this together; with so many threads `besides` those that compute."""
    return turns(*_of_ranks(_threads(besides)))


def ranks_here() -> int:
    """How many ranks of the program are on this rank's machine; all call this together."""
    of_ranks, mine = _of_ranks(_threads(0))
    return sum(each.machine == of_ranks[mine].machine for each in of_ranks)


def _of_ranks(mine: Threads) -> tuple[list[Threads], int]:
    """Those of all ranks, and which of them is this one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine], 0
    of_ranks = [mine] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    return of_ranks, dist.get_rank()


def _quota() -> int | None:
    """How many cores' time a container has, where it has less than that of the cores it may use; a part of one counts as one."""
    most, _, period = (_CPU_MAX.read_text() if _CPU_MAX.exists() else "max").partition(" ")
    return None if most.strip() == "max" else max(1, int(most) // int(period))


def _threads(besides: int) -> Threads:
    # Nodes that a network emulates, and containers, have other names on the same cores; the kernel under them was started once.
    machine = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else platform.node()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Threads(machine, frozenset(sorted(cores)[: _quota()]), torch.get_num_threads() + besides)
