"""Which rows of the sequence each participant of an attention holds.

Between plain ranks that is the layout of the graph. Where ranks have traded heads for rows first (`hybrid`), a participant holds
the shards of several ranks, and where all keys were gathered, those of all. In every case the sequence is cut into equal chunks,
the last ones padded, and a participant holds some of them, in ascending order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from autoseq.runtime.layout import Layout, rank_chunks

Span = tuple[int, int, int, int]
"""(local start, global start, valid rows, rows with padding) of chunks that lie together, locally and globally."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """`chunks[p]`: the ids of the chunks that participant p holds, ascending; equally many for each."""

    chunks: tuple[tuple[int, ...], ...]

    @staticmethod
    @lru_cache(maxsize=256)
    def of(P: int, layout: Layout, places: tuple[int, ...] = ()) -> Holdings:
        """P participants that each hold one rank's shard; or `places`: the ranks whose shards they hold, participant by participant."""
        ranks = len(places) or P
        held = places or tuple(range(P))
        each = ranks // P
        own = [held[i * each : (i + 1) * each] for i in range(P)]
        return Holdings(tuple(tuple(sorted(chunk for rank in shards for chunk in rank_chunks(rank, ranks, layout))) for shards in own))

    def spans(self, participant: int, local: int, n: int) -> list[Span]:
        """What `participant` holds in `local` padded rows of a sequence of n valid ones."""
        ids = self.chunks[participant]
        rows = local // len(ids)
        spans: list[Span] = []
        for i, chunk in enumerate(ids):
            valid = max(0, min(rows, n - chunk * rows))
            if spans and chunk == ids[i - 1] + 1:
                at, start, before, padded = spans[-1]
                spans[-1] = (at, start, before + valid, padded + rows)
            else:
                spans.append((i * rows, chunk * rows, valid, rows))
        return spans


def whole(rows_of: Sequence[Span]) -> list[tuple[int, int, int]]:
    """(local start, global start, rows) of the valid rows: the chunks that attention computes with."""
    return [(local, start, valid) for local, start, valid, _ in rows_of if valid > 0]
