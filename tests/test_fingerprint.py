"""Fingerprints of tensors: equal for equal values, apart for others, and within a tolerance for rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autoseq.runtime import fingerprint
from autoseq.runtime.fingerprint import (
    RELATIVE_TOLERANCE,
    combined,
    compressed,
    exact,
    exact_on_device,
    far_apart,
    far_apart_combined,
    hash_bits,
    same_hash,
    sketch,
)

IDS = torch.arange(4096).view(4, 1024) % 97


def changed(x: Tensor, value: object, *place: int) -> Tensor:
    x = x.clone()
    x[place] = value
    return x


INTEGERS = {
    "one element": (IDS, changed(IDS, 5, 0, 3)),
    "two elements that change places": (IDS, changed(changed(IDS, 4, 0, 3), 3, 0, 4)),
    "a row that moves": (IDS, IDS.roll(1, 0)),
    "the highest bit": (IDS, changed(IDS, IDS[2, 7] + (-1 << 63), 2, 7)),
    "one of a mask": (IDS > 3, changed(IDS > 3, True, 0, 0)),
    "bytes": (IDS.to(torch.uint8), changed(IDS.to(torch.uint8), 200, 1, 1)),
}


@pytest.mark.parametrize(("one", "other"), INTEGERS.values(), ids=INTEGERS)
def test_integers_differ(one: Tensor, other: Tensor) -> None:
    assert exact([one]) == exact([one.clone()]) != exact([other])
    on_device = [exact_on_device([x]).item() for x in (one, one.clone(), other)]
    assert on_device[0] == on_device[1] != on_device[2]


def test_each_tensor_has_its_hash_whatever_stands_beside_it() -> None:
    mask, few = IDS > 3, torch.tensor([3, 4])
    alone = [exact_on_device([x])[0].item() for x in (IDS, mask, few)]
    assert exact_on_device([IDS, mask]).tolist() == alone[:2] and exact_on_device([IDS, mask, few]).tolist() == alone
    assert exact_on_device([torch.zeros(0, dtype=torch.long), few]).tolist() == [0, alone[2]]


def test_a_table_that_grows_keeps_its_numbers() -> None:
    before = exact_on_device([IDS[:1]])
    exact_on_device([torch.zeros(100_000, dtype=torch.long)])
    assert torch.equal(exact_on_device([IDS[:1]]), before)


X = torch.randn(32, 33, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(16, 16).masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf)
FLOATS = {
    "one element of a thousand": (X, changed(X, 9.0, 3, 3)),
    "values that change places": (X, X.flip(0)),
    "another sign": (X, -X),
    "another size": (X, X * 1.02),
    "a mask": (MASK, changed(MASK, 0.0, 2, 3)),
    "one that is not finite": (X, changed(X, torch.nan, 0, 0)),
    "one number": (torch.tensor(1.0), torch.tensor(0.5)),
    "one number of another sign": (torch.tensor(1.0), torch.tensor(-1.0)),
    "one that is zero": (X * 0, X),
    "two numbers": (torch.tensor([1.0, 1.0]), torch.tensor([-1.0, -1.0])),
    "one integer of another sign": (torch.tensor(3), torch.tensor(-3)),
    "one truth": (torch.tensor(True), torch.tensor([False])),
    "one complex number of another phase": (torch.tensor(1 + 1j), torch.tensor(-1 + 1j).conj()),
}


def sketches(*xs: Tensor) -> list[list[float]]:
    return [sketch(compressed(x)).tolist() for x in xs]


@pytest.mark.parametrize("dtype", RELATIVE_TOLERANCE)
@pytest.mark.parametrize(("one", "other"), FLOATS.values(), ids=FLOATS)
def test_floats_differ(one: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    if one.is_floating_point():
        one, other = one.to(dtype), other.to(dtype)
    assert far_apart(sketches(one, other), RELATIVE_TOLERANCE[dtype])
    assert not far_apart(sketches(one, one.clone()), RELATIVE_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    """A value that ranks compute each may be off by one rounding everywhere."""
    for seed in range(50):
        noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
        rounded = X.double() * (1 + noise * torch.finfo(dtype).eps / 4)
        assert not far_apart(sketches(X.to(dtype), rounded.to(dtype)), RELATIVE_TOLERANCE[dtype])


def test_an_expanded_value_is_not_copied_and_a_strided_one_counts_by_its_places() -> None:
    assert torch.equal(sketch(torch.ones(3, 1).expand(3, 1 << 40)), sketch(torch.ones(3, 1)))
    assert not torch.equal(sketch(X[:32, :32].T), sketch(X[:32, :32]))


def test_many_tensors_share_one_sketch_in_which_a_small_one_shows() -> None:
    xs = [X * 1e6, X, X * 1e-6]
    mine = combined(torch.stack([sketch(x) for x in xs])).tolist()
    for place in range(3):
        others = [x.flip(0) if i == place else x for i, x in enumerate(xs)]
        theirs = combined(torch.stack([sketch(x) for x in others])).tolist()
        assert far_apart_combined([mine, theirs], [1e-5] * 3)
    assert not far_apart_combined([mine, mine], [1e-5] * 3)


KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.complex128, torch.int64, torch.bool)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 6), (5,), ()], ids=str)
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_a_write_to_any_tensor_changes_its_hash(dtype: torch.dtype, shape: tuple[int, ...], on_device: bool) -> None:
    def hashed() -> Tensor | list[int]:
        return fingerprint._row_hashes(fingerprint._as_bits(x)) if on_device else hash_bits(x)

    numbers = torch.arange(1, 1 + torch.Size(shape).numel()).view(shape) % 7
    x = numbers % 2 == 1 if dtype == torch.bool else (numbers - 3).to(dtype)
    before, kept = hashed(), x.clone()
    assert same_hash(before, hashed())
    x.copy_(x.logical_not() if dtype == torch.bool else -x)
    assert not same_hash(before, hashed())
    x.copy_(kept)
    assert same_hash(before, hashed())
    if x.dim():
        x.copy_(x.roll(1, -1))
        assert not same_hash(before, hashed())


def test_a_nan_is_like_itself() -> None:
    x = torch.tensor([1.0, float("nan")])
    assert same_hash(hash_bits(x), hash_bits(x.clone()))
