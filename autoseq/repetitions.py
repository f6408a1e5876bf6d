"""Repeated layers among lines or blocks: the run of equal periods that begins at a place."""

from collections.abc import Hashable, Sequence


def longest_run(signatures: Sequence[Hashable], start: int, periods: range) -> tuple[int, int]:
    """The period and the repetitions that cover most items from `start`, of several the shortest period; (1, 1) where nothing repeats.

    Items are equal whose signatures are; `periods` are the lengths that are tried.
    """
    best = (1, 1)
    for period in range(periods.start, min(periods.stop, (len(signatures) - start) // 2 + 1)):
        if signatures[start] != signatures[start + period]:
            continue
        times = 1
        while signatures[start + times * period : start + (times + 1) * period] == signatures[start : start + period]:
            times += 1
        if times > 1 and period * times > best[0] * best[1]:
            best = (period, times)
    return best
