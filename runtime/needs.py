"""Which keys each participant needs of each other: what a mask leaves empty is neither sent for nor computed.

All ranks come to the same answer, without asking each other: it follows from the bounds of the mask on `k - q`, and from what interval
arithmetic proves of its predicate. A predicate that looks up tensors is proven only where reading them costs no wait, on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sympy.core.function import AppliedUndef
from torch import Tensor

from autoseq.runtime import blocks, runs
from autoseq.runtime.blocks import Chunk, Cuts
from autoseq.runtime.formula import capture_number, parse
from autoseq.runtime.holdings import Holdings, whole
from autoseq.runtime.mask import Mask
from autoseq.runtime.runs import Runs


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one attention: q_len and k_len in all, s and t local ones of each participant, padding included."""

    q_holdings: Holdings
    k_holdings: Holdings
    s: int
    t: int
    q_len: int
    k_len: int

    def queries(self, participant: int) -> list[Chunk]:
        """The valid query rows of a participant."""
        return whole(self.q_holdings.spans(participant, self.s, self.q_len))

    def keys(self, participant: int) -> list[Chunk]:
        """The valid keys of a participant."""
        return whole(self.k_holdings.spans(participant, self.t, self.k_len))


Needs = tuple[tuple[Runs, ...], ...]
"""needs[asker][holder]: the local rows of the holder's keys that some query of the asker may see."""


@lru_cache(maxsize=256)
def within_bounds(rows: Rows, max_ahead: int | None, max_behind: int | None, participants: int) -> Needs:
    """The keys that the bounds of a mask allow."""
    mask, everyone = Mask(max_ahead, max_behind), range(participants)

    def needs(asker: int, holder: int) -> Runs:
        found = []
        for local, start, count in rows.keys(holder):
            # What consecutive queries see between them is one interval.
            seen = [mask.keys_of(q_start, q_rows, start, count) for _, q_start, q_rows in rows.queries(asker)]
            found += [(local + first - start, number) for first, number in seen if number > 0]
        return runs.union(tuple(sorted(found)))

    return tuple(tuple(needs(asker, holder) for holder in everyone) for asker in everyone)


@dataclass(frozen=True, slots=True)
class NeedTerms:
    """What of an attention decides who needs what; `captures` are None where only their names are known."""

    mask: Mask
    captures: list[Tensor] | None
    batch: int
    heads: range  # global
    fills_empty_rows: bool  # a row without keys is worth something that depends on all keys
    score: str = ""


def needs_of(terms: NeedTerms, rows: Rows, participants: int) -> Needs:
    """The keys that bounds and predicate allow, as far as that can be proven; all of them if some row may be left without any."""
    mask = terms.mask
    if fills_rows(terms, rows):
        return within_bounds(rows, None, None, participants)
    bounds = within_bounds(rows, mask.max_ahead, mask.max_behind, participants)
    captures = _readable(terms)
    if not mask.predicate or participants == 1 or captures is None:
        return bounds
    everyone = range(participants)
    q_chunks, k_chunks = ([chunk for p in everyone for chunk in of(p)] for of in (rows.queries, rows.keys))
    cuts = Cuts.of(mask, captures, terms.batch, terms.heads, q_chunks, k_chunks)
    return bounds if cuts.empty is None else _proven(bounds, cuts, cuts.empty.all(0), rows)


def fills_rows(terms: NeedTerms, rows: Rows) -> bool:
    """Whether some row may be worth something that depends on all keys."""
    return terms.fills_empty_rows and not _always_reached(terms, rows)


def _always_reached(terms: NeedTerms, rows: Rows) -> bool:
    """Whether the mask leaves a key to every row, as far as its bounds tell: the keys seen are concave in q, so its ends are tried."""
    seen = all(terms.mask.keys_of(q, 1, 0, rows.k_len)[1] > 0 for q in (0, rows.q_len - 1))
    return seen and not terms.mask.predicate and not terms.score


def _readable(terms: NeedTerms) -> list[Tensor] | None:
    """What the predicate looks up, if it is known here and now: a GPU would have to be waited for."""
    if terms.captures is None:
        parts = parse(terms.mask.predicate).atoms(AppliedUndef) if terms.mask.predicate else ()
        return None if any(capture_number(part) is not None for part in parts) else []
    return terms.captures if all(capture.device.type == "cpu" for capture in terms.captures) else None


def _proven(bounds: Needs, cuts: Cuts, empty: Tensor, rows: Rows) -> Needs:
    def needs(asker: int, holder: int) -> Runs:
        found = []
        for local, start, count in rows.keys(holder):
            keys = cuts.k_tiles[start, count]
            for _, q_start, q_rows in rows.queries(asker):
                queries = cuts.q_tiles[q_start, q_rows]
                seen = ~empty[queries.start : queries.stop, keys.start : keys.stop].all(0)
                found += [(local + i * blocks.TILE, min(blocks.TILE, count - i * blocks.TILE)) for i in seen.nonzero().flatten().tolist()]
        return runs.intersection(bounds[asker][holder], runs.union(tuple(sorted(found))))

    return tuple(tuple(needs(asker, holder) for holder in range(len(bounds))) for asker in range(len(bounds)))
