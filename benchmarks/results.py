"""What a benchmark's ranks recorded, as one result a contender: medians, ratios within rounds, and the floor.

The floor of a strategy is `max(compute, bytes / bandwidth)`: what it would take if the links were never idle and nobody waited.
`compute` is a P-th of the attention by the faster of two kernels, with all ranks at it at once. With one rank on a node its bytes are
those it sends; with several, those that the operating system counts at the node's link, because not all that is sent passes there. The
bandwidth is that of one large exchange, counted alike. All are measured in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from measuring import LINK
from work import Work


@dataclass(frozen=True, slots=True)
class Result:
    """One contender at one length. Bytes and messages are of the rank that sends most, times those of the slowest rank."""

    name: str
    kind: str
    layout: str | None
    why_not: str | None = None
    step_s: float = 0.0
    bytes: int = 0
    messages: int = 0
    peak_bytes: int = 0
    error: float | None = None
    link_bytes: int | None = None  # through the busiest link in its busier direction, with what TCP adds
    transfer_s: float | None = None
    floor_s: float | None = None
    over_floor: float | None = None  # the median over rounds
    over_peer: float | None = None  # against the fastest peer, likewise
    rounds_s: tuple[float, ...] = ()  # the slowest rank's, round by round


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything at one length."""

    work: Work
    world_size: int
    nodes: int | None
    compute_s: float | None
    link_bytes_per_s: float | None
    results: list[Result]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Merged:
    """One contender's records on all ranks, as one."""

    record: dict[str, Any]
    seconds: list[float]
    bytes: int
    messages: int
    peak_bytes: int
    link_bytes: int | None
    error: float | None

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def compare(work: Work, world_size: int, nodes: int | None, per_rank: Sequence[Sequence[dict[str, Any]]]) -> Comparison:
    """The ranks' records, names in the same order on each."""
    absent = [Result(r["name"], r["kind"], None, r["why_not"]) for r in per_rank[0] if r["why_not"]]
    merged = [_merge(records) for records in zip(*per_rank, strict=True) if not records[0]["why_not"]]
    shares = [m.seconds for m in merged if m.record["kind"] == "compute"]
    compute = [min(each) for each in zip(*shares, strict=True)]
    link = _Link.of(merged, alone=nodes == world_size)
    peers = [m for m in merged if m.record["kind"] == "peer"]
    peer = min(peers, key=lambda m: m.median_s) if peers else None
    results = [_result(m, compute, link, peer) for m in merged if m.record["kind"] not in (LINK, "compute")]
    compute_s = statistics.median(compute) if compute else None
    return Comparison(work, world_size, nodes, compute_s, link.bytes_per_s if link else None, results + absent)


@dataclass(frozen=True, slots=True)
class _Link:
    bytes_per_s: float
    alone: bool  # one rank a node

    @classmethod
    def of(cls, merged: Sequence[_Merged], *, alone: bool) -> _Link | None:
        measured = next((m for m in merged if m.record["kind"] == LINK), None)
        return None if measured is None else cls(_through(measured, alone) / measured.median_s, alone)


def _through(m: _Merged, alone: bool) -> int:
    """A step's bytes through the busiest link, as the bandwidth counts them."""
    return m.bytes if alone or m.link_bytes is None else m.link_bytes


def _merge(records: Sequence[dict[str, Any]]) -> _Merged:
    def most(key: str) -> Any:
        return max((record[key] for record in records if record[key] is not None), default=None)

    scale = records[0]["scale"]
    rounds = [max(each) * scale for each in zip(*(record["seconds"] for record in records), strict=True)]
    return _Merged(records[0], rounds, most("bytes"), most("messages"), most("peak_bytes"), most("link_bytes"), most("error"))


def _result(m: _Merged, compute: Sequence[float], link: _Link | None, peer: _Merged | None) -> Result:
    split = m.record["kind"] != "one device"
    transfer = _through(m, link.alone) / link.bytes_per_s if link and split else None
    floors = [max(each, transfer or 0.0) for each in compute] if split else []
    return Result(
        m.record["name"], m.record["kind"], m.record["layout"], None, m.median_s, m.bytes, m.messages, m.peak_bytes, m.error, m.link_bytes,
        transfer_s=transfer,
        floor_s=statistics.median(floors) if floors else None,
        over_floor=_ratio(m.seconds, floors) if floors else None,
        over_peer=_ratio(m.seconds, peer.seconds) if peer else None,
        rounds_s=tuple(m.seconds),
    )  # fmt: skip


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of times taken in the same round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
