"""What interval arithmetic claims of a tile holds for every element of it, and the usual masks are decided."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autoseq.runtime.formula import Points, evaluate
from autoseq.runtime.intervals import prove

N, B, HEADS = 16, 2, range(1, 3)
DOC = torch.tensor([[0] * 6 + [1] * 5 + [2] * 5, [0] * 9 + [1] * 7])
KEPT = torch.arange(N).expand(B, N) < torch.tensor([[11], [16]])
WEIGHT = torch.where(KEPT, 1.0, -0.5).to(torch.bfloat16)
TABLE = torch.randint(-3, 9, (N,), generator=torch.Generator().manual_seed(0))
CAPTURES = [DOC, KEPT, WEIGHT, TABLE, torch.tensor(5), torch.arange(N * N).view(N, N) % 5, torch.tensor([3, 1, 4])]


FULL, EMPTY, MAYBE = "full", "empty", "maybe"
EITHER = "empty/full"


def tiles(*sizes: int) -> list[tuple[int, int]]:
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return list(zip(starts, sizes, strict=False))


def claims(predicate: str, captures: list[Tensor], q_tiles: list[tuple[int, int]], k_tiles: list[tuple[int, int]]) -> list[list[str]]:
    """Each tile's claim, for all heads or for each; every one is checked against the predicate written out densely."""
    full, empty = prove(predicate, captures, B, HEADS, q_tiles, k_tiles)
    points = Points.of(B, HEADS, torch.arange(N), torch.arange(N))
    dense = evaluate(predicate, points, captures).expand(B, len(HEADS), N, N)
    found = [[set[str]() for _ in k_tiles] for _ in q_tiles]
    for head, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (len(HEADS), len(q_tiles), len(k_tiles)))).tolist():
        (q, rows), (k, keys) = q_tiles[i], k_tiles[j]
        tile, at = dense[:, head, q : q + rows, k : k + keys], (head if len(full) > 1 else 0, i, j)
        assert not full[at] or tile.all(), f"{predicate} is not true everywhere in tile {at}"
        assert not empty[at] or not tile.any(), f"{predicate} is true somewhere in tile {at}"
        found[i][j].add(FULL if full[at] else EMPTY if empty[at] else MAYBE)
    return [["/".join(sorted(claim)) for claim in row] for row in found]


HALVES, QUARTERS = tiles(8, 8), tiles(4, 4, 4, 4)

# Predicate, then what is claimed of four tiles of 8 x 8 (of each of the two heads, where it depends on them).
DECIDED = {
    "causal": ("k <= q", [[MAYBE, EMPTY], [FULL, MAYBE]]),
    "causal or a prefix": ("(k <= q) | (k < 9)", [[FULL, MAYBE], [FULL, MAYBE]]),
    "chunks of a tile": ("Eq(floor(q/8), floor(k/8))", [[FULL, EMPTY], [EMPTY, FULL]]),
    "chunks of a tile, as a product": ("Eq(8*floor(q/8), 8*floor(k/8))", [[FULL, EMPTY], [EMPTY, FULL]]),
    "chunks that end within a tile": ("Eq(floor(q/5), floor(k/5))", [[MAYBE, MAYBE], [MAYBE, MAYBE]]),
    "a distance": ("Abs(q - k) < 8", [[FULL, MAYBE], [MAYBE, FULL]]),
    "a window that counts from the query's chunk": ("(k >= 8*floor(q/8)) & (k <= q)", [[MAYBE, EMPTY], [EMPTY, MAYBE]]),
    "the head decides": ("Eq(h, 1)", [[EITHER] * 2] * 2),
    "the head decides some": ("(k <= q) | Eq(h, 2)", [["full/maybe", EITHER], [FULL, "full/maybe"]]),
    "a constant": ("True", [[FULL, FULL], [FULL, FULL]]),
    "a tensor of no dims": ("k < c4() + 3", [[FULL, EMPTY], [FULL, EMPTY]]),
    "a table by head": ("k < 8*Mod(c6(h), 2)", [[EITHER, EMPTY]] * 2),
    "key padding, where one batch element has it": ("Ne(c1(b, k), 0)", [[FULL, MAYBE], [FULL, MAYBE]]),
    "key padding in floats": ("c2(b, k) > 0", [[FULL, MAYBE], [FULL, MAYBE]]),
    "a modulus within one period": ("Mod(k, 8) < 8", [[FULL, FULL], [FULL, FULL]]),
    "a lookup by a chunk": ("c3(floor(k/16)) >= -3", [[FULL, FULL], [FULL, FULL]]),
    "a lookup by a lookup": ("c3(c0(b, k)) <= 9", [[FULL, FULL], [FULL, FULL]]),
    "a dense mask is not read": ("Ne(c5(q, k), 7)", [[MAYBE, MAYBE], [MAYBE, MAYBE]]),
    "arithmetic on floats is not trusted": ("f_add(c2(b, k), const(1, 1)) > -9", [[MAYBE, MAYBE], [MAYBE, MAYBE]]),
    "a float constant is not trusted": ("c2(b, k) > -0.7", [[MAYBE, MAYBE], [MAYBE, MAYBE]]),
    "a choice": ("Piecewise((k, k < 8), (q + 20, True)) < 20", [[FULL, EMPTY], [FULL, EMPTY]]),
    "neither of two": ("~((k < 8) | (q < 8))", [[EMPTY, EMPTY], [EMPTY, FULL]]),
    "one of two": ("Xor(k < 8, q < 8)", [[EMPTY, FULL], [FULL, EMPTY]]),
    "if, then, else": ("ITE(k < 8, q < 8, q >= 8)", [[FULL, EMPTY], [EMPTY, FULL]]),
}  # fmt: skip


@pytest.mark.parametrize(("predicate", "expected"), DECIDED.values(), ids=DECIDED)
def test_decided(predicate: str, expected: list[list[str]]) -> None:
    assert claims(predicate, CAPTURES, HALVES, HALVES) == expected


def test_documents() -> None:
    """Tiles of one document against another are empty; within one, full."""
    same = "Eq(c0(b, q), c0(b, k))"
    one = [DOC[:1].expand(B, N), *CAPTURES[1:]]
    found = claims(same, one, tiles(6, 5, 5), tiles(6, 5, 5))
    assert found == [[FULL if i == j else EMPTY for j in range(3)] for i in range(3)]


def test_integers_that_float64_does_not_hold_are_unknown() -> None:
    """Two documents whose ids differ in the last of 62 bits."""
    ids = torch.where(DOC[:1] > 0, 2**61, 2**61 + 1).expand(B, N)
    assert claims("Eq(c0(b, q), c0(b, k))", [ids], QUARTERS, QUARTERS) == [[MAYBE] * 4] * 4


NUMBER = st.recursive(
    st.sampled_from(
        ["q", "k", "b", "h", "0", "1", "3", "7", "c4()", "c0(b, q)", "c0(b, k)", "c1(b, k)", "c3(q)", "c3(k)", "c6(h)", "c5(q, k)"]
    ),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from("+-*"), inner),
        st.builds("{}({}, {})".format, st.sampled_from(["Min", "Max"]), inner, inner),
        st.builds("Abs({})".format, inner),
        st.builds("floor(({})/{})".format, inner, st.sampled_from([2, 3, 5])),
        st.builds("ceiling(({})/{})".format, inner, st.sampled_from([2, 3])),
        st.builds("Mod({}, {})".format, inner, st.sampled_from([2, 5])),
        st.builds("c3(Min(Max({}, 0), 15))".format, inner),
        st.builds("Piecewise(({}, k < {}), ({}, True))".format, inner, st.integers(0, 9), inner),
    ),
    max_leaves=5,
)
ATOM = st.one_of(
    st.builds("{}({}, {})".format, st.sampled_from(["Eq", "Ne", "Lt", "Le", "Gt", "Ge"]), NUMBER, NUMBER),
    st.sampled_from(["(c2(b, k) > 0)", "Eq(c2(b, k), 1)", "Ne(f_lt(c2(b, q), const(1, 2)), 0)"]),
)
PREDICATE = st.recursive(
    ATOM,
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from("&|"), inner),
        st.builds("~({})".format, inner),
        st.builds("Xor({}, {})".format, inner, inner),
        st.builds("ITE({}, {}, {})".format, inner, inner, inner),
    ),
    max_leaves=4,
)
CUTS = st.sampled_from([HALVES, QUARTERS, tiles(1, 6, 2, 7), tiles(16), [(8, 8), (0, 8)]])


@settings(max_examples=250, deadline=None, derandomize=True)
@given(PREDICATE, CUTS, CUTS)
def test_no_claim_is_wrong(predicate: str, q_tiles: list[tuple[int, int]], k_tiles: list[tuple[int, int]]) -> None:
    claims(predicate, CAPTURES, q_tiles, k_tiles)
