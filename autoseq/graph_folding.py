"""The lines of a graph with repeated layers shown once: neighbours that differ in nothing but numbers in their names."""

import re
from collections.abc import Iterator, Sequence

from autoseq.repetitions import longest_run

_PERIODS = range(6, 401)
"""Lines of a layer."""


def folded(lines: Sequence[str]) -> Iterator[str]:
    """The lines, where a run of equal periods shows the first and how often it comes again."""
    signatures = [_signature(line) for line in lines]
    place = 0
    while place < len(lines):
        period, times = longest_run(signatures, place, _PERIODS)
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
