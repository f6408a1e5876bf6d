"""What a page draws of ranks: who holds which rows, who sends to whom, what a mask leaves. Shapes only; their colours are classes.

Nothing here comes from the model, only numbers and the names of messages, so that a template may place it as it is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from autoseq.runtime.layout import Layout, num_chunks, rank_chunks
from autoseq.runtime.strategy import Site

MOST_RANKS = 8
"""More are not drawn, and not told apart by colour."""

_CELLS = 16  # rows and columns of a drawn mask
_WIDTH, _HEIGHT, _MARGIN = 148.0, 44.0, 10.0


@dataclass(frozen=True, slots=True)
class Shape:
    """One SVG element: its tag, its classes, its geometry."""

    tag: Literal["rect", "line", "circle", "path", "text"]
    classes: str
    geometry: tuple[tuple[str, float | str], ...]
    text: str = ""


@dataclass(frozen=True, slots=True)
class Drawing:
    """An SVG picture and what it shows, for those who cannot see it."""

    name: str
    title: str
    width: float
    height: float
    shapes: tuple[Shape, ...]


def rank_class(rank: int) -> str:
    """The colour of a rank."""
    return f"rank{rank % MOST_RANKS}"


# Who holds which rows -------------------------------------------------------------------------------------------------


def placements(P: int, layout: Layout) -> list[Drawing]:
    """A column a rank, the sequence from top to bottom: what each placement leaves on it."""
    shown = min(P, MOST_RANKS)
    size = 3 + 8.0 * shown
    columns = [3 + 8.0 * rank for rank in range(shown)]
    frames = [_rect("hollow", x - 1, 1, 6, 22) for x in columns]
    parts = shown * num_chunks(layout)
    slices = [
        _rect(rank_class(rank), x - 1, 1 + 22 * chunk / parts, 6, 22 / parts)
        for rank, x in enumerate(columns) for chunk in rank_chunks(rank, shown, layout)
    ]  # fmt: skip
    return [
        Drawing("hold-shard", f"each rank holds its rows ({layout})", size, 24, (*frames, *slices)),
        Drawing("hold-replicate", "every rank holds all of it", size, 24, tuple(_rect("whole", x - 1, 1, 6, 22) for x in columns)),
        Drawing("hold-partial", "each rank holds a part of a sum", size, 24, tuple(_rect("partial", x - 1, 1, 6, 22) for x in columns)),
        Drawing("hold-one", "one device holds all of it", 14, 24, (_rect("one", 2, 1, 10, 22),)),
    ]


def placement_drawing(placement: str) -> str:
    """The drawing of `Shard(1)`, `Replicate` or `Partial`."""
    kind = placement.split("(")[0].lower()
    return f"hold-{kind}" if kind in ("shard", "replicate", "partial") else ""


# Who sends to whom ----------------------------------------------------------------------------------------------------


def messages(P: int) -> list[Drawing]:
    """The kinds of messages among P ranks, those who send above, those who receive below."""
    n = min(P, MOST_RANKS)
    return [Drawing(f"send-{name}", title, _WIDTH, _HEIGHT, tuple(draw(n))) for name, (title, draw) in _MESSAGES.items()]


def message_drawing(op: str, strategy: str = "") -> str:
    """The drawing of a kind of message, as counting calls it, sent by a strategy if that is known."""
    if op == "send":
        return f"send-{strategy}" if strategy in _MESSAGES else "send-ring"
    return f"send-{op}" if op in _MESSAGES else ""


def _all_pairs(n: int) -> Iterator[Shape]:
    for sender in range(n):
        for receiver in range(n):
            yield _wire(n, sender, receiver)
    yield from _ranks(n, rank_class, rank_class)


def _gather(n: int) -> Iterator[Shape]:
    yield from (_wire(n, sender, receiver) for sender in range(n) for receiver in range(n))
    yield from _ranks(n, rank_class, lambda _: "whole")


def _reduce_scatter(n: int) -> Iterator[Shape]:
    yield from _into_sum(n)
    for receiver in range(n):
        yield _line(f"wire {rank_class(receiver)}", _WIDTH / 2, _HEIGHT / 2, _x(n, receiver), _HEIGHT - 6)
    yield from _sum()
    yield from _ranks(n, lambda _: "partial", rank_class)


def _all_reduce(n: int) -> Iterator[Shape]:
    yield from _into_sum(n)
    yield from (_line("wire whole", _WIDTH / 2, _HEIGHT / 2, _x(n, receiver), _HEIGHT - 6) for receiver in range(n))
    yield from _sum()
    yield from _ranks(n, lambda _: "partial", lambda _: "whole")


def _take_shard(n: int) -> Iterator[Shape]:
    yield from (_line(f"wire {rank_class(rank)}", _x(n, rank), 6, _x(n, rank), _HEIGHT - 6) for rank in range(n))
    yield from _ranks(n, lambda _: "whole", rank_class)


def _ring(n: int) -> Iterator[Shape]:
    yield from (_wire(n, sender, (sender + 1) % n) for sender in range(n))
    yield from _ranks(n, rank_class, rank_class)


def _both_ways(n: int) -> Iterator[Shape]:
    yield from (_wire(n, sender, (sender + step) % n) for sender in range(n) for step in (1, -1))
    yield from _ranks(n, rank_class, rank_class)


def _neighbours(n: int) -> Iterator[Shape]:
    yield from (_wire(n, sender, sender + 1) for sender in range(n - 1))
    yield from _ranks(n, rank_class, rank_class)


_MESSAGES: dict[str, tuple[str, Callable[[int], Iterator[Shape]]]] = {
    "all_to_all": ("all-to-all: each rank sends each other rank a different part", _all_pairs),
    "all_gather": ("all-gather: each rank's part goes to every rank", _gather),
    "reduce_scatter": ("reduce-scatter: parts of a sum are added up, each rank keeps its rows", _reduce_scatter),
    "all_reduce": ("all-reduce: parts of a sum are added up for every rank", _all_reduce),
    "take_shard": ("each rank keeps its rows, nothing is sent", _take_shard),
    "ring": ("ring: each rank sends to the next one, round after round", _ring),
    "double_ring": ("rings inside nodes and across them", _ring),
    "bidirectional_ring": ("ring in both directions", _both_ways),
    "halo": ("each rank sends to its neighbour", _neighbours),
    "balanced": ("ranks with little work help others", _all_pairs),
}


def _x(n: int, rank: int) -> float:
    return _MARGIN + (_WIDTH - 2 * _MARGIN) * (rank / (n - 1) if n > 1 else 0.5)


def _wire(n: int, sender: int, receiver: int) -> Shape:
    return _line(f"wire {rank_class(sender)}", _x(n, sender), 6, _x(n, receiver), _HEIGHT - 6)


def _ranks(n: int, above: Callable[[int], str], below: Callable[[int], str]) -> Iterator[Shape]:
    for rank in range(n):
        yield _circle(above(rank), _x(n, rank), 6)
        yield _circle(below(rank), _x(n, rank), _HEIGHT - 6)


def _into_sum(n: int) -> Iterator[Shape]:
    yield from (_line("wire partial", _x(n, sender), 6, _WIDTH / 2, _HEIGHT / 2) for sender in range(n))


def _sum() -> Iterator[Shape]:
    yield _circle("sum", _WIDTH / 2, _HEIGHT / 2, 6.5)
    yield Shape("text", "sigma", (("x", _WIDTH / 2), ("y", _HEIGHT / 2 + 3)), "Σ")


# Masks ----------------------------------------------------------------------------------------------------------------


def mask_drawing(site: Site, P: int, layout: Layout, by_rank: bool) -> Drawing:
    """Queries from top to bottom, keys from left to right: what the mask's bounds leave, in the colours of the ranks that compute it."""
    step_q, step_k = site.q_len / _CELLS, site.k_len / _CELLS
    shapes = [_rect("hollow", 0.5, 0.5, 63, 63)]
    for row in range(_CELLS):
        first, last = row * step_q, (row + 1) * step_q - 1
        left = 0.0 if site.max_behind is None else max(0.0, first - site.max_behind)
        right = site.k_len if site.max_ahead is None else min(site.k_len, last + site.max_ahead + 1)
        cells = range(int(left / step_k), min(_CELLS, -int(-right // step_k)))
        if len(cells):
            colour = rank_class(_rank_of(row, P, layout)) if by_rank else "one"
            shapes.append(_rect(colour, 4.0 * cells.start, 4.0 * row, 4.0 * len(cells), 4))
    title = "what the mask leaves: queries from top to bottom, keys from left to right"
    return Drawing("mask", title, 64, 64, tuple(shapes))


def splits_heads(strategy: str) -> bool:
    """Whether a rank computes some heads of rows that are not its own, so that a mask's rows are not the ranks'."""
    return strategy == "ulysses" or strategy.startswith("hybrid")


def _rank_of(row: int, P: int, layout: Layout) -> int:
    """The rank that holds the middle of a drawn row."""
    chunks = P * num_chunks(layout)
    chunk = int((row + 0.5) / _CELLS * chunks)
    return chunk if layout == "contiguous" else min(chunk, chunks - 1 - chunk)


def share_of_work(work: Sequence[int]) -> list[float]:
    """Each rank's work as a share of the busiest one's."""
    most = max(work, default=0)
    return [each / most if most else 0.0 for each in work]


def _rect(classes: str, x: float, y: float, width: float, height: float) -> Shape:
    return Shape("rect", classes, (("x", _short(x)), ("y", _short(y)), ("width", _short(width)), ("height", _short(height))))


def _line(classes: str, x1: float, y1: float, x2: float, y2: float) -> Shape:
    return Shape("line", classes, (("x1", _short(x1)), ("y1", _short(y1)), ("x2", _short(x2)), ("y2", _short(y2))))


def _circle(classes: str, x: float, y: float, r: float = 4) -> Shape:
    return Shape("circle", classes, (("cx", _short(x)), ("cy", _short(y)), ("r", r)))


def _short(number: float) -> float:
    return round(number, 2)
