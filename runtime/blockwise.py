"""Attention of some rows to some keys, block by block: the work that every strategy does between its messages.

Rows and keys come as chunks of the global sequence, keys as many at a time as a strategy has. Partial results merge by log-sum-exp in
float32 (Milakov and Gimelshein, arXiv:1805.02867), so the error does not grow with the number of blocks or ranks. What a fast
kernel can compute goes to one; any other score, dropout, and gradients of what a score looks up are computed from the scores of one
tile at a time (`runtime/plain.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from autoseq.runtime.blocks import Chunk
from autoseq.runtime.empty_rows import EmptyRowsBackward, EmptyRowsForward
from autoseq.runtime.formula import evaluate_float
from autoseq.runtime.fused import accumulate, merge
from autoseq.runtime.hashing import dropout_weights
from autoseq.runtime.kernels import attend, attend_backward
from autoseq.runtime.plain import (
    accumulate_dtype,
    plain_scores,
    score_gradients,
    softmax,
    value_gradient,
    weight_gradient,
    weighted_values,
    weights_given,
)
from autoseq.runtime.score import CaptureGradients, Score
from autoseq.runtime.score_facts import additive_terms, needs_whole_rows
from autoseq.runtime.tiles import Problem, Tile, Tiling


class Forward:
    """Attention of q's chunks to all keys, which come with `add` in any order. The results are in the accumulating dtype."""

    def __init__(
        self, q: Tensor, kv_heads: int, value_dim: int, q_chunks: Sequence[Chunk], k_chunks: Sequence[Chunk], problem: Problem
    ) -> None:
        """q is [B,H,s,D]; `k_chunks` are all keys there are, on any rank."""
        self._q, self._problem = q, problem
        self._tiling = Tiling(q, kv_heads, q_chunks, k_chunks, problem)
        self._out, self._lse = _nothing_seen(q, value_dim, problem)
        self._empty = EmptyRowsForward(self._tiling, self._out, self._lse)

    def add(self, k: Tensor, v: Tensor, k_chunks: Sequence[Chunk]) -> None:
        """Attend to chunks of k [B,K,t,D] and v [B,K,t,Dv]."""
        by_kernel = self._problem.serves_kernels()
        for tile in self._tiling.tiles(k_chunks, plain=not by_kernel):
            part = (self._q[tile.rows], k[tile.keys], v[tile.keys])
            if by_kernel:
                result = attend(*part, _additive(self._problem, tile, self._q), tile.causal, self._problem.scale)
            else:
                result = self._plain(*part, tile)
            merge(self._out[tile.rows], self._lse[tile.rows], *result)
        self._empty.add(v, k_chunks)

    def add_result(self, out: Tensor, lse: Tensor, rows: slice) -> None:
        """Merge what another rank has found for some of the rows with keys that do not come here."""
        merge(self._out[:, :, rows], self._lse[:, :, rows], out, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """out [B,H,s,Dv] and lse [B,H,s]; lse is -inf in a row that saw no key."""
        return self._empty.filled(), self._lse

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        problem = self._problem
        scores = Score(problem.score, problem.captures)(plain_scores(q, k, problem.scale), tile.points)
        weights, lse = softmax(_masked(scores, tile))
        if problem.dropout_p > 0:
            weights = weights * dropout_weights(problem.seed, tile.points, problem.dropout_p, weights.dtype)
        return weighted_values(weights, v), lse


class Backward:
    """The gradients of `Forward`, given out and lse over all keys. `dq` is added to as keys come."""

    def __init__(
        self,
        grad_out: Tensor,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        kv_heads: int,
        q_chunks: Sequence[Chunk],
        k_chunks: Sequence[Chunk],
        problem: Problem,
        learned: Sequence[int] = (),
    ) -> None:
        """`learned` are the captures that get a gradient."""
        dtype = accumulate_dtype(q.dtype)
        self._q, self._grad_out, self._lse, self._problem, self._q_chunks = q, grad_out, lse, problem, q_chunks
        self._kv_heads = kv_heads
        self._tiling = Tiling(q, kv_heads, q_chunks, k_chunks, problem)
        self._captures = CaptureGradients(problem.captures, learned, dtype)
        self.dq = q.new_zeros(q.shape, dtype=dtype)
        self._empty = EmptyRowsBackward(self._tiling, q, grad_out, out, lse, self._captures)
        self._out = self._empty.without_nan(out)
        self._by_kernel = problem.serves_kernels() and not learned

    def add(self, k: Tensor, v: Tensor, k_chunks: Sequence[Chunk], dk: Tensor, dv: Tensor) -> None:
        """Add the share of chunks of k and v to dk and dv, in the accumulating dtype."""
        for tile in self._tiling.tiles(k_chunks, plain=not self._by_kernel):
            part = (self._grad_out[tile.rows], self._q[tile.rows], k[tile.keys], v[tile.keys])
            if self._by_kernel:
                rows = (self._out[tile.rows], self._lse[tile.rows])
                additive = _additive(self._problem, tile, self._q)
                shares = attend_backward(*part, *rows, additive, tile.causal, self._problem.scale)
            else:
                shares = self._plain(*part, tile)
            accumulate((self.dq[tile.rows], dk[tile.keys], dv[tile.keys]), shares)
        self._empty.add(k, v, k_chunks, self.dq, dk, dv)

    def given(self) -> tuple[Tensor, Tensor, Tensor]:
        """grad_out, out and lse: what another rank has to know of these rows to find the gradients of its keys."""
        return self._grad_out, self._out, self._lse

    def of_guests(
        self, grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor, q_chunks: Sequence[Chunk], k_chunks: Sequence[Chunk]
    ) -> Backward:
        """The same for rows of another rank, which sees to their sinks and to those without keys; what captures get is counted here."""
        problem = self._problem.for_guests()
        guests = Backward(grad_out, q, out, lse, self._kv_heads, q_chunks, k_chunks, problem, self._captures.learned)
        guests._captures = self._captures
        return guests

    @cached_property
    def _delta(self) -> Tensor:
        """out · grad_out of each row [B,H,s]; the kernels do it themselves."""
        return (self._grad_out.to(self.dq.dtype) * self._out.to(self.dq.dtype)).sum(-1)

    def learned(self) -> list[Tensor]:
        """The gradients of the learned captures, in order: the share of these rows and heads."""
        return self._captures.totals()

    def dsinks(self) -> Tensor:
        """The gradient of the sinks [H]: the share of these rows and heads."""
        sinks, first = self._problem.sinks, self._problem.first_head
        assert sinks is not None
        total = torch.zeros_like(sinks, dtype=self.dq.dtype)
        own = slice(first, first + self._q.shape[1])
        weights = weights_given(sinks[own].to(total.dtype)[:, None, None], self._lse)[..., 0]
        for local, _, rows in self._q_chunks:
            at = (slice(None), slice(None), slice(local, local + rows))
            total[own] -= (weights[at] * self._delta[at]).sum((0, 2))
        return total

    def _plain(self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        problem, lse = self._problem, self._lse[tile.rows]
        score = Score(problem.score, problem.captures)
        scores, pull = score.with_gradient(plain_scores(q, k, problem.scale), tile.points, self._captures)
        weights = _weights(_masked(scores, tile), lse, whole_rows=needs_whole_rows(problem.score))
        grad_out = grad_out.to(weights.dtype)
        grad_weights, dropped = weight_gradient(grad_out, v), weights
        if problem.dropout_p > 0:
            kept = dropout_weights(problem.seed, tile.points, problem.dropout_p, weights.dtype)
            grad_weights, dropped = grad_weights * kept, weights * kept
        grad_scores = pull(weights * (grad_weights - self._delta[tile.rows][..., None]))
        return *score_gradients(grad_scores, q, k, problem.scale), value_gradient(dropped, grad_out, v)


def _nothing_seen(q: Tensor, value_dim: int, problem: Problem) -> tuple[Tensor, Tensor]:
    """Attention to no key at all: out 0 and lse -inf, or that of the sinks alone."""
    dtype = accumulate_dtype(q.dtype)
    out, lse = q.new_zeros((*q.shape[:3], value_dim), dtype=dtype), q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
    if problem.sinks is not None:
        own = problem.sinks[problem.first_head : problem.first_head + q.shape[1]]
        lse.copy_(own.to(dtype)[:, None].expand_as(lse))
    return out, lse


def _weights(scores: Tensor, lse: Tensor, *, whole_rows: bool) -> Tensor:
    """The weights of a tile's scores in the softmax over all keys, of which the lse is given."""
    if not whole_rows:
        return weights_given(scores, lse)
    weights, own_lse = softmax(scores)
    return weights * weights_given(own_lse[..., None], lse)


def _masked(scores: Tensor, tile: Tile) -> Tensor:
    return scores if tile.allowed is None else torch.where(tile.allowed, scores, -torch.inf)


def _additive(problem: Problem, tile: Tile, q: Tensor) -> Tensor | None:
    """What a kernel adds to a tile's scores: the score's other terms, and -inf where masked. Without terms the mask itself, if any."""
    terms = additive_terms(problem.score)
    assert terms is not None
    if not terms:
        return tile.allowed
    additive = q.new_zeros((), dtype=accumulate_dtype(q.dtype))
    for term in terms:
        additive = additive + evaluate_float(term, tile.points, problem.captures).to(additive.dtype)
    if tile.allowed is not None:
        additive = torch.where(tile.allowed, additive, -torch.inf)
    additive = additive[(None,) * (4 - additive.ndim)]
    return additive.expand(*additive.shape[:2], *tile.size).contiguous()
