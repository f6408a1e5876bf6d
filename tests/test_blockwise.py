"""Attention block by block: the cuts cover the mask exactly, and partial results merge without loss."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_job import assemble, shard
from autoseq.runtime import aten_kernels, blocks, blockwise
from autoseq.runtime import mask as mask_module
from autoseq.runtime.blocks import Chunk, rectangles, split
from autoseq.runtime.blockwise import Backward, Forward, merge
from autoseq.runtime.layout import Layout, chunk_ranges, local_length
from autoseq.runtime.mask import BlockKind, Mask
from autoseq.runtime.tiles import Problem
from dense_attention import MASKS, SCORES, Case, check_close, dense_attention, kinds_beside

TOLERANCE = 1e-12  # float64; only the order of summation differs

BOUND = st.one_of(st.none(), st.integers(-9, 9))
EXTENT = st.tuples(st.integers(0, 12), st.integers(0, 12))


@settings(deadline=None, max_examples=400, derandomize=True)
@given(BOUND, BOUND, EXTENT, EXTENT, st.booleans())
def test_blocks_cover_the_mask_once(
    max_ahead: int | None, max_behind: int | None, queries: tuple[int, int], keys: tuple[int, int], tiled: bool
) -> None:
    """Every allowed pair is in exactly one block, and a block without a mask tensor holds nothing else."""
    mask = Mask(max_ahead=max_ahead, max_behind=max_behind)
    q, k = torch.arange(queries[0], sum(queries))[:, None], torch.arange(keys[0], sum(keys))
    allowed = torch.ones(queries[1], keys[1], dtype=torch.bool)
    allowed &= True if max_ahead is None else k - q <= max_ahead
    allowed &= True if max_behind is None else q - k <= max_behind
    covered = torch.zeros_like(allowed, dtype=torch.int64)
    with patch.object(blocks, "TILE", 4):
        found = list(split(mask, *queries, *keys, tiled=tiled))
    for block in found:
        rows = slice(block.q_offset, block.q_offset + block.q_rows)
        cols = slice(block.k_offset, block.k_offset + block.k_rows)
        part = allowed[rows, cols]
        assert part.shape == (block.q_rows, block.k_rows), "inside the chunks"
        assert not tiled or block.kind is not BlockKind.CAUSAL
        assert max(part.shape) <= 4 or not (tiled or block.kind is BlockKind.PARTIAL), "a tensor of scores is never larger than a tile"
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
    assert sorted(each.kind for each in split(mask, *block, tiled=False)) == sorted(kinds)


CASES = {
    **{mask: Case(13, 17, mask=mask) for mask in MASKS},
    **{score: Case(13, 17, mask="segments", score=score) for score in SCORES},
    "sinks": Case(13, 17, mask="key padding", has_sinks=True),
    "dropout": Case(13, 17, mask="window", dropout_p=0.4),
    "everything at once": Case(13, 17, mask="prefix", score="two captures that learn", has_sinks=True, dropout_p=0.3, empty_rows="uniform"),
    **{
        f"{kind} in rows without keys, {mask}, {score}, dropout {p}": Case(13, 17, mask=mask, score=score, empty_rows=kind, dropout_p=p)
        for kind in ("nan", "uniform", "nan_fill", "uniform_fill")
        for mask in ("only the future", "key padding", "every key masked")
        for score, p in (("plain", 0), ("ALiBi with slopes that learn", 0.3))
    },
}


@pytest.mark.parametrize("tile", [3, 512])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chunks_in_any_order(case: Case, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys in zigzag-like chunks, with unused rows between them; keys come in two steps."""
    monkeypatch.setattr(blocks, "TILE", tile)
    case = replace(case, batch=2, kv_heads=2, value_dim=5)
    q_at, q_chunks = [8, 9, 10, 11, 12, None, *range(8)], [(0, 8, 5), (6, 0, 8)]
    k_at, k_chunks = [*range(5, 17), None, None, *range(5)], [(0, 5, 12), (14, 0, 5)]
    if case.score == "a dense float mask":  # its rows are not to be cut
        k_at, k_chunks = [None, *range(17)], [(1, 0, 17)]
    q, k, v, grad = case.tensors()
    q, grad, k, v = place(q, q_at), place(grad, q_at), place(k, k_at), place(v, k_at)
    problem = case.problem()
    forward = Forward(q, 2, case.value_dim, q_chunks, k_chunks, problem)
    for chunk in k_chunks:
        forward.add(k, v, [chunk])
    out, lse = forward.result()
    backward = Backward(grad, q, out, lse, 2, q_chunks, k_chunks, problem, case.learned())
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for chunk in reversed(k_chunks):
        backward.add(k, v, [chunk], dk, dv)
    results = [take(x, at) for x, at in zip((out, backward.dq, dk, dv), (q_at, q_at, k_at, k_at), strict=True)]
    results += backward.learned() + ([backward.dsinks()] if case.has_sinks else [])
    check_close(tuple(results), dense_attention(case), TOLERANCE)


def undecided(
    _: str, captures: list[Tensor], batch: int, heads: range, q_spans: list[object], k_spans: list[object]
) -> tuple[Tensor, Tensor]:
    """In the place of `prove`: every tile is to be evaluated."""
    nothing = torch.zeros(1, len(q_spans), len(k_spans), dtype=torch.bool)
    return nothing, nothing


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_device_is_not_waited_for(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device what looks at a value fails, and so does what mixes devices.

    Left are one look at the captures before anything runs, and one at whether any row was empty.
    """
    problem, learned = case.problem(), case.learned()
    sinks, seed = (None if x is None else x.to("meta") for x in (problem.sinks, problem.seed))
    problem = replace(problem, captures=[c.to("meta") for c in problem.captures], sinks=sinks, seed=seed)
    q, k, v, grad = (x.to("meta") for x in replace(case, kv_heads=2).tensors())
    q_chunks, k_chunks, looks = [(0, 0, 13)], [(0, 0, 17)], []
    monkeypatch.setattr(blocks, "TILE", 5)
    monkeypatch.setattr(blocks, "prove", undecided)
    # `append` returns nothing: the captures hold no infinity. Then: some row was empty.
    monkeypatch.setattr(Tensor, "__bool__", lambda x: bool(looks.append(x)))
    forward = Forward(q, 2, 8, q_chunks, k_chunks, problem)
    forward.add(k, v, k_chunks)
    out, lse = forward.result()
    monkeypatch.setattr(Tensor, "__bool__", lambda x: not looks.append(x))
    backward = Backward(grad, q, out, lse, 2, q_chunks, k_chunks, problem, learned)
    backward.add(k, v, k_chunks, torch.zeros_like(k), torch.zeros_like(v))
    results = [out, backward.dq, *backward.learned(), *([backward.dsinks()] if case.has_sinks else [])]
    assert all(x.device.type == "meta" for x in results)
    assert len(looks) <= len(case.score_case().captures) + 1


@st.composite
def drawn_cases(draw: st.DrawFn) -> tuple[Case, int, int, Layout]:
    """A case, the size of a tile, the number of ranks that are played and their layout."""
    kv_heads = draw(st.integers(1, 2))
    score = draw(st.sampled_from([score for score in SCORES if score != "a dense float mask"]))
    case = Case(
        draw(st.integers(1, 20)),
        draw(st.integers(1, 20)),
        mask=draw(st.sampled_from(sorted(MASKS))),
        score=score,
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 5)),
        value_dim=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 99)),
        has_sinks=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0, 0.3])),
        empty_rows=draw(st.sampled_from(kinds_beside(score))),
    )
    return case, draw(st.sampled_from([1, 2, 4, 7, 512])), draw(st.integers(1, 3)), draw(st.sampled_from(["contiguous", "zigzag"]))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(drawn_cases())
def test_random_attention(drawn: tuple[Case, int, int, Layout]) -> None:
    """Every rank's rows, one after the other in one process, so that tiles of any size can be tried."""
    case, tile, P, layout = drawn
    q, k, v, grad = case.tensors()
    q, grad = (shard_all(x, P, layout, "edge") for x in (q, grad))
    k, v = (shard_all(x, P, layout, "nan") for x in (k, v))
    problem, k_chunks = case.problem(), [chunks_of(rank, P, case.k_len, layout) for rank in range(P)]
    every, results = [chunk for chunks in k_chunks for chunk in chunks], []
    dks, dvs = [torch.zeros_like(x) for x in k], [torch.zeros_like(x) for x in v]
    with patch.object(blocks, "TILE", tile):
        for rank, (query, grad_out) in enumerate(zip(q, grad, strict=True)):
            rows = chunks_of(rank, P, case.q_len, layout)
            forward = Forward(query, case.kv_heads, case.value_dim, rows, every, problem)
            for keys, values, chunks in zip(k, v, k_chunks, strict=True):
                forward.add(keys, values, chunks)
            out, lse = forward.result()
            backward = Backward(grad_out, query, out, lse, case.kv_heads, rows, every, problem, case.learned())
            for keys, values, chunks, dk, dv in zip(k, v, k_chunks, dks, dvs, strict=True):
                backward.add(keys, values, chunks, dk, dv)
            results.append((out, backward.dq, *backward.learned(), *([backward.dsinks()] if case.has_sinks else [])))
    outs, dqs, *shares = zip(*results, strict=True)
    whole = [assemble(list(x), n, layout) for x, n in ((outs, case.q_len), (dqs, case.q_len), (dks, case.k_len), (dvs, case.k_len))]
    check_close((*whole, *(torch.stack(x).sum(0) for x in shares)), dense_attention(case), 1e-10)


def chunks_of(rank: int, P: int, n: int, layout: Layout) -> list[Chunk]:
    return [chunk for chunk in chunk_ranges(rank, P, local_length(n, P, layout), n, layout) if chunk[2] > 0]


def shard_all(x: Tensor, P: int, layout: Layout, padding: str) -> list[Tensor]:
    return [shard(x, rank, P, layout, padding=padding) for rank in range(P)]


def test_the_masks_of_a_window_are_made_once() -> None:
    """Of 19 tiles, of which ten lie alike and nine, in two stages of heads both ways: the masks, and what the kernel makes of them."""
    case = Case(40, 40, mask="window", heads=2, kv_heads=2)
    *tensors, grad = case.tensors()
    rows = [(0, 0, 40)]
    mask_module._within_bounds.cache_clear()
    with (
        patch.object(blocks, "TILE", 4),
        patch.object(aten_kernels, "added", wraps=aten_kernels.added) as added,
        patch.object(aten_kernels, "without_keys", wraps=aten_kernels.without_keys) as without_keys,
    ):
        for head in range(2):
            q, k, v = (x[:, head : head + 1] for x in tensors)
            problem = case.problem(first_head=head)
            forward = Forward(q, 1, case.value_dim, rows, rows, problem)
            forward.add(k, v, rows)
            backward = Backward(grad[:, head : head + 1], q, *forward.result(), 1, rows, rows, problem)
            backward.add(k, v, rows, torch.zeros_like(k), torch.zeros_like(v))
    kept = mask_module._within_bounds.cache_info()
    assert (kept.misses, kept.hits) == (2, 4 * 19 - 2)
    assert (added.call_count, without_keys.call_count) == (2, 2)


def test_masks_larger_than_a_tile_are_not_kept() -> None:
    """A score that needs whole rows has blocks of all keys."""
    case = Case(40, 40, mask="window", score="a dense float mask", heads=1, kv_heads=1)
    (q, k, v, _), rows = case.tensors(), [(0, 0, 40)]
    kept = mask_module._within_bounds
    with patch.object(blocks, "TILE", 4), patch.object(mask_module, "_within_bounds", wraps=kept) as asked:
        Forward(q, 1, case.value_dim, rows, rows, case.problem()).add(k, v, rows)
    assert all(q_rows * k_rows <= 4 * 4 for *_, q_rows, k_rows in (call.args for call in asked.call_args_list))


@pytest.mark.parametrize(("first", "count"), [(0, 9), (0, 4), (4, 5), (1, 1), (1, 4), (3, 3), (2, 0)])
def test_any_run_of_grouped_heads(first: int, count: int) -> None:
    """A rank's heads may start and end within a KV head's group: 9 heads, 3 for each KV head."""
    case = Case(6, 6, mask="head dependent", heads=9, kv_heads=3)
    q, k, v, _ = case.tensors()
    first_kv, last_kv = first // 3, -(-(first + count) // 3)
    problem = case.problem(first_head=first)
    mine = q[:, first : first + count]
    kv, rows = slice(first_kv, last_kv if count else first_kv), [(0, 0, 6)]
    forward = Forward(mine, kv.stop - kv.start, case.value_dim, rows, rows, problem)
    forward.add(k[:, kv], v[:, kv], rows)
    torch.testing.assert_close(forward.result()[0], dense_attention(case)[0][:, first : first + count], rtol=TOLERANCE, atol=TOLERANCE)


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


SAME = "Eq(c0(b, q), c0(b, k))"
DOCUMENTS = torch.arange(4).repeat_interleave(8)[None]
KEPT = torch.arange(32)[None] < 20

# Mask and what it looks up; then the rows and keys of each kernel call on 32 rows in tiles of 8, and what it is told of the mask.
PREDICATES: dict[str, tuple[Mask, list[Tensor], list[tuple[int, int, str]]]] = {
    "documents of a tile: those on the diagonal": (Mask(predicate=SAME), [DOCUMENTS], [(8, 8, "full")] * 4),
    "documents of two tiles: one call each": (Mask(predicate=SAME), [DOCUMENTS // 2], [(16, 16, "full")] * 2),
    "causal documents of two tiles: one causal call each": (Mask(0, None, SAME), [DOCUMENTS // 2], [(16, 16, "causal")] * 2),
    "one causal document": (Mask(0, None, SAME), [DOCUMENTS * 0], [(32, 32, "causal")]),
    "chunks of two tiles": (Mask(predicate="Eq(floor(q/16), floor(k/16))"), [], [(16, 16, "full")] * 2),
    "key padding: tiles with both are evaluated": (
        Mask(predicate="Ne(c0(b, k), 0)"), [KEPT], [(32, 16, "full"), *[(8, 8, "masked")] * 4]
    ),
    "a prefix of a tile": (
        Mask(predicate="(k <= q) | (k < 8)"), [], [(16, 8, "full"), (8, 16, "full"), (8, 24, "full")] + [(8, 8, "masked")] * 3
    ),
    "the same by a tensor nobody can bound": (
        Mask(predicate="Ne(c0(q, k), 0)"), [(torch.arange(32)[:, None] // 16 == torch.arange(32) // 16)], [(8, 8, "full")] * 8
    ),
}  # fmt: skip


@pytest.mark.parametrize(("mask", "captures", "expected"), PREDICATES.values(), ids=PREDICATES)
def test_kernel_calls_of_a_predicate(mask: Mask, captures: list[Tensor], expected: list[tuple[int, int, str]]) -> None:
    """What is proven empty is left out, what is proven full goes without a mask and together with its neighbours."""
    q, rows = torch.randn(1, 1, 32, 4), [(0, 0, 32)]
    with patch.object(blocks, "TILE", 8), patch.object(blockwise, "attend", wraps=blockwise.attend) as attend:
        Forward(q, 1, 4, rows, rows, Problem(mask, captures, 1.0)).add(q, q, rows)
    calls = [call.args for call in attend.call_args_list]
    told = ["masked" if bias is not None else "causal" if causal else "full" for *_, bias, causal, _ in calls]
    found = [(q.shape[2], k.shape[2], mask) for (q, k, *_), mask in zip(calls, told, strict=True)]
    assert sorted(found) == sorted(expected)


RECTANGLES = {
    "nothing": ([[False, False]], []),
    "everything: one": ([[True] * 3] * 2, [(range(2), range(3))]),
    "documents: a square each": (
        [[True, True, False], [True, True, False], [False, False, True]],
        [(range(2), range(2)), (range(2, 3), range(2, 3))],
    ),
    "a staircase: one a row": ([[True, False], [True, True]], [(range(1), range(1)), (range(1, 2), range(2))]),
    "two runs of a row": ([[True, False, True]] * 2, [(range(2), range(1)), (range(2), range(2, 3))]),
}


@pytest.mark.parametrize(("full", "expected"), RECTANGLES.values(), ids=RECTANGLES)
def test_rectangles(full: list[list[bool]], expected: list[tuple[range, range]]) -> None:
    assert sorted(rectangles(full), key=str) == sorted(expected, key=str)


def place(x: Tensor, at: list[int | None]) -> Tensor:
    """Rows of x in the given order; NaN where there is none, which nothing may read."""
    rows = x[:, :, [position or 0 for position in at]]
    return rows.masked_fill(torch.tensor([position is None for position in at])[:, None], torch.nan)


def take(x: Tensor, at: list[int | None]) -> Tensor:
    """Rows back in global order."""
    order = sorted((position, i) for i, position in enumerate(at) if position is not None)
    return x[:, :, [i for _, i in order]]
