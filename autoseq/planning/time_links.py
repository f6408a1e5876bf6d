"""Times real messages of each kind on the running group: what `measure` fits the rates of links to.

The sizes are of what one rank sends, counted as in `runtime.traffic`, so that a rate means the same here and in a prediction. All ranks
send at once, in both directions, so a link that cannot do both at a time shows as a slower one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from autoseq.planning.fitting import Sample
from autoseq.planning.topology import Kind
from autoseq.runtime.groups import SequenceGroup, group_of, process_group
from autoseq.runtime.messages import Described, Message, connect, post

_ENOUGH_S = 0.4  # so long one size of one kind is repeated
_TOO_LONG_S = 2.0  # a message that takes so long is the last size
_LEAST_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is timed: what one rank sends in a message, ascending, and how often at most."""

    message_bytes: tuple[int, ...]
    repeats: int


def time_messages(kind: Kind, group: SequenceGroup, device: torch.device, effort: Effort, advance: Callable[[], None]) -> list[Sample]:
    """Times of one message of each size, the slowest rank's, equal on all ranks of the program; all of them call this at once.

    `group` may be one of several that are timed side by side. Raises MessageError when a rank is lost.
    """
    samples = []
    with Described(f"timing {kind}", group):
        for num_bytes in effort.message_bytes:
            send, sent = _message(kind, group, num_bytes, device)
            first = slowest(_timed(send, device, 2), device)
            repeats = min(effort.repeats, max(_LEAST_REPEATS, int(_ENOUGH_S / first)))
            samples.append(Sample(sent, slowest(_timed(send, device, repeats), device)))
            advance()
            if first > _TOO_LONG_S:
                break
    return samples


def slowest(seconds: float, device: torch.device) -> float:
    """The largest of all ranks of the program: nobody is done before the last."""
    found = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _timed(send: Callable[[], None], device: torch.device, repeats: int) -> float:
    """The median over some messages."""
    seconds = []
    for _ in range(repeats):
        _finish(device)
        start = time.perf_counter()
        send()
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _message(kind: Kind, group: SequenceGroup, num_bytes: int, device: torch.device) -> tuple[Callable[[], None], int]:
    """What sends about so many bytes from each rank, and how many they are."""
    P = group.size
    if kind == "send":
        leaving, arriving = _buffers((num_bytes // 4 or 1,) * 2, device)
        connect(group, [leaving])
        message = Message((group.rank + 1) % P, leaving, (group.rank - 1) % P, arriving)
        return lambda: post("timing send", group, "a ring", [message]).wait(), 4 * leaving.numel()
    shard = max(1, num_bytes // (4 * (P - 1)) if kind != "all_reduce" else num_bytes // (8 * (P - 1)))
    process = process_group(group.name)
    part, whole, other = _buffers((shard, shard * P, shard * P), device)
    calls: dict[Kind, Callable[[], object]] = {
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=process),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=process),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=process),
        "all_reduce": lambda: dist.all_reduce(whole, group=process),
    }
    return lambda: _discard(calls[kind]()), 4 * shard * (P - 1) * (2 if kind == "all_reduce" else 1)


def _discard(_: object) -> None:
    """A call that is made for its time."""


def _buffers(sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    return [torch.zeros(size, device=device) for size in sizes]


def groups_of(group: SequenceGroup) -> tuple[SequenceGroup, SequenceGroup]:
    """This rank's groups across nodes and inside its node."""
    across, inside = group.axes
    return group_of(across), group_of(inside)
