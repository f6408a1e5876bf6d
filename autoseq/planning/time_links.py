"""Times real messages of each kind on the running group: what `measure` fits the rates of links to.

The sizes are of what one rank sends, counted as in `runtime.traffic`, so that a rate means the same here and in a prediction. All ranks
send at once, in both directions, so a link that cannot do both at a time shows as a slower one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch
import torch.distributed as dist

from autoseq.planning.fitting import Sample
from autoseq.runtime.groups import SequenceGroup, group_of
from autoseq.runtime.messages import Described, Message, connect, post
from autoseq.runtime.posted import Posted, post_all_gather, post_all_to_all, post_reduce_scatter
from autoseq.runtime.timeline import MessageKind

_ops = torch.ops._c10d_functional
_ENOUGH_S = 0.3  # so long one size of one kind is repeated
# A message that takes so long is the last size, but not the only one: a line needs two. Shorter ones would not do: a network may let the
# first bytes through faster, and collectives of many bytes reach less of a link.
_TOO_LONG_S = 0.15
_FIRST = 2  # so many tell how long it takes
_LEAST_REPEATS = 3
# Strategies post what comes next before what goes on is done, and two large messages take longer than twice one where a library announces
# what it wants to receive behind what it sends. Of small ones the latency counts, of each by itself.
_LARGE_BYTES = 1 << 18
_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is timed: what one rank sends in a message, ascending, and how often at most."""

    message_bytes: tuple[int, ...]
    repeats: int


@dataclass(frozen=True, slots=True)
class MessageTimes:
    """Of each size: seconds until it is there on the slowest rank, and what this rank's cores did for it, on CPUs."""

    seconds: list[Sample]
    host: list[Sample]


def time_messages(
    kind: MessageKind, group: SequenceGroup, device: torch.device, effort: Effort, advance: Callable[[], None]
) -> MessageTimes:  # fmt: skip
    """Typical times of one message of each size, the seconds equal on all ranks of the program; all call this at once.

    Typical is the median: all-to-alls of gloo differ by half from one to the next, and a step has many. `group` may be one of several that
    are timed side by side. Raises MessageError when a rank is lost.
    """
    with Described(f"timing {kind}", group):
        sends: list[_Repeated] = []
        for num_bytes in effort.message_bytes:
            at_once = _AT_ONCE if num_bytes >= _LARGE_BYTES else 1
            start, sent = _message(kind, group, num_bytes, device)
            send = partial(_send, start, at_once)
            first = min(slowest([_timed(send, device)[0] for _ in range(_FIRST)], device))
            sends.append(_Repeated(send, sent, at_once, max(_LEAST_REPEATS, min(effort.repeats, int(_ENOUGH_S / first)))))
            if first > _TOO_LONG_S and len(sends) > 1:
                break
        # In turn, so that what else happens on the machine for a while slows every size.
        for turn in range(max(each.repeats for each in sends)):
            for each in sends:
                if turn < each.repeats:
                    # Or a small message waits for a large one before it; and gloo's thread spins for milliseconds between sends in a row.
                    dist.barrier()
                    seconds, host_s = _timed(each.send, device)
                    each.seconds.append(seconds / each.at_once)
                    each.host_s.append(host_s / each.at_once)
        samples = [Sample(each.sent, median(slowest(each.seconds, device))) for each in sends]
        host = [Sample(each.sent, median(each.host_s)) for each in sends if device.type == "cpu"]
    for _ in effort.message_bytes:
        advance()
    return MessageTimes(samples, host)


@dataclass(frozen=True, slots=True)
class _Repeated:
    """Messages, the bytes of one, how many go at once, how often, and what one took, by the clock and of the process's cores."""

    send: Callable[[], object]
    sent: int
    at_once: int
    repeats: int
    seconds: list[float] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)


def slowest(seconds: list[float], device: torch.device) -> list[float]:
    """Of each message what the slowest rank of the program took: nobody is done before the last."""
    found = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def _send(start: Callable[[], Callable[[], object]], at_once: int) -> None:
    for arrived in [start() for _ in range(at_once)]:
        arrived()


def _timed(send: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds by the clock, and those that all threads of the process had a core."""
    _finish(device)
    start, had = time.perf_counter(), time.process_time()
    send()
    _finish(device)
    return time.perf_counter() - start, time.process_time() - had


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _message(
    kind: MessageKind, group: SequenceGroup, num_bytes: int, device: torch.device
) -> tuple[Callable[[], Callable[[], object]], int]:  # fmt: skip
    """What posts a message of about so many bytes from each rank, as strategies do, and gives what waits for it; and how many they are."""
    P = group.size
    if kind == "send":
        leaving, arriving = (torch.zeros(max(1, num_bytes // 4), device=device) for _ in range(2))
        connect(group, [leaving])
        message = Message((group.rank + 1) % P, leaving, (group.rank - 1) % P, arriving)
        return lambda: post("timing send", group, "a ring", [message]).wait, 4 * leaving.numel()
    times = 2 if kind == "all_reduce" else 1
    shard = max(1, num_bytes // (4 * (P - 1) * times))
    part, whole = torch.zeros(shard, device=device), torch.zeros(shard * P, device=device)
    posts: dict[MessageKind, Callable[[], Posted]] = {
        "all_to_all": lambda: post_all_to_all(group, whole, [shard] * P, [shard] * P),
        "all_gather": lambda: post_all_gather(group, part),
        "reduce_scatter": lambda: post_reduce_scatter(group, whole),
        "all_reduce": lambda: Posted("all-reduce", group, _ops.all_reduce(whole, "sum", group.name)),
    }
    return lambda: posts[kind]().arrived, 4 * shard * (P - 1) * times


def groups_of(group: SequenceGroup) -> tuple[SequenceGroup, SequenceGroup]:
    """This rank's groups across nodes and inside its node."""
    across, inside = group.axes
    return group_of(across), group_of(inside)
