"""The rows of attention that see no key: their out is not 0 when the program's softmax runs over one number in all columns.

Those rows are known when all keys have been seen, by a lse of -inf. Every key of the sequence weighs the same there, 1/k_len (or NaN,
for a number of -inf), so the blocks that the mask leaves out are visited too, but only for the tiles of rows that may be empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from autoseq.runtime.blocks import Chunk
from autoseq.runtime.errors import UnsupportedError
from autoseq.runtime.hashing import dropout_weights
from autoseq.runtime.plain import plain_scores, score_gradients, value_gradient, weight_gradient, weighted_values
from autoseq.runtime.score import CaptureGradients, Score
from autoseq.runtime.score_facts import looked_up
from autoseq.runtime.tiles import Problem, Tile, Tiling


def _weights(tiling: Tiling, empty: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """What each key weighs in the empty rows; in the others, 0."""
    weight = float("nan") if tiling.problem.empty_rows.startswith("nan") else 1 / tiling.k_len
    return torch.zeros(empty.shape, dtype=dtype, device=empty.device).masked_fill(empty, weight).expand(*empty.shape[:3], keys)


def _tiles(tiling: Tiling, lse: Tensor, k_chunks: Sequence[Chunk]) -> Iterator[tuple[Tile, Tensor]]:
    """The tiles that hold rows without a key (so far, while keys are still coming) and which rows those are: [B,H,rows,1]."""
    for tile in tiling.possibly_empty(k_chunks, everywhere=_everywhere(tiling.problem)):
        empty = (lse[tile.rows] == -torch.inf)[..., None]
        # Looking at the values would make a GPU wait.
        if lse.device.type != "cpu" or bool(empty.any()):
            yield tile, empty


def _everywhere(problem: Problem) -> bool:
    """-inf can also come out of a score's formula, in any row; what the program computes there is NaN."""
    return problem.empty_rows.startswith("nan") and bool(problem.score)


def _are_possible(tiling: Tiling) -> bool:
    problem = tiling.problem
    return problem.fills_empty_rows and tiling.may_have_empty_rows(everywhere=_everywhere(problem))


def _check_finite(problem: Problem) -> None:
    """Where scores are -inf already, adding the least finite number does not make all columns of an empty row alike."""
    for number in looked_up(problem.score):
        capture = problem.captures[number]
        if capture.is_floating_point() and bool((capture == -torch.inf).any()):
            raise UnsupportedError(
                f"What is added to the attention's scores, of shape {tuple(capture.shape)}, holds -inf, and the attention's mask hides "
                "keys by the least finite number instead. A row that they hide together is not kept exact: use one of them."
            )


class EmptyRowsForward:
    """Sums the values that empty rows get, beside the accumulators `out` and `lse`."""

    def __init__(self, tiling: Tiling, out: Tensor, lse: Tensor) -> None:
        self._tiling, self._out, self._lse = tiling, out, lse
        self._filling: Tensor | None = None
        self._possible = _are_possible(tiling)
        self._are_nan = tiling.problem.empty_rows.startswith("nan")
        if tiling.problem.empty_rows.startswith("uniform"):
            _check_finite(tiling.problem)

    def add(self, v: Tensor, k_chunks: Sequence[Chunk]) -> None:
        """To be called when the accumulators have seen the same keys."""
        problem = self._tiling.problem
        if not self._possible or self._are_nan:
            return
        for tile, empty in _tiles(self._tiling, self._lse, k_chunks):
            if self._filling is None:
                self._filling = torch.zeros_like(self._out)
            weights = _weights(self._tiling, empty, tile.size[1], self._out.dtype)
            if problem.dropout_p > 0:
                weights = weights * dropout_weights(problem.seed, tile.points, problem.dropout_p, weights.dtype)
            self._filling[tile.rows] += weighted_values(weights, v[tile.keys])

    def filled(self) -> Tensor:
        """`out` with its empty rows."""
        empty = (self._lse == -torch.inf)[..., None]
        if self._possible and self._are_nan:
            return self._out.masked_fill(empty, torch.nan)
        return self._out if self._filling is None else torch.where(empty, self._filling, self._out)


class EmptyRowsBackward:
    """The gradients that empty rows give, beside those of all other rows."""

    def __init__(
        self, tiling: Tiling, q: Tensor, grad_out: Tensor, out: Tensor, lse: Tensor, captures: CaptureGradients
    ) -> None:
        self._tiling, self._q, self._grad_out, self._out, self._lse, self._captures = tiling, q, grad_out, out, lse, captures
        # One look at all rows, where a GPU waits once, and most programs have none.
        self._any = _are_possible(tiling) and bool((lse == -torch.inf).any())

    def without_nan(self, out: Tensor) -> Tensor:
        """`out` for the other rows: a NaN would go through a weight of 0."""
        return out.masked_fill((self._lse == -torch.inf)[..., None], 0) if self._any else out

    def add(self, k: Tensor, v: Tensor, k_chunks: Sequence[Chunk], dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add the share of these keys."""
        if not self._any:
            return
        problem = self._tiling.problem
        for tile, empty in _tiles(self._tiling, self._lse, k_chunks):
            grad_out = torch.where(empty, self._grad_out[tile.rows].to(dq.dtype), 0.0)
            weights = _weights(self._tiling, empty, tile.size[1], dq.dtype)
            kept = None
            if problem.dropout_p > 0:
                kept = dropout_weights(problem.seed, tile.points, problem.dropout_p, dq.dtype)
            dv[tile.keys] += value_gradient(weights if kept is None else weights * kept, grad_out, v[tile.keys])
            if not problem.empty_rows.endswith("_fill"):
                self._through_scores(tile, empty, weights, kept, grad_out, (k[tile.keys], v[tile.keys]), dq, dk[tile.keys])

    def _through_scores(
        self,
        tile: Tile,
        empty: Tensor,
        weights: Tensor,
        kept: Tensor | None,
        grad_out: Tensor,
        kv: tuple[Tensor, Tensor],
        dq: Tensor,
        dk: Tensor,
    ) -> None:
        problem, q, (k, v) = self._tiling.problem, self._q[tile.rows], kv
        score = Score(problem.score, problem.captures)
        _, pull = score.with_gradient(plain_scores(q, k, problem.scale), tile.points, self._captures)
        grad_weights = weight_gradient(grad_out, v)
        grad_weights = grad_weights if kept is None else grad_weights * kept
        delta = (grad_out * self._out[tile.rows].to(grad_out.dtype)).sum(-1, keepdim=True)
        grad_scores = pull(torch.where(empty, weights * (grad_weights - delta), 0.0))
        for total, share in zip((dq[tile.rows], dk), score_gradients(grad_scores, q, k, problem.scale), strict=True):
            total.add_(share)
