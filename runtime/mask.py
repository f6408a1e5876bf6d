"""Which keys a query may attend to, as plain data.

The compiler reads a model's mask as a formula over (b, h, q, k) and hands it to a strategy as two bounds on `k - q` and a
predicate. The bounds decide without any data which blocks of the score matrix are empty, full or diagonal; what the
predicate allows is evaluated with torch, one block at a time, so the full S x S mask never exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import torch
from torch import Tensor

from autoseq.runtime.formula import Points, evaluate


class BlockKind(StrEnum):
    """What a mask does to one block of the score matrix."""

    EMPTY = "empty"  # no key is allowed
    FULL = "full"  # every key is allowed
    CAUSAL = "causal"  # row i may see keys 0..i of the block: a kernel's `is_causal`
    PARTIAL = "partial"  # anything else: needs a mask tensor


# A window has two or three different tiles, whatever its length; those of a few windows are kept, each of at most a tile.
_KEPT_TILES = 16


@dataclass(frozen=True, slots=True)
class Mask:
    """Query q attends to key k iff `k - q <= max_ahead`, `q - k <= max_behind` and the predicate holds.

    None leaves a side unbounded; causal is `max_ahead=0`, a window of W keys is `max_behind=W-1`. The predicate is a SymPy
    boolean over the integers b, h, q, k and the captures c0(...), c1(...), ...; "" means always true.
    """

    max_ahead: int | None = None
    max_behind: int | None = None
    predicate: str = ""

    def classify(self, q_start: int, q_rows: int, k_start: int, k_rows: int) -> BlockKind:
        """The kind of a block of consecutive queries and keys, by interval arithmetic on the bounds alone.

        EMPTY is final. FULL and CAUSAL say what the bounds do; a predicate, if there is one, must still be evaluated.
        """
        if q_rows <= 0 or k_rows <= 0:
            return BlockKind.EMPTY
        lowest = k_start - (q_start + q_rows - 1)
        highest = k_start + k_rows - 1 - q_start
        if self.max_ahead is not None and lowest > self.max_ahead:
            return BlockKind.EMPTY
        if self.max_behind is not None and -highest > self.max_behind:
            return BlockKind.EMPTY
        if self.max_behind is not None and -lowest > self.max_behind:
            return BlockKind.PARTIAL
        if self.max_ahead is None or highest <= self.max_ahead:
            return BlockKind.FULL
        # Kernels disagree on where the diagonal of a non-square block starts, so only squares count.
        square = q_rows == k_rows and k_start - q_start == self.max_ahead
        return BlockKind.CAUSAL if square else BlockKind.PARTIAL

    def keys_of(self, q_start: int, q_rows: int, k_start: int, k_rows: int) -> tuple[int, int]:
        """The part (start, rows) of some keys that the bounds allow to at least one of the queries, and nothing more."""
        first, end = k_start, k_start + k_rows
        if self.max_behind is not None:
            first = max(first, q_start - self.max_behind)
        if self.max_ahead is not None:
            end = min(end, q_start + q_rows + self.max_ahead)
        return first, max(0, end - first)

    def allowed(self, points: Points, captures: list[Tensor], *, bounds: bool = True, predicate: bool = True) -> Tensor | None:
        """Where attention is allowed, boolean, broadcastable to [B, H, q, k]; None where the whole block is.

        `bounds` and `predicate` say which of them to ask: what is known to hold costs nothing.
        """
        ahead = points.k - points.q
        terms = []
        if bounds and self.max_ahead is not None:
            terms.append(ahead <= self.max_ahead)
        if bounds and self.max_behind is not None:
            terms.append(ahead >= -self.max_behind)
        if predicate and self.predicate:
            terms.append(evaluate(self.predicate, points, captures))
        if not terms:
            return None
        result = terms[0]
        for term in terms[1:]:
            result = torch.logical_and(result, term)
        return result

    def within_bounds(self, q_start: int, q_rows: int, k_start: int, k_rows: int) -> Tensor:
        """`allowed` of a block on a CPU that the bounds cut, by them alone: kept, for tiles, stages and calls ask for the same.

        It is not to be written to.
        """
        return _within_bounds(self.max_ahead, self.max_behind, q_start - k_start, q_rows, k_rows)


@lru_cache(maxsize=_KEPT_TILES)
def _within_bounds(max_ahead: int | None, max_behind: int | None, first: int, q_rows: int, k_rows: int) -> Tensor:
    """Bounds know distances only: it is the same wherever the first query is `first` past the first key."""
    # A tensor that was made in inference mode could serve no training later.
    with torch.inference_mode(False):
        points = Points.of(1, range(1), *(torch.arange(*span, device="cpu") for span in ((first, first + q_rows), (k_rows,))))
        allowed = Mask(max_ahead, max_behind).allowed(points, [])
    assert allowed is not None
    return allowed
