"""Repeated layers drawn once: neighbours in a tree of blocks that differ in nothing but numbers in their names become a `Fold`.

A period of several blocks folds too: five window layers and a full one, eight times.
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import takewhile

from autoseq.html_blocks import Block, Fold, Item, Line, Row
from autoseq.repetitions import longest_run

_LONGEST_PERIOD = 12


def fold(items: Sequence[Item]) -> tuple[Item, ...]:
    """The items with every run of at least two equal periods folded, inside out."""
    return _folded([replace(item, items=fold(item.items)) if isinstance(item, Block) else item for item in items])


def _folded(items: Sequence[Item]) -> tuple[Item, ...]:
    signatures = [_signature(item) for item in items]
    made: list[Item] = []
    place = 0
    while place < len(items):
        period, times = longest_run(signatures, place, _periods(items[place : place + _LONGEST_PERIOD]))
        end = place + period * times
        blocks = [item for item in items[place:end] if isinstance(item, Block)]
        if times > 1:
            first = _folded(items[place : place + period])  # a period may hold repetitions itself
            made.append(Fold(times, first, tuple(block.path for block in blocks), tuple(dict.fromkeys(block.kind for block in blocks))))
        else:
            made += items[place:end]
        place = end
    return tuple(made)


def _periods(items: Sequence[Item]) -> range:
    """A period is of blocks alone."""
    blocks = takewhile(lambda item: isinstance(item, Block), items)
    return range(1, 1 + sum(1 for _ in blocks))


def _signature(item: Item) -> Hashable:
    """What two items that fold have in common."""
    if isinstance(item, Block):
        return _unnumbered(item.label.partition(", call ")[0]), item.kind, tuple(map(_signature, item.items))
    if isinstance(item, Fold):
        return item.times, tuple(map(_signature, item.items))
    return _row_signature(item)


def _row_signature(row: Row) -> Hashable:
    site = row.site and (row.site.site.site, row.site.site.mask, row.site.strategy, row.site.cost)
    sent = tuple(tuple(sorted((op, t.messages, t.bytes) for op, t in way.items())) for way in (row.sent.forward, row.sent.backward))
    return row.kind, tuple(map(_line_signature, row.lines)), sent, site, row.fallback and (row.fallback.op, row.fallback.reason)


def _line_signature(line: Line) -> Hashable:
    parameters = tuple((_unnumbered(each.name), each.value, each.is_trained) for each in line.parameters)
    return line.op, line.shape_of_call, line.source, line.before, line.after, line.placement, parameters


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)
