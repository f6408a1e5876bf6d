"""What a rank does in a benchmark: makes every contender, checks its numbers, counts what it sends and holds, and times it.

All are timed in turn, round after round (A B C, A B C, ...), so that whatever else the machine does hits all of them alike, and the
comparison is of times of the same round. The link of a node is one of them: the speed it has in this very run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from autoseq.runtime.counting import counters, reset_counters
from contenders import Contender, contenders
from rank_processes import Seat
from slow_network import DEVICE
from work import TOLERANCE, Work, relative_error, rows_of

LINK = "link"


@dataclass
class Record:
    """One contender on one rank."""

    name: str
    kind: str
    scale: float = 1.0
    layout: str | None = None
    why_not: str | None = None
    bytes: int = 0
    messages: int = 0
    peak_bytes: int = 0
    link_bytes: int | None = None  # through this rank's node's link in a step, in the busier direction
    error: float | None = None
    seconds: list[float] = field(default_factory=list)


def measure(seat: Seat, work: Work, names: tuple[str, ...], rounds: int, link_bytes: int, check: bool) -> list[dict[str, object]]:
    """Records of everything, the same names in the same order on every rank."""
    records: list[Record] = []
    timed: list[tuple[Record, Callable[[], object]]] = []
    if seat.on_network:
        timed.append((Record(LINK, LINK), _link(seat, link_bytes)))
    answer = work.answer() if check else None
    for made in contenders(work, seat, names):
        if isinstance(made, tuple):
            records.append(Record(made[0], "absent", why_not=made[1]))
            continue
        timed.append((Record(made.name, made.kind, made.scale, made.layout), made.step))
        check_numbers(timed[-1][0], made, answer, seat, work)
    for record, step in timed:
        count(record, step, seat)
    for _ in range(rounds):
        for record, step in timed:
            record.seconds.append(seconds(step))
    return [asdict(record) for record in records + [record for record, _ in timed]]


def seconds(step: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def count(record: Record, step: Callable[[], object], seat: Seat) -> None:
    """What a step sends and holds; it hardly changes from step to step, so once is enough."""
    dist.barrier()
    link = through_link() if seat.on_network else None
    reset_counters()
    record.peak_bytes = peak_bytes(step)
    sent = counters().values()
    record.messages, record.bytes = sum(messages for messages, _ in sent), sum(count for _, count in sent)
    dist.barrier()  # the node's other ranks are done with the link too
    if link is not None:
        record.link_bytes = max(now - before for now, before in zip(through_link(), link, strict=True))


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that a step holds in tensors above what was held before it, as the allocator reports it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    assert watched.profiler is not None and watched.profiler.kineto_results is not None
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue] (torch's stub has no such method)
        peak = max(peak, held)
    return peak


def through_link() -> tuple[int, int]:
    """Bytes sent and received through the node's link since it was made."""
    counts = Path(f"/sys/class/net/{DEVICE}/statistics")
    return int((counts / "tx_bytes").read_text()), int((counts / "rx_bytes").read_text())


def _link(seat: Seat, size: int) -> Callable[[], object]:
    """The first rank of each node sends `size` bytes to the next node and receives as many: all links full, both ways."""
    nodes = seat.world_size // seat.ranks_per_node
    leaving, arriving = torch.zeros(2, size // 4)
    to, source = ((seat.node + hop) % nodes * seat.ranks_per_node for hop in (1, -1))

    def exchange() -> None:
        if seat.rank % seat.ranks_per_node:
            return
        # gloo announces a receive behind what already leaves for the same peer: posted second, it would wait for all of that.
        posted = [dist.P2POp(dist.irecv, arriving, source), dist.P2POp(dist.isend, leaving, to)]
        for pending in dist.batch_isend_irecv(posted):
            pending.wait()

    return exchange


def check_numbers(record: Record, made: Contender, answer: tuple[Tensor, ...] | None, seat: Seat, work: Work) -> None:
    """One step, which also warms up, held to one device's numbers."""
    results = made.step()
    if answer is None or made.layout is None:
        return
    results = results if made.heads_first else tuple(x.transpose(1, 2) for x in results)
    expected = (rows_of(x, seat.rank, seat.world_size, made.layout) for x in answer)
    record.error = max(relative_error(x, y) for x, y in zip(results, expected, strict=True))
    if not record.error <= TOLERANCE[work.dtype]:
        raise ArithmeticError(f"{made.name} on rank {seat.rank} is off one device's numbers by {record.error:.1e}; its time means nothing")
