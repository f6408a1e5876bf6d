"""Sets of rows as runs: ascending, disjoint, not adjacent (start, rows) pairs. What a strategy sends is said in them."""

from __future__ import annotations

from collections.abc import Iterable

Run = tuple[int, int]
"""(start, rows)."""

Runs = tuple[Run, ...]


def union(*sets: Runs) -> Runs:
    """The rows of any of the sets."""
    return _merged(sorted(run for runs in sets for run in runs))


def intersection(left: Runs, right: Runs) -> Runs:
    """The rows of both."""
    found = []
    for a, rows_a in left:
        for b, rows_b in right:
            start, end = max(a, b), min(a + rows_a, b + rows_b)
            if start < end:
                found.append((start, end - start))
    return tuple(sorted(found))


def difference(left: Runs, right: Runs) -> Runs:
    """The rows of `left` that are not in `right`."""
    kept = list(left)
    for b, rows_b in right:
        cut = []
        for a, rows_a in kept:
            cut += [(a, min(a + rows_a, b) - a), (max(a, b + rows_b), a + rows_a - max(a, b + rows_b))]
        kept = [run for run in cut if run[1] > 0]
    return tuple(kept)


def count(runs: Runs) -> int:
    """How many rows."""
    return sum(rows for _, rows in runs)


def head(runs: Runs, rows: int) -> Runs:
    """The first rows of a set."""
    kept = []
    for start, count_here in runs:
        if rows > 0:
            kept.append((start, min(count_here, rows)))
        rows -= count_here
    return tuple(kept)


def offsets(inner: Runs, outer: Runs) -> list[tuple[int, int, int]]:
    """(place, start, rows) of each run of `inner`: where it lies in a buffer that holds the rows of `outer`, one run after the other."""
    placed, place = [], 0
    for a, rows_a in outer:
        for b, rows_b in inner:
            start, end = max(a, b), min(a + rows_a, b + rows_b)
            if start < end:
                placed.append((place + start - a, start, end - start))
        place += rows_a
    return placed


def _merged(runs: Iterable[Run]) -> Runs:
    merged: list[Run] = []
    for start, rows in runs:
        if rows <= 0:
            continue
        if merged and start <= sum(merged[-1]):
            first = merged[-1][0]
            merged[-1] = (first, max(sum(merged[-1]), start + rows) - first)
        else:
            merged.append((start, rows))
    return tuple(merged)
