"""Masks: what the bounds decide without data, and what a predicate allows, against the mask written out densely."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoseq.runtime import mask as mask_module
from autoseq.runtime.errors import UnsupportedError
from autoseq.runtime.formula import Points, evaluate, parse
from autoseq.runtime.mask import BlockKind, Mask

CAUSAL = Mask(max_ahead=0)
WINDOW = Mask(max_ahead=0, max_behind=9)

# Mask, then the block: first query, queries, first key, keys.
KINDS = {
    "no mask: full": (Mask(), (0, 8, 0, 8), "full"),
    "no rows: empty": (Mask(), (0, 0, 0, 8), "empty"),
    "no keys: empty": (Mask(), (0, 8, 0, 0), "empty"),
    "causal, keys in the past: full": (CAUSAL, (8, 8, 0, 8), "full"),
    "causal, keys in the future: empty": (CAUSAL, (0, 8, 8, 8), "empty"),
    "causal, on the diagonal: causal": (CAUSAL, (8, 8, 8, 8), "causal"),
    "causal, one element on the diagonal: full": (CAUSAL, (8, 1, 8, 1), "full"),
    "causal, last key is the first query: full": (CAUSAL, (8, 8, 1, 8), "full"),
    "causal, off the diagonal by one: partial": (CAUSAL, (8, 8, 7, 8), "partial"),
    "causal, on the diagonal but not square: partial": (CAUSAL, (8, 8, 8, 7), "partial"),
    "causal with an offset, on its diagonal: causal": (Mask(max_ahead=3), (0, 8, 3, 8), "causal"),
    "causal with an offset, first key just hidden: empty": (Mask(max_ahead=3), (0, 8, 11, 8), "empty"),
    "causal with an offset, first key just seen: partial": (Mask(max_ahead=3), (0, 8, 10, 8), "partial"),
    "window, all keys inside: full": (WINDOW, (8, 4, 4, 5), "full"),
    "window, on the diagonal and inside: causal": (WINDOW, (8, 8, 8, 8), "causal"),
    "window, too far behind: empty": (WINDOW, (18, 4, 0, 9), "empty"),
    "window, last key just inside: partial": (WINDOW, (18, 4, 0, 10), "partial"),
    "window, diagonal larger than the window: partial": (WINDOW, (0, 16, 0, 16), "partial"),
    "only the future, keys in the past: empty": (Mask(max_behind=-1), (8, 4, 0, 9), "empty"),
    "only the future, keys in the future: full": (Mask(max_behind=-1), (0, 4, 4, 4), "full"),
}


@pytest.mark.parametrize(("mask", "block", "kind"), KINDS.values(), ids=KINDS)
def test_kind_of_a_block(mask: Mask, block: tuple[int, int, int, int], kind: str) -> None:
    assert mask.classify(*block) == kind


BOUND = st.one_of(st.none(), st.integers(-12, 12))
BLOCK = st.tuples(st.integers(0, 12), st.integers(0, 8), st.integers(0, 12), st.integers(0, 8))


def dense(mask: Mask, block: tuple[int, int, int, int]) -> Tensor:
    q = torch.arange(block[0], block[0] + block[1])[:, None]
    k = torch.arange(block[2], block[2] + block[3])
    ahead = torch.full((block[1], block[3]), True) if mask.max_ahead is None else k - q <= mask.max_ahead
    return ahead if mask.max_behind is None else ahead & (q - k <= mask.max_behind)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(BOUND, BOUND, BLOCK)
def test_kinds_agree_with_the_dense_mask(max_ahead: int | None, max_behind: int | None, block: tuple[int, int, int, int]) -> None:
    mask = Mask(max_ahead=max_ahead, max_behind=max_behind)
    allowed, kind = dense(mask, block), mask.classify(*block)
    tril = torch.ones_like(allowed).tril()
    assert kind is not BlockKind.EMPTY or not allowed.any()
    assert kind is not BlockKind.FULL or allowed.all()
    assert kind is not BlockKind.CAUSAL or (allowed == tril).all()
    first, rows = mask.keys_of(*block)
    outside = torch.arange(block[2], block[2] + block[3])
    outside = (outside < first) | (outside >= first + rows)
    assert not allowed[:, outside].any(), "a key outside keys_of is allowed"


DOC = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 2, 2]])
KEPT = torch.tensor([[True, True, True, False, True, True], [False, True, True, True, True, False]])
PER_PAIR = torch.arange(36).view(6, 6) % 5
PER_HEAD = torch.arange(2 * 3 * 36).view(2, 3, 6, 6) % 7

b, h = torch.arange(2)[:, None, None, None], torch.arange(3)[:, None, None]
q, k = torch.arange(6)[:, None], torch.arange(6)

PREDICATES = {
    "comparison": ("k <= q", [], k <= q),
    "and, or, not": ("((k <= q) & ~Eq(k, 2)) | (k > 4)", [], ((k <= q) & (k != 2)) | (k > 4)),
    "exclusive or": ("Xor(k < 3, q < 3)", [], (k < 3) ^ (q < 3)),
    "a captured table of documents": ("Eq(c0(b, q), c0(b, k))", [DOC], (DOC[:, :, None] == DOC[:, None, :])[:, None]),
    "a captured boolean": ("Ne(c0(b, k), 0)", [KEPT], KEPT[:, None, None, :]),
    "a captured float": ("Eq(c0(b, k), 0.5) | (c0(b, k) > 1)", [DOC * 0.75 - 0.25], ((DOC == 1) | (DOC == 2))[:, None, None]),
    "two captures": ("Eq(c0(b,q), c0(b,k)) & Ne(c1(b,k), 0)", [DOC, KEPT], ((DOC[:, :, None] == DOC[:, None]) & KEPT[:, None])[:, None]),
    "a capture over queries and keys": ("c0(q, k) >= 2", [PER_PAIR], PER_PAIR >= 2),
    "a capture over everything": ("c0(b, h, q, k) < 3", [PER_HEAD], PER_HEAD < 3),
    "an index that is computed": ("c0(b, Min(k + 1, 5)) < 2", [DOC], (DOC[:, (k + 1).clamp(max=5)] < 2)[:, None, None]),
    "chunks by floor division": ("Eq(q//4, k//4)", [], q // 4 == k // 4),
    "floor division of negative numbers": ("(k - q)//3 >= -1", [], (k - q) // 3 >= -1),
    "floor division as torch prints it": ("Eq(FloorDiv(q, 4), FloorDiv(k, 4))", [], q // 4 == k // 4),
    "modulo of negative numbers": ("Eq(Mod(k - q, 3), 1)", [], (k - q) % 3 == 1),
    "an exact fraction": ("Eq(q/3, k)", [], q == 3 * k),
    "ceiling": ("Eq(ceiling(q/4), 1)", [], (q >= 1) & (q <= 4) & (k >= 0)),
    "absolute distance": ("Abs(q - k) <= 2", [], (q - k).abs() <= 2),
    "minimum and maximum": ("Max(q, 3) >= Min(k, 4)", [], q.clamp(min=3) >= k.clamp(max=4)),
    "a choice": ("ITE(h < 1, k <= q, k >= q)", [], torch.where(h < 1, k <= q, k >= q)),
    "piecewise": ("Piecewise((q, k < 3), (k, True)) > 2", [], torch.where(k < 3, q, k) > 2),
    "the head": ("Eq(h, 1) | (k <= q)", [], (h == 1) | (k <= q)),
    "the batch element": ("(k <= q) | Eq(b, 1)", [], (k <= q) | (b == 1)),
    "always": ("True", [], torch.tensor(True)),
}


@pytest.mark.parametrize(("predicate", "captures", "expected"), PREDICATES.values(), ids=PREDICATES)
def test_predicate(predicate: str, captures: list[Tensor], expected: Tensor) -> None:
    points = Points.of(2, range(3), torch.arange(6), torch.arange(6))
    allowed = evaluate(predicate, points, captures)
    assert allowed.dtype == torch.bool
    assert torch.equal(allowed.expand(2, 3, 6, 6), expected.expand(2, 3, 6, 6))


def test_floor_division_is_exact() -> None:
    """49 * (1/49) is less than 1 in floating point, so a floor of a product would put position 49 in the wrong chunk."""
    positions = torch.arange(100_000)
    points = Points.of(1, range(1), positions, torch.zeros(1, dtype=torch.int64))
    for size in (3, 10, 49, 103):
        assert torch.equal(evaluate(f"Eq(q//{size}, c0(q))", points, [positions // size]).flatten(), torch.ones(100_000).bool())


@pytest.mark.parametrize("heads", [range(2), range(1, 3)], ids=["first heads", "later heads"])
def test_a_predicate_sees_global_heads(heads: range) -> None:
    points = Points.of(1, heads, torch.arange(1), torch.arange(1))
    assert evaluate("Eq(h, 1)", points, []).flatten().tolist() == [head == 1 for head in heads]


def test_a_term_without_queries_stays_small() -> None:
    """Key padding costs B x k elements, not B x H x q x k."""
    points = Points.of(2, range(3), torch.arange(6), torch.arange(6))
    assert evaluate("Ne(c0(b, k), 0)", points, [KEPT]).shape == (2, 1, 1, 6)


def test_bounds_and_predicate_together() -> None:
    points = Points.of(2, range(3), torch.arange(6), torch.arange(6))
    allowed = Mask(max_ahead=0, max_behind=2, predicate="Ne(c0(b, k), 0)").allowed(points, [KEPT])
    assert allowed is not None
    assert torch.equal(allowed, ((k <= q) & (q - k <= 2) & KEPT[:, None, :])[:, None])
    assert Mask().allowed(points, []) is None


@settings(deadline=None, max_examples=200, derandomize=True)
@given(BOUND, st.integers(-12, 12), BLOCK, st.integers(0, 99))
def test_a_tile_that_is_kept_is_the_dense_mask_wherever_it_lies(
    max_ahead: int | None, max_behind: int, block: tuple[int, int, int, int], further: int
) -> None:
    mask = Mask(max_ahead, max_behind, "Ne(c0(b, k), 0)")  # what it looks up is not asked
    found = mask.within_bounds(*block)
    assert torch.equal(found, dense(mask, block))
    assert mask.within_bounds(block[0] + further, block[1], block[2] + further, block[3]) is found


def test_few_tiles_are_kept() -> None:
    for first in range(100):
        WINDOW.within_bounds(first, 4, 0, 4)
    assert mask_module._within_bounds.cache_info().currsize == mask_module._KEPT_TILES <= 16


def test_a_tile_that_was_kept_in_inference_serves_training() -> None:
    mask_module._within_bounds.cache_clear()
    with torch.inference_mode():
        kept = WINDOW.within_bounds(20, 4, 10, 4)
    assert not kept.is_inference()


def test_a_tile_is_kept_on_the_cpu_whatever_device_is_the_default() -> None:
    mask_module._within_bounds.cache_clear()
    with torch.device("meta"):
        kept = WINDOW.within_bounds(20, 4, 10, 4)
    assert kept.device.type == "cpu"


def test_a_predicate_is_parsed_once() -> None:
    parse.cache_clear()
    for _ in range(3):
        parse("k <= q + 1")
    assert parse.cache_info().misses == 1


REFUSED = {
    "not a formula": ("k <=", [], "does not parse"),
    "a number, not a boolean": ("k - q", [], "must be a boolean over b, h, q, k and captures.*it is a Add"),
    "an unknown symbol": ("k <= window", [], r"it mentions \['window'\]"),
    "a capture that was not given": ("Ne(c1(b, k), 0)", [KEPT], "c1 names no captured tensor: there are 1"),
    "too few indices": ("Ne(c0(k), 0)", [KEPT], r"has 1 indices, but the captured tensor has shape \(2, 6\)"),
    "an unknown function": ("sin(k) > 0", [], "sin cannot be evaluated"),
}


@pytest.mark.parametrize(("predicate", "captures", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_predicates(predicate: str, captures: list[Tensor], message: str) -> None:
    points = Points.of(2, range(3), torch.arange(6), torch.arange(6))
    with pytest.raises(UnsupportedError, match=message):
        evaluate(predicate, points, captures)
