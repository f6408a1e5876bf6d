"""The predicted step as a strip on a page: of a few ranks what they compute, above what they send.

What is shorter than a hair is drawn together with its neighbours of the same kind; the trace file has it all.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from autoseq.html_drawings import Drawing, Shape, rank_class
from autoseq.planning.prediction import LANES
from autoseq.step_timeline import Span, Timeline

_MOST_RANKS = 4
_WIDTH = 1000.0
_LANE, _GAP, _HAIR = 11.0, 7.0, 0.6
_LINKS = tuple(LANES.values())


@dataclass(frozen=True, slots=True)
class Busy:
    """What a rank spends the step with, as shares of it. What is sent under computation counts in both."""

    rank: int
    computes: float
    attends: float
    sends: float


def shown_ranks(timeline: Timeline) -> list[int]:
    """The first, the last, and some between."""
    ranks = timeline.ranks
    if len(ranks) <= _MOST_RANKS:
        return list(ranks)
    return [ranks[round(i * (len(ranks) - 1) / (_MOST_RANKS - 1))] for i in range(_MOST_RANKS)]


def timeline_drawing(timeline: Timeline) -> Drawing:
    """Two lanes a rank, time from left to right."""
    ranks = shown_ranks(timeline)
    shapes: list[Shape] = []
    for number, rank in enumerate(ranks):
        top = number * (2 * _LANE + _GAP)
        shapes += [_bar("lane", 0, top + lane * _LANE, _WIDTH, _LANE - 1) for lane in range(2)]
        spans = [span for span in timeline.spans if span.rank == rank]
        for lane, of_lane in enumerate(([s for s in spans if s.lane == "compute"], [s for s in spans if s.lane in _LINKS])):
            shapes += _paths(_merged(of_lane, timeline.seconds, rank), top + lane * _LANE)
    height = len(ranks) * (2 * _LANE + _GAP) - _GAP
    title = f"one predicted step of ranks {', '.join(map(str, ranks))}: what each computes, below it what it sends"
    return Drawing("timeline", title, _WIDTH, height, tuple(shapes))


def busy(timeline: Timeline) -> list[Busy]:
    """Of the ranks that are drawn."""
    found = []
    for rank in shown_ranks(timeline):
        spans = [span for span in timeline.spans if span.rank == rank]
        shares = [
            sum(span.seconds for span in spans if ask(span)) / (timeline.seconds or 1.0)
            for ask in (_is_other_work, _is_attention, lambda span: span.lane in _LINKS)
        ]
        found.append(Busy(rank, *shares))
    return found


def _is_attention(span: Span) -> bool:
    return span.lane == "compute" and any(name == "site" for name, _ in span.details)


def _is_other_work(span: Span) -> bool:
    return span.lane == "compute" and not _is_attention(span)


def _merged(spans: Iterable[Span], total_s: float, rank: int) -> list[tuple[str, float, float]]:
    """Kind, start and end of each bar, in the drawing's units."""
    bars: list[tuple[str, float, float]] = []
    for span in sorted(spans, key=lambda span: span.start_s):
        kind = rank_class(rank) if span.lane in _LINKS else "attends" if _is_attention(span) else "computes"
        start = _WIDTH * span.start_s / (total_s or 1.0)
        end = start + _WIDTH * span.seconds / (total_s or 1.0)
        if bars and bars[-1][0] == kind and start - bars[-1][2] < _HAIR:
            bars[-1] = kind, bars[-1][1], end
        elif end - start >= _HAIR or not bars or start - bars[-1][2] >= _HAIR:
            bars.append((kind, start, max(end, start + _HAIR)))
    return bars


def _paths(bars: Sequence[tuple[str, float, float]], y: float) -> Iterator[Shape]:
    """All bars of a kind in one path, which takes a fraction of the bytes."""
    for kind in dict.fromkeys(kind for kind, _, _ in bars):
        own = [(start, end - start) for of_kind, start, end in bars if of_kind == kind]
        steps = "".join(f"M{x:.1f} {y:g}h{width:.1f}v{_LANE - 1:g}h{-width:.1f}z" for x, width in own)
        yield Shape("path", kind, (("d", steps),))


def _bar(classes: str, x: float, y: float, width: float, height: float) -> Shape:
    return Shape("rect", classes, tuple((name, round(n, 2)) for name, n in (("x", x), ("y", y), ("width", width), ("height", height))))
