"""Masks as formulas: what each spelling reads as, and the law that what was read is the tensor, element by element.

`check_mask` holds every row to the law. A mask that cannot be read stays dense or is looked up, and is right all the same.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphs import ReadMask, check_mask

S = 9
MANY = 40  # enough for a fraction to round wrongly


def iota(n: int = S, **options: Any) -> Tensor:
    return torch.arange(n, **options)


def q(n: int = S, **options: Any) -> Tensor:
    return torch.arange(n, **options)[:, None]


def row(make: Callable[..., Tensor], text: str, what: str) -> Any:
    return pytest.param(make, text, id=what)


def _first_keys_set() -> Tensor:
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    mask[:, :2] = True
    return mask


READ = [
    row(lambda: torch.tril(torch.ones(S, S)).bool(), "k <= q", "a float triangle"),
    row(lambda: 1.0 - (iota() <= q()).float() < 0.5, "k <= q", "one minus a mask in floats"),
    row(lambda: (q() - iota()).float() >= 0.5, "-k + q >= 0.5", "floats compared"),
    row(lambda: torch.cat([iota(4), iota(5) + 4])[:, None] >= iota(), "(where(q < 4, Min(3, q), Max(0, Min(4, q - 4)) + 4) >= k)",
        "positions in two parts"),
    row(lambda: iota(S * S).view(S, S) % 2 == 0, "Eq(Mod(k + 9*q, 2), 0)", "a reshape that mixes q and k"),
    row(lambda: (iota() <= q()).repeat(1, 1), "k <= q", "a repeat"),
    row(lambda: _first_keys_set(), "((k < 2) | (k <= q))", "a prefix written in place"),
    row(lambda: iota(S + 4)[-S:][:, None] >= iota(), "k <= q + 4", "a negative start"),
    row(lambda: torch.flip(iota(), [0])[:, None] >= iota(), "8 - q >= k", "reversed"),
    row(lambda: iota()[:, None] > torch.tensor(2) + iota(), "k <= q - 3", "a tensor made of a number"),
    row(lambda: torch.ones(S, S, dtype=torch.bool).tril(), "k <= q", "tril of ones"),
    row(lambda: torch.ops.aten.tril.default(torch.ones(S, S, dtype=torch.bool), diagonal=2), "k <= q + 2", "a diagonal by keyword"),
    row(lambda: ~torch.ones(S, S, dtype=torch.bool).triu(1), "k <= q", "triu, inverted"),
    row(lambda: ~(iota() > q()), "k <= q", "not later"),
    row(lambda: q() - iota() >= 0, "k <= q", "a difference"),
    row(lambda: iota()[None] <= iota()[:, None], "k <= q", "rows and columns"),
    row(lambda: (iota() <= q()) & (q() - iota() < 4), "(k <= q) & (k > q - 4)", "a window"),
    row(lambda: torch.logical_and(iota() <= q(), iota() > q() - 4), "(k <= q) & (k > q - 4)", "a window, written otherwise"),
    row(lambda: (iota()[:, None] >= iota()).T.permute(-1, 0), "k <= q", "dims moved there and back"),
    row(lambda: torch.ones(S, S, dtype=torch.bool).masked_fill(iota() > q(), False), "k <= q", "masked_fill of a bool mask"),
    row(lambda: torch.where(iota() > q(), False, True).expand(2, 3, S, S), "k <= q", "where of a bool mask, expanded"),
    row(lambda: torch.where(iota() <= q(), iota() >= 0, False), "k <= q", "where with a scalar"),
    row(lambda: torch.ones(S, S, dtype=torch.bool), "all", "all true"),
    row(lambda: iota()[None] * q() >= 0, "all", "always true"),
    row(lambda: torch.zeros(S, S, dtype=torch.bool), "False", "all false"),
    row(lambda: (q() >= iota()) & (q() // 4 == iota() // 4), "(k <= q) & Eq(floor(q/4), floor(k/4))", "chunks"),
    row(lambda: torch.cumsum(torch.ones(S, dtype=torch.long), 0)[:, None] > iota(), "k <= q", "positions as a running sum"),
    row(lambda: torch.diff(iota(), prepend=iota(1) - 1)[:, None] + iota() > q(), "k > q - 1", "consecutive positions differ by one"),
    row(lambda: (iota(S + 3)[3:][:, None] >= iota()), "k <= q + 3", "a slice moves the index"),
    row(lambda: (iota(2 * S)[1::2][:, None] >= iota()), "2*q + 1 >= k", "a slice with a step"),
    row(lambda: iota(dtype=torch.int32)[:, None] - iota(dtype=torch.int32) >= 0, "k <= q", "int32 positions"),
    row(lambda: torch.sub(6, iota())[:, None] > iota(), "6 - q > k", "the scalar first"),
    row(lambda: (q() - iota()) // 3 >= 0, "k <= q", "floor division of negatives"),
    row(lambda: (q() - iota()) % 3 == 1, "Eq(Mod(-k + q, 3), 1)", "the remainder of negatives"),
    row(lambda: iota()[iota(4)].expand(S, 4) <= q(), "k <= q", "an index by position"),
]

UNREADABLE = [
    row(lambda: torch.add(q(), iota(), alpha=2) > 5, "gt", "alpha"),
    row(lambda: torch.rsub(q(), iota(), alpha=2) > 1, "gt", "alpha, the scalar first"),
    row(lambda: torch.div(q() - iota(), 3, rounding_mode="trunc") >= 0, "ge", "division towards zero"),
    row(lambda: torch.fmod(q() - iota(), 3) == -1, "eq", "the remainder with the dividend's sign"),
    row(lambda: (q() & iota()) == 0, "eq", "bits of integers"),
    row(lambda: q(dtype=torch.uint8) - iota(dtype=torch.uint8) >= 0, "ge", "uint8 wraps below 0"),
    row(lambda: (q() - iota()).to(torch.uint8) > 3, "gt", "a cast to uint8 wraps"),
    row(lambda: (q() * iota() * 10).to(torch.int8) > 3, "gt", "a cast to int8 wraps"),
    row(lambda: -(iota() <= q()).to(torch.uint8) > 2, "gt", "minus a uint8"),
    row(lambda: q(dtype=torch.int32) * 10**9 * iota(dtype=torch.int32) > 3, "gt", "int32 overflows"),
    row(lambda: q() * iota() * 2**62 > 3, "gt", "int64 overflows"),
]


LOOKED_UP = [
    row(lambda: torch.ops.aten.add.Scalar(iota(), 2, 3)[:, None] > iota(), "(add(q) > k)", "alpha by position"),
    row(lambda: torch.rsub(iota(), 6, alpha=2)[:, None] > iota(), "(rsub(q) > k)", "6 - 2q"),
    row(lambda: q() >= iota()[iota() - 3], "(q >= index(k))", "negative indices count from the end"),
    row(lambda: iota() >= iota()[-3] - q(), "(k >= -q + select())", "a negative position"),
    row(lambda: torch.cumsum(iota() > 3, 0)[:, None] >= iota(), "(cumsum(q) >= k)", "a running sum of something else"),
    row(lambda: ~q() < -iota(), "(bitwise_not(q, 0) < -k)", "the complement of an integer"),
    row(lambda: q() + torch.iinfo(torch.int64).max > iota(), "(add(q, 0) > k)", "the largest integer overflows"),
    row(lambda: torch.arange(0, 2.5 * S, 2.5, dtype=torch.long)[:S, None] >= iota(), "(arange(q) >= k)", "a fractional step"),
]

ARITHMETIC = [
    pytest.param(lambda: ((iota() <= q()) + (iota() == 0)) == (q() >= 0), id="true plus true is true"),
    pytest.param(lambda: (iota() <= q()) * (iota() != 1), id="a product of bools"),
    pytest.param(lambda: (iota() <= q()) ^ (q() - iota() < 4), id="exclusive or"),
    pytest.param(lambda: (iota() <= q()) ^ ((q() - iota() < 4) | (iota() == 2)), id="exclusive or of more"),
    pytest.param(lambda: (iota() <= q()) == (iota() > 2), id="bools compared"),
    pytest.param(lambda: (iota() <= q()) < (iota() > 2), id="bools ordered"),
    pytest.param(lambda: 1 - (iota() > q()).long() > 0, id="1 - mask"),
    pytest.param(lambda: (iota() <= q()).int() * 2 - 1 > 0, id="mask as numbers"),
    pytest.param(lambda: torch.tril(torch.ones(S, S, dtype=torch.long)) == 1, id="a triangle of integers"),
    pytest.param(lambda: torch.diff(iota(S + 1) <= q()), id="the difference of bools"),
    pytest.param(lambda: (q() - iota()) // -2 >= 0, id="floor division by a negative"),
    pytest.param(lambda: (q() - iota()) % -3 == -1, id="the remainder by a negative"),
    pytest.param(lambda: (q(MANY) + iota(MANY) + 2) // 10 >= 1, id="tenths add up to one"),
    pytest.param(lambda: ((q(MANY) - 3 * iota(MANY) - 2) // 7) % 3 < iota(MANY) // 5, id="nested divisions"),
    pytest.param(lambda: (q(MANY) // 3 + iota(MANY) // 7) // 2 >= 3, id="divisions of divisions"),
    pytest.param(lambda: (q() > 2.5).expand(S, S), id="compared with a fraction"),
    pytest.param(lambda: (q() > 2.0).expand(S, S), id="compared with a float that is whole"),
    pytest.param(lambda: torch.logical_and(q(), iota()), id="integers as truth values"),
    pytest.param(lambda: torch.minimum(q(), iota()) < 3, id="minimum"),
    pytest.param(lambda: (q() - iota()).abs() < 3, id="distance"),
    pytest.param(lambda: torch.full((S, S), 0.5, dtype=torch.bool), id="half is true"),
    pytest.param(lambda: torch.full((S, 1), -1.7, dtype=torch.long) + 3 >= iota(), id="a fraction cut to an integer"),
]


@pytest.mark.parametrize(("make", "text"), READ)
def test_what_a_mask_reads_as(make: Callable[..., Tensor], text: str) -> None:
    assert check_mask(make) == ReadMask(text, [], [])


@pytest.mark.parametrize(("make", "made_by"), UNREADABLE)
def test_a_mask_that_cannot_be_read_is_held_whole_and_reported(make: Callable[..., Tensor], made_by: str) -> None:
    read = check_mask(make)
    (dense,) = read.dense
    assert read.text.startswith(f"Ne({made_by}") and dense.reason == "it depends on query and key in a way that was not read"
    assert dense.num_bytes == make().numel() and "in attend: " in dense.source


@pytest.mark.parametrize(("make", "text"), LOOKED_UP)
def test_what_cannot_be_read_of_one_side_is_looked_up(make: Callable[..., Tensor], text: str) -> None:
    read = check_mask(make)
    assert read.text == text and not read.dense and len(read.captures) == 1


@pytest.mark.parametrize("make", ARITHMETIC)
def test_arithmetic_means_what_torch_means(make: Callable[..., Tensor]) -> None:
    assert not any(d.num_bytes > make().numel() for d in check_mask(make).dense)


# Masks of data ---------------------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([9, 5])
PADDING = (iota() < LENGTHS[:, None]).long()
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 5, 1, 1, 1, 1, 0, 0, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 0, 1, 2]])


def causal() -> Tensor:
    return iota() <= q()


def packed(positions: Tensor) -> Tensor:
    """As transformers finds packed sequences: a document starts where positions do not go on by one."""
    first = positions[:, :1] - 1
    return (torch.diff(positions, prepend=first, dim=-1) != 1).cumsum(-1)


def same(ids: Tensor) -> Tensor:
    return ids[:, None, :, None] == ids[:, None, None]


def later(ids: Tensor) -> Tensor:
    return ids[:, None, :, None] - ids[:, None, None] < 0


def gathered(mask: Tensor) -> Tensor:
    """As transformers looks a padding mask up: by index tensors of batch and key."""
    batch = iota(2)[:, None, None, None]
    return causal() & mask[batch, iota()[None, None, None, :]]


DATA = [
    pytest.param(lambda m: causal() & (m != 0)[:, None, None], PADDING, "(k <= q) & Ne(m(b, k), 0)", id="padding, integers"),
    pytest.param(lambda m: causal() & m[:, None, None].bool(), PADDING, "(k <= q) & Ne(m(b, k), 0)", id="padding, as bools"),
    pytest.param(lambda m: causal() & m[:, None, None], PADDING.bool(), "(k <= q) & Ne(m(b, k), 0)", id="padding, bools"),
    pytest.param(lambda m: gathered(m), PADDING.bool(), "(k <= q) & Ne(m(b, k), 0)", id="padding, gathered"),
    pytest.param(lambda m: m[:, None, None, :].bool().expand(2, 1, S, S), PADDING, "Ne(m(b, k), 0)", id="padding alone, expanded"),
    pytest.param(lambda m: causal() & m[:, None, None].bool(), PADDING.to(torch.uint8), "(k <= q) & Ne(m(b, k), 0)",
                 id="padding, uint8"),
    pytest.param(lambda m: 1 - m[:, None, None] < 1, PADDING, "(1 - m(b, k) < 1)", id="1 - padding"),
    pytest.param(lambda m: causal() & same(m), DOCUMENTS, "(k <= q) & Eq(m(b, q), m(b, k))",
                 id="document ids"),
    pytest.param(lambda m: causal() & same(packed(m)), POSITIONS,
                 "(k <= q) & Eq(doc(b, q), doc(b, k))", id="documents from positions"),
    pytest.param(lambda m: m[:, None, None].to(torch.int8) - 1 >= 0, PADDING, "(sub(b, 0, 0, k) >= 0)", id="padding in int8"),
    pytest.param(lambda m: later(m.int()), DOCUMENTS * 2**31, "Ne(lt(b, 0, q, k), 0)", id="ids that int32 cuts off"),
    pytest.param(lambda m: later(m.long()), (DOCUMENTS * 10**9).int(), "(-_to_copy(b, k) + _to_copy(b, q) < 0)",
                 id="int32 ids whose difference needs int64"),
    pytest.param(lambda m: later(m.long()), DOCUMENTS.to(torch.uint8), "(-m(b, k) + m(b, q) < 0)",
                 id="uint8 ids whose difference is negative"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "data", "text"), DATA)
def test_masks_of_data(make: Callable[..., Tensor], data: Tensor, text: str) -> None:
    assert check_mask(make, data).text == text


def test_a_mask_of_symbolic_length() -> None:
    def make(ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1])
        return at <= at[:, None]

    assert check_mask(make, DOCUMENTS, dynamic=True).text == "k <= q"


# Random masks ----------------------------------------------------------------------------------------------------------

INTEGERS = st.recursive(
    st.sampled_from(["q", "k", "d_q", "d_k"]) | st.integers(-4, 7).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, st.sampled_from(["//", "%"]), st.sampled_from(["2", "3", "-3", "10"])).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, inner).map(lambda t: f"torch.where(q > 2, {t[0]}, {t[1]})"),
        inner.map(lambda x: f"(0 * q + {x}).abs()"),
    ),
    max_leaves=4,
)
BOOLEANS = st.recursive(
    st.tuples(INTEGERS, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), INTEGERS).map(
        lambda t: f"((0 * q * k + {t[0]}) {t[1]} {t[2]})"
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["&", "|", "^", "==", "*", "+"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda x: f"(~{x})"),
        inner.map(lambda x: f"((1 - {x}.long()) > 0)"),
        inner.map(lambda x: f"{x}.tril(1)"),
        st.tuples(inner, inner).map(lambda t: f"torch.where({t[0]}, {t[1]}, False)"),
    ),
    max_leaves=3,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(code=BOOLEANS)
def test_a_random_mask_is_read_right_or_held_whole(code: str) -> None:
    formula = eval(f"lambda q, k, d_q, d_k: {code}", {"torch": torch})  # what the grammar above wrote

    def make(ids: Tensor) -> Tensor:
        return formula(q(), iota(), ids[:, None, :, None], ids[:, None, None]).expand(2, 1, S, S)

    check_mask(make, DOCUMENTS - 1)
