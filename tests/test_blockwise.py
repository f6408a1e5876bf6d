"""Attention block by block: the cuts cover the mask exactly, and partial results merge without loss."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoseq.runtime import blockwise
from autoseq.runtime.blockwise import Problem, backward_chunks, forward_chunks, merge, new_accumulators, new_gradients, split
from autoseq.runtime.mask import BlockKind, Mask
from dense_attention import MASKS, Case, check_close, dense_attention

TOLERANCE = 1e-12  # float64; only the order of summation differs

BOUND = st.one_of(st.none(), st.integers(-9, 9))
EXTENT = st.tuples(st.integers(0, 12), st.integers(0, 12))


@settings(deadline=None, max_examples=400, derandomize=True)
@given(BOUND, BOUND, EXTENT, EXTENT, st.booleans())
def test_blocks_cover_the_mask_once(
    max_ahead: int | None, max_behind: int | None, queries: tuple[int, int], keys: tuple[int, int], masked: bool
) -> None:
    """Every allowed pair is in exactly one block, and a block without a mask tensor holds nothing else."""
    mask = Mask(max_ahead=max_ahead, max_behind=max_behind)
    q, k = torch.arange(queries[0], sum(queries))[:, None], torch.arange(keys[0], sum(keys))
    allowed = torch.ones(queries[1], keys[1], dtype=torch.bool)
    allowed &= True if max_ahead is None else k - q <= max_ahead
    allowed &= True if max_behind is None else q - k <= max_behind
    covered = torch.zeros_like(allowed, dtype=torch.int64)
    with patch.object(blockwise, "TILE", 4):
        blocks = list(split(mask, *queries, *keys, masked=masked))
    for block in blocks:
        rows = slice(block.q_offset, block.q_offset + block.q_rows)
        cols = slice(block.k_offset, block.k_offset + block.k_rows)
        part = allowed[rows, cols]
        assert part.shape == (block.q_rows, block.k_rows), "inside the chunks"
        assert not masked or block.kind is BlockKind.PARTIAL
        assert block.kind is not BlockKind.PARTIAL or max(part.shape) <= 4, "a mask tensor is never larger than a tile"
        inside = {BlockKind.FULL: torch.ones_like(part), BlockKind.CAUSAL: torch.ones_like(part).tril()}.get(block.kind, part)
        assert (part == inside).all(), block
        covered[rows, cols] += inside
    assert torch.equal(covered, allowed.long())


# Mask, first query, queries, first key, keys, then the kinds of the kernel calls.
CALLS = {
    "nothing masked: one call": (Mask(), (0, 5000, 0, 5000), ["full"]),
    "causal: one call": (Mask(max_ahead=0), (0, 5000, 0, 5000), ["causal"]),
    "causal, the past: one call": (Mask(max_ahead=0), (5000, 5000, 0, 5000), ["full"]),
    "causal, the future: none": (Mask(max_ahead=0), (0, 5000, 5000, 5000), []),
    "causal, more keys: two calls": (Mask(max_ahead=1000), (0, 5000, 0, 6000), ["full", "causal"]),
    "causal, fewer keys: two calls": (Mask(max_ahead=0), (0, 5000, 0, 3000), ["causal", "full"]),
    "a window wider than the chunk: as causal": (Mask(max_ahead=0, max_behind=9000), (0, 5000, 0, 5000), ["causal"]),
    "a window of one tile: two tiles a row of tiles": (Mask(max_ahead=0, max_behind=511), (512, 512, 0, 1024), ["partial"] * 2),
    "a wide window: the middle is one call": (Mask(max_ahead=0, max_behind=4095), (8192, 512, 0, 9000), ["partial"] * 2 + ["full"]),
}


@pytest.mark.parametrize(("mask", "block", "kinds"), CALLS.values(), ids=CALLS)
def test_kernel_calls(mask: Mask, block: tuple[int, int, int, int], kinds: list[str]) -> None:
    assert sorted(each.kind for each in split(mask, *block, masked=False)) == sorted(kinds)


@pytest.mark.parametrize("tile", [3, 512])
@pytest.mark.parametrize("mask", MASKS)
def test_chunks_in_any_order(mask: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys in zigzag-like chunks, with unused rows between them."""
    monkeypatch.setattr(blockwise, "TILE", tile)
    case = Case(13, 17, mask=mask, batch=2, heads=4, kv_heads=2, value_dim=5)
    q_at, q_chunks = [8, 9, 10, 11, 12, None, *range(8)], [(0, 8, 5), (6, 0, 8)]
    k_at, k_chunks = [*range(5, 17), None, None, *range(5)], [(0, 5, 12), (14, 0, 5)]
    q, k, v, grad = case.tensors()
    q, grad, k, v = place(q, q_at), place(grad, q_at), place(k, k_at), place(v, k_at)
    masked = case.mask_case()
    problem = Problem(masked.mask(), masked.captures, case.scale, masked.score)

    out, lse = new_accumulators(q, case.value_dim)
    forward_chunks(out, lse, q, k, v, q_chunks, k_chunks, problem)
    grads = new_gradients(q, k, v)
    backward_chunks(grads, grad, q, k, v, out, lse, q_chunks, k_chunks, problem)
    results = [take(x, at) for x, at in zip((out, *grads), (q_at, q_at, k_at, k_at), strict=True)]
    check_close(tuple(results), dense_attention(case), TOLERANCE)


@pytest.mark.parametrize(("first", "count"), [(0, 9), (0, 4), (4, 5), (1, 1), (1, 4), (3, 3), (2, 0)])
def test_any_run_of_grouped_heads(first: int, count: int) -> None:
    """A rank's heads may start and end within a KV head's group: 9 heads, 3 for each KV head."""
    case = Case(6, 6, mask="head dependent", heads=9, kv_heads=3)
    q, k, v, _ = case.tensors()
    masked, first_kv, last_kv = case.mask_case(), first // 3, -(-(first + count) // 3)
    problem = Problem(masked.mask(), [], case.scale, first_head=first, heads_per_kv=3)
    mine = q[:, first : first + count]
    out, lse = new_accumulators(mine, case.value_dim)
    kv = slice(first_kv, last_kv if count else first_kv)
    forward_chunks(out, lse, mine, k[:, kv], v[:, kv], [(0, 0, 6)], [(0, 0, 6)], problem)
    torch.testing.assert_close(out, dense_attention(case)[0][:, first : first + count], rtol=TOLERANCE, atol=TOLERANCE)


# lse so far, lse of the block, expected weight of the block
MERGES = {
    "both see nothing": (-torch.inf, -torch.inf, 0.0),
    "the block sees nothing": (1.0, -torch.inf, 0.0),
    "nothing seen before": (-torch.inf, 1.0, 1.0),
    "equal": (2.0, 2.0, 0.5),
    "far above: exp would overflow": (0.0, 5000.0, 1.0),
    "far below": (5000.0, 0.0, 0.0),
    "below by the lowest bias": (3.0, torch.finfo(torch.float32).min, 0.0),
    "above the lowest bias": (torch.finfo(torch.float32).min, 3.0, 1.0),
}


@pytest.mark.parametrize(("before", "block", "weight"), MERGES.values(), ids=MERGES)
def test_merge(before: float, block: float, weight: float) -> None:
    out, lse = torch.full((1, 1, 1, 2), 10.0), torch.full((1, 1, 1), before)
    merge(out, lse, torch.full((1, 1, 1, 2), 20.0), torch.full((1, 1, 1), block))
    torch.testing.assert_close(out, torch.full((1, 1, 1, 2), 10.0 + 10.0 * weight))
    torch.testing.assert_close(lse, torch.logaddexp(torch.tensor(before), torch.tensor(block)).view(1, 1, 1))


def test_empty_tiles_of_a_predicate_are_not_computed() -> None:
    """Documents of one tile each: only the tiles on the diagonal reach the kernel."""
    doc = torch.arange(4).repeat_interleave(8)[None]
    q = torch.randn(1, 1, 32, 4)
    problem = Problem(Mask(predicate="Eq(c0(b, q), c0(b, k))"), [doc], 1.0)
    with patch.object(blockwise, "TILE", 8), patch.object(blockwise, "attend", wraps=blockwise.attend) as attend:
        forward_chunks(*new_accumulators(q, 4), q, q, q, [(0, 0, 32)], [(0, 0, 32)], problem)
    assert attend.call_count == 4
    assert all(call.args[3] is None for call in attend.call_args_list), "a tile that is allowed whole needs no mask tensor"


def place(x: Tensor, at: list[int | None]) -> Tensor:
    """Rows of x in the given order; NaN where there is none, which nothing may read."""
    rows = x[:, :, [position or 0 for position in at]]
    return rows.masked_fill(torch.tensor([position is None for position in at])[:, None], torch.nan)


def take(x: Tensor, at: list[int | None]) -> Tensor:
    """Rows back in global order."""
    order = sorted((position, i) for i, position in enumerate(at) if position is not None)
    return x[:, :, [i for _, i in order]]
