"""The lines of a graph with repeated layers shown once: neighbours that differ in nothing but numbers in their names."""

import re
from collections.abc import Iterator, Sequence

_FEWEST_LINES, _LONGEST_PERIOD = 6, 400


def folded(lines: Sequence[str]) -> Iterator[str]:
    """The lines, where a run of equal periods shows the first and how often it comes again."""
    signatures = [_signature(line) for line in lines]
    place = 0
    while place < len(lines):
        period, times = _run(signatures, place)
        yield from lines[place : place + period]
        if times > 1:
            yield f"    … the {period} lines above {_times(times - 1)} more, with other numbers in their names"
        place += period * times


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number:,} times"


def _signature(line: str) -> str:
    """Without the numbers of nodes (`linear_3`) and of layers (`blocks.3.up`)."""
    code, _, source = line.partition("  # ")
    return re.sub(r"\.\d+(?=\.)", ".#", re.sub(r"(?<=[a-z])(_\d+)+\b", "", code)).rstrip() + source


def _run(signatures: Sequence[str], start: int) -> tuple[int, int]:
    """The period and the repetitions that cover most lines from `start`, of several the shortest period; (1, 1) where nothing repeats."""
    best = (1, 1)
    for period in range(_FEWEST_LINES, min(_LONGEST_PERIOD, (len(signatures) - start) // 2) + 1):
        if signatures[start] != signatures[start + period]:
            continue
        times = 1
        while signatures[start + times * period : start + (times + 1) * period] == signatures[start : start + period]:
            times += 1
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best
