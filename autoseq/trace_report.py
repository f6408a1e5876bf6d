"""A predicted step as a Chrome trace, for ui.perfetto.dev or chrome://tracing: a process a rank, a thread a lane.

The format: "Trace Event Format", complete events (`X`) in microseconds. Times are whole nanoseconds, so that events of a lane, which
follow each other, never overlap by rounding.
"""

import json
from collections.abc import Iterator
from typing import Any

from autoseq.planning.prediction import Lane
from autoseq.step_timeline import Timeline

_LANES: dict[Lane, str] = {
    "compute": "compute", "links": "messages", "inside": "messages inside the node", "across": "messages across nodes"
}  # fmt: skip
_THREADS = {lane: number for number, lane in enumerate(_LANES)}


def trace_json(timeline: Timeline) -> str:
    """The whole file."""
    return json.dumps({
        "traceEvents": [*_names(timeline), *_events(timeline)],
        "displayTimeUnit": "ms",
        "otherData": {
            "what": "one training step as autoseq predicts it; nothing here was measured",
            "topology": timeline.topology, "ranks": timeline.world_size, "ranks shown": len(timeline.ranks),
            "predicted seconds": timeline.seconds,
        },
    }, indent=None, separators=(",", ":"))  # fmt: skip


def _names(timeline: Timeline) -> Iterator[dict[str, Any]]:
    lanes = sorted({span.lane for span in timeline.spans}, key=_THREADS.__getitem__)
    for rank in timeline.ranks:
        yield _metadata(rank, 0, "process_name", name=f"rank {rank} of {timeline.world_size}")
        yield _metadata(rank, 0, "process_sort_index", sort_index=rank)
        for lane in lanes:
            yield _metadata(rank, _THREADS[lane], "thread_name", name=_LANES[lane])
            yield _metadata(rank, _THREADS[lane], "thread_sort_index", sort_index=_THREADS[lane])


def _metadata(rank: int, thread: int, what: str, **values: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": rank, "tid": thread, "name": what, "args": values}


def _events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    busy_until: dict[tuple[int, Lane], int] = {}
    for span in sorted(timeline.spans, key=lambda span: (span.rank, _THREADS[span.lane], span.start_s)):
        start = max(_nanoseconds(span.start_s), busy_until.get((span.rank, span.lane), 0))
        end = max(start, _nanoseconds(span.start_s + span.seconds))
        busy_until[span.rank, span.lane] = end
        if end > start:
            yield {
                "ph": "X", "pid": span.rank, "tid": _THREADS[span.lane], "name": span.name, "cat": span.lane,
                "ts": start / 1000, "dur": (end - start) / 1000, "args": dict(span.details),
            }  # fmt: skip


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
