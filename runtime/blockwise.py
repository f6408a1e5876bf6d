"""Attention of some rows to some keys, block by block: the work that every strategy does between its messages.

Rows and keys come as chunks of the global sequence. Each pair of chunks is cut into as few kernel calls as the mask allows:
empty parts are skipped, full and diagonal parts go to the kernel whole, anything else in tiles whose mask is evaluated on
the spot. Partial results merge by log-sum-exp in float32 (Milakov and Gimelshein, arXiv:1805.02867), so the error does not
grow with the number of blocks or ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import sympy
import torch
from torch import Tensor

from autoseq.runtime.errors import UnsupportedError
from autoseq.runtime.formula import Points, additive_terms, evaluate_float, needs_whole_rows
from autoseq.runtime.kernels import accumulate_dtype, attend, attend_backward
from autoseq.runtime.mask import BlockKind, Mask

TILE = 512  # rows and keys of a tile that needs a mask tensor

Chunk = tuple[int, int, int]
"""(local start, global start, rows): consecutive rows of a local tensor at consecutive global positions."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What does not change from block to block: the mask, its data, and which heads these are.

    `first_head` is the global index of the first query head here and `heads_per_kv` the global ratio H / K: a rank that holds
    an uneven share of heads may start in the middle of a KV head's group.
    """

    mask: Mask
    captures: list[Tensor]
    scale: float
    score: str = ""
    first_head: int = 0
    heads_per_kv: int | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of the score matrix, as offsets into a pair of chunks."""

    q_offset: int
    q_rows: int
    k_offset: int
    k_rows: int
    kind: BlockKind


def forward_chunks(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, q_chunks: list[Chunk], k_chunks: list[Chunk], problem: Problem
) -> None:
    """Merge attention of q's chunks to k's chunks into `out` [B,H,s,Dv] and `lse` [B,H,s], both in the accumulating dtype.

    Start from `new_accumulators`. q is [B,H,s,D], k [B,K,t,D], v [B,K,t,Dv].
    """
    for heads, kv_heads, part in _head_groups(q.shape[1], k.shape[1], problem):
        for block, rows, keys, attn_bias in _calls(q_chunks, k_chunks, part, q, heads):
            at = (slice(None), heads, rows)
            kv = (slice(None), kv_heads, keys)
            block_out, block_lse = attend(q[at], k[kv], v[kv], attn_bias, block.kind is BlockKind.CAUSAL, part.scale)
            merge(out[at], lse[at], block_out, block_lse)


def backward_chunks(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_chunks: list[Chunk],
    k_chunks: list[Chunk],
    problem: Problem,
) -> None:
    """Add the blocks' gradients to `grads`, that is dq, dk, dv in the accumulating dtype. `out`, `lse` are over all keys."""
    dq, dk, dv = grads
    for heads, kv_heads, part in _head_groups(q.shape[1], k.shape[1], problem):
        for block, rows, keys, attn_bias in _calls(q_chunks, k_chunks, part, q, heads):
            at = (slice(None), heads, rows)
            kv = (slice(None), kv_heads, keys)
            causal = block.kind is BlockKind.CAUSAL
            shares = attend_backward(grad_out[at], q[at], k[kv], v[kv], out[at], lse[at], attn_bias, causal, part.scale)
            for total, share in zip((dq[at], dk[kv], dv[kv]), shares, strict=True):
                total.add_(share)


def new_accumulators(q: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Attention to no key at all: out 0 and lse -inf, in the accumulating dtype."""
    dtype = accumulate_dtype(q.dtype)
    out = q.new_zeros((*q.shape[:3], value_dim), dtype=dtype)
    return out, q.new_full(q.shape[:3], -torch.inf, dtype=dtype)


def new_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for dq, dk, dv in the accumulating dtype, contiguous."""
    dtype = accumulate_dtype(q.dtype)
    return q.new_zeros(q.shape, dtype=dtype), k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block's (out, lse) into the accumulators, in place.

    The block's weight is the sigmoid of the difference of the lses, so nothing overflows; where both are -inf it is 0.
    """
    block_lse = block_lse.to(lse.dtype)
    # -inf - -inf is NaN: a block without keys must weigh 0 even in a row that has none so far.
    lead = torch.where(block_lse == -torch.inf, -torch.inf, block_lse - lse)
    out.lerp_(block_out.to(out.dtype), torch.sigmoid(lead)[..., None])
    # Not lse + softplus(lead): with a block far below (a bias of -1e30) that would cancel to nothing.
    lse.copy_(torch.logaddexp(lse, block_lse))


def split(
    mask: Mask, q_start: int, q_rows: int, k_start: int, k_rows: int, *, masked: bool, tile_keys: int | None = None
) -> Iterator[Block]:
    """Cut a rectangle of the score matrix into non-empty blocks, large where the mask is simple.

    `masked` says that every block needs a mask tensor (a predicate or a bias), so no block is larger than a tile:
    TILE rows and keys, or TILE rows and `tile_keys`.
    """
    kind = mask.classify(q_start, q_rows, k_start, k_rows)
    if kind is BlockKind.EMPTY:
        return
    if not masked and kind is not BlockKind.PARTIAL:
        yield Block(0, q_rows, 0, k_rows, kind)
    elif not masked and replace(mask, max_ahead=None).classify(q_start, q_rows, k_start, k_rows) is BlockKind.FULL:
        yield from _split_at_diagonal(mask, q_start, q_rows, k_start, k_rows)
    else:
        yield from _split_into_tiles(mask, q_start, q_rows, k_start, k_rows, masked, tile_keys or TILE)


def _split_at_diagonal(mask: Mask, q_start: int, q_rows: int, k_start: int, k_rows: int) -> Iterator[Block]:
    """For a block that only `max_ahead` cuts: row i sees keys 0 .. i + shift."""
    assert mask.max_ahead is not None
    shift = mask.max_ahead - (k_start - q_start)
    first_row, seen_by_all = max(0, -shift), max(0, shift)
    side = min(q_rows - first_row, k_rows - seen_by_all)
    below = first_row + side
    if seen_by_all:
        yield Block(first_row, q_rows - first_row, 0, seen_by_all, BlockKind.FULL)
    yield Block(first_row, side, seen_by_all, side, BlockKind.CAUSAL)
    if below < q_rows:
        yield Block(below, q_rows - below, seen_by_all, k_rows - seen_by_all, BlockKind.FULL)


def _split_into_tiles(
    mask: Mask, q_start: int, q_rows: int, k_start: int, k_rows: int, masked: bool, tile_keys: int
) -> Iterator[Block]:
    for q_offset in range(0, q_rows, TILE):
        rows = min(TILE, q_rows - q_offset)
        first, count = mask.keys_of(q_start + q_offset, rows, k_start, k_rows)
        full: Block | None = None
        for key in range(first, first + count, tile_keys):
            tile = Block(q_offset, rows, key - k_start, min(tile_keys, first + count - key), BlockKind.PARTIAL)
            kind = mask.classify(q_start + q_offset, rows, key, tile.k_rows)
            if kind is BlockKind.EMPTY:
                continue
            if masked or kind is not BlockKind.FULL:
                yield tile
            elif full is None:
                full = replace(tile, kind=BlockKind.FULL)
            else:
                full = replace(full, k_rows=full.k_rows + tile.k_rows)
        if full is not None:
            yield full


def _calls(
    q_chunks: list[Chunk], k_chunks: list[Chunk], problem: Problem, q: Tensor, heads: slice
) -> Iterator[tuple[Block, slice, slice, Tensor | None]]:
    """The kernel calls for all pairs of chunks: block, local rows, local keys and the mask tensor that it needs."""
    terms = _terms(problem.score)
    masked = bool(problem.mask.predicate) or bool(terms)
    for q_local, q_start, q_rows in q_chunks:
        for k_local, k_start, k_rows in k_chunks:
            tile_keys = k_rows if needs_whole_rows(problem.score) else None
            for block in split(problem.mask, q_start, q_rows, k_start, k_rows, masked=masked, tile_keys=tile_keys):
                allowed, attn_bias = True, None
                if block.kind is BlockKind.PARTIAL:
                    q_at = torch.arange(block.q_rows, device=q.device) + (q_start + block.q_offset)
                    k_at = torch.arange(block.k_rows, device=q.device) + (k_start + block.k_offset)
                    allowed, attn_bias = _tile_mask(problem, q[:, heads], q_at, k_at)
                if allowed:
                    rows = slice(q_local + block.q_offset, q_local + block.q_offset + block.q_rows)
                    keys = slice(k_local + block.k_offset, k_local + block.k_offset + block.k_rows)
                    yield block, rows, keys, attn_bias


def _tile_mask(problem: Problem, q: Tensor, q_at: Tensor, k_at: Tensor) -> tuple[bool, Tensor | None]:
    """Whether anything of a tile is allowed, and its additive mask [B|1, H|1, q, k] if it needs one."""
    heads = range(problem.first_head, problem.first_head + q.shape[1])
    points = Points.of(q.shape[0], heads, q_at, k_at)
    allowed = problem.mask.allowed(points, problem.captures)
    # Looking at the values would make a GPU wait; there the mask is simply used.
    if allowed is not None and q.device.type == "cpu":
        if not bool(allowed.any()):
            return False, None
        if bool(allowed.all()):
            allowed = None
    terms = _terms(problem.score)
    if allowed is None and not terms:
        return True, None
    additive = q.new_zeros((), dtype=accumulate_dtype(q.dtype))
    for term in terms:
        additive = additive + evaluate_float(term, points, problem.captures).to(additive.dtype)
    if allowed is not None:
        additive = torch.where(allowed, additive, -torch.inf)
    additive = additive[(None,) * (4 - additive.ndim)]
    return True, additive.expand(*additive.shape[:2], len(q_at), len(k_at)).contiguous()


def _terms(score: str) -> tuple[sympy.Basic, ...]:
    terms = additive_terms(score)
    if terms is None:
        raise UnsupportedError(f"The score {score!r} is not a sum of the plain score and other terms.")
    return terms


def _head_groups(num_heads: int, num_kv_heads: int, problem: Problem) -> Iterator[tuple[slice, slice, Problem]]:
    """Runs of local heads that a grouped kernel can take: equally many query heads for each KV head of the run."""
    if num_heads == 0 or num_kv_heads == 0:
        return
    ratio = problem.heads_per_kv or num_heads // num_kv_heads
    first, end = problem.first_head, problem.first_head + num_heads
    first_kv = first // ratio
    cut, last_cut = min(end, -(-first // ratio) * ratio), max(first, end // ratio * ratio)
    bounds = sorted({first, cut, last_cut, end})
    for start, stop in pairwise(bounds):
        heads = slice(start - first, stop - first)
        kv_heads = slice(start // ratio - first_kv, (stop - 1) // ratio + 1 - first_kv)
        yield heads, kv_heads, replace(problem, first_head=start)
