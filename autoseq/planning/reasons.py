"""Why an attention was not given a strategy, in words."""

from __future__ import annotations

from autoseq.planning.choice import Placed, three_digits
from autoseq.readable import readable_seconds
from autoseq.runtime.layout import Layout


def in_one_plan(lost: Placed, best: Placed, more_bytes: int) -> str:
    """Of a strategy that could serve in some layout, on the mesh of the one that was taken; the plan would hold `more_bytes` with it."""
    told, is_reason = by_itself(lost, best)
    if is_reason:
        return told
    if lost.layout != best.layout:
        return f"{told}; {of_rows(best.layout)}"
    if lost.offer.worth == best.offer.worth:
        return f"{told}, which is the same in three digits; {best.offer.strategy} comes first in the list of strategies"
    return f"{told}, but the plan would hold {more_bytes:,} bytes more and not fit" if more_bytes > 0 else f"{told}, but nothing fits"


def by_itself(lost: Placed, best: Placed) -> tuple[str, bool]:
    """`1.24 ms a step on a mesh of 2 × 4 with zigzag rows, ulysses 1.23 ms`, and whether it lost by that, or by what it sends."""
    mesh = f" on a mesh of {' × '.join(map(str, lost.mesh))}" if lost.mesh != best.mesh else ""
    rows = f" with {lost.layout} rows" if lost.layout != best.layout else ""
    theirs, ours = lost.offer, best.offer
    told = f"{readable_seconds(theirs.seconds)} a step{mesh}{rows}, {ours.strategy} {readable_seconds(ours.seconds)}"
    more = theirs.sent_bytes - ours.sent_bytes
    if three_digits(theirs.seconds) == three_digits(ours.seconds) and more > 0:
        return f"{told}, which is the same in three digits; it sends {more:,} bytes more", True
    return told, three_digits(theirs.seconds) > three_digits(ours.seconds)


def of_rows(layout: Layout) -> str:
    """Why a strategy that suits one attention was not taken; why the layout was, `Plan.refused` tells."""
    return f"but all attentions share one layout, {layout}"
