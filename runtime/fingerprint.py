"""Fingerprints of tensors: a few numbers, computed on the tensor's own device, that show whether two ranks have the same values.

Integers and booleans: `exact`, on a device a sum of products with random odd integers modulo 2^64. Other values have the same sum with
probability about 2^-60, and the order in which a device adds does not matter. On the host it is a hash of the bytes.

Floats: `sketch`, two sums with random signs and the Euclidean norm. Ranks may compute a float input each, with other rounding, so a hash of
bits would raise false alarms. The sums of two tensors whose difference is d differ by about |d| (Johnson and Lindenstrauss 1984; signs:
Achlioptas 2003), so a tolerance on the sums is one on the relative L2 difference, also where values only change places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

SKETCH = 3
"""Numbers in a sketch: two sums with signs, the norm."""

SIGMAS = 6
"""A sum with random signs of a difference of norm d exceeds 6·d in one of 10^9 cases."""

RELATIVE_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""Relative L2 difference that may be rounding: half a unit in the last place of the 16-bit dtypes, 80 units of float32. Sketches are
float32, which sets the limit for float64."""

_TINY = 1e-30
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1024
_MOST_SLICES = 256
_tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
_slices: dict[tuple[str, int, torch.device, torch.dtype], Tensor] = {}


def exact(tensors: Sequence[Tensor]) -> Tensor | list[int]:
    """One hash a tensor of integers or booleans, [len(tensors)] int64. All on one device; numbers if that is the host."""
    if tensors[0].device.type == "cpu":  # for the host a hash of bytes costs a fifth of the operators
        return [int.from_bytes(blake2b(x.contiguous().numpy(), digest_size=8).digest(), "little", signed=True) for x in tensors]
    return exact_on_device(tensors)


def exact_on_device(tensors: Sequence[Tensor]) -> Tensor:
    """As `exact`, by operators of torch."""
    length, device = tensors[0].numel(), tensors[0].device
    if all(x.numel() == length for x in tensors):
        flat = torch.cat([x.reshape(-1) for x in tensors]) if len(tensors) > 1 else tensors[0].reshape(-1)
        return (flat.view(len(tensors), length) * odd_integers(length, device)).sum(1)
    return torch.stack([(x.reshape(-1) * odd_integers(x.numel(), device)).sum() for x in tensors])


def hash_bits(x: Tensor) -> Tensor | list[int]:
    """A hash of a tensor of any dtype, for `same_hash`; on a device one a row. Does not wait for a device."""
    bits = _as_bits(x)
    return exact([bits]) if x.device.type == "cpu" else _row_hashes(bits)


def same_hash(a: Tensor | list[int], b: Tensor | list[int]) -> bool:
    """Whether two hashes of one kind are equal. Waits for a device."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return isinstance(a, list) and a == b


def _row_hashes(bits: Tensor) -> Tensor:
    """[rows] int64: sums of products, as `exact_on_device` takes them, for a table no longer than a row."""
    mixed = bits ^ (bits >> 31) if bits.dtype == torch.int64 else bits  # a product hands high bits on to none below, signs to none at all
    return (mixed * odd_integers(bits.shape[-1], bits.device)).sum(-1)


def _as_bits(x: Tensor) -> Tensor:
    """[..., columns] integers of the size of x's own numbers."""
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return torch.atleast_1d(x.contiguous()).view(_INTEGERS[x.element_size()])


def odd_integers(length: int, device: torch.device) -> Tensor:
    """[length] int64, random and odd, the same on every rank."""
    return _table("odd integers", length, device, torch.int64, _odd_integers)


def sketch(x: Tensor) -> Tensor:
    """Two sums of x with random signs and its norm, [3] float32; of one element or two, these. No copy of a contiguous x is made."""
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    x = x if x.dtype in RELATIVE_TOLERANCE else x.float()
    if x.numel() == 1:
        return x.reshape(1).float().expand(SKETCH)
    if x.numel() == 0:
        return torch.zeros(SKETCH, device=x.device)
    if x.numel() == 2:  # the two sums of two numbers may be the same one
        two = x.reshape(2).float()
        return torch.cat([two, torch.linalg.vector_norm(two).view(1)])
    if 0 in x.stride():  # an expanded gradient is one value many times
        for dim in [dim for dim, step in enumerate(x.stride()) if step == 0]:
            x = x.narrow(dim, 0, 1)
    rows = x.reshape(-1, x.shape[-1])
    # Chunks of a long row keep the product a matrix's: few sums of many elements would be one sum of them all.
    by_row = rows @ _signs("columns", rows.shape[1], x.device, x.dtype)
    sums = _signs("rows", len(rows), x.device, torch.float32).T[:1] @ by_row.float()
    return torch.cat([sums.view(2), torch.linalg.vector_norm(rows, dtype=None if x.dtype.itemsize > 2 else torch.float32).float().view(1)])


def compressed(x: Tensor) -> Tensor:
    """x with its largest numbers brought near, so that a mask of -inf leaves its other values visible."""
    largest = torch.finfo(torch.float32).max
    return x.float().clamp(-largest, largest).asinh() if x.is_floating_point() and x.numel() > 1 else x


def combined(sketches: Tensor) -> Tensor:
    """[n, 3] sketches as one, each relative to its own norm; the last number is a sum of logarithms of norms."""
    norms = sketches[:, 2:].abs() + _TINY
    parts = torch.cat([sketches[:, :2] / norms, norms.log()], 1)
    return (_signs("rows", len(sketches), sketches.device, sketches.dtype)[:, :1] * parts).sum(0)


def far_apart(sketches: Sequence[Sequence[float]], tolerance: float) -> bool:
    """Whether ranks' sketches of one tensor differ by more than rounding. What is finite on no rank counts as equal."""
    finite = [all(map(math.isfinite, each)) for each in sketches]
    if not all(finite):
        return any(finite)
    norm = max(abs(each[2]) for each in sketches)
    spread = [max(column) - min(column) for column in zip(*sketches, strict=True)]
    return max(spread[:2]) > SIGMAS * tolerance * norm or spread[2] > tolerance * norm


def far_apart_combined(sketches: Sequence[Sequence[float]], tolerances: Sequence[float]) -> bool:
    """As `far_apart`, of `combined` sketches of tensors with these tolerances."""
    finite = [all(map(math.isfinite, each)) for each in sketches]
    if not all(finite):
        return any(finite)
    spread = max(max(column) - min(column) for column in zip(*sketches, strict=True))
    return spread > SIGMAS * math.hypot(*tolerances)


def _signs(name: str, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[length, 2] of -1 and 1."""
    return _table(f"signs of {name}", length, device, dtype, lambda g: torch.randint(0, 2, (_BLOCK, 2), generator=g) * 2 - 1)


def _odd_integers(generator: torch.Generator) -> Tensor:
    return torch.randint(-(1 << 63), (1 << 63) - 1, (_BLOCK,), generator=generator) | 1


def _table(name: str, length: int, device: torch.device, dtype: torch.dtype, block: Callable[[torch.Generator], Tensor]) -> Tensor:
    """The first `length` random numbers called `name`, the same on every rank: `block` draws 1024 of them."""
    sliced = _slices.get((name, length, device, dtype))
    if sliced is not None:
        return sliced
    known = _tables.get((name, device, dtype))
    if known is None or len(known) < length:
        num_blocks = 1 << max(0, ((length - 1) // _BLOCK).bit_length())
        with torch.inference_mode(False):
            known = torch.cat([block(_generator(name, number)) for number in range(num_blocks)]).to(device, dtype)
        _tables[name, device, dtype] = known
    if len(_slices) >= _MOST_SLICES:
        _slices.clear()
    with torch.inference_mode(False):
        _slices[name, length, device, dtype] = known[:length]
    return known[:length]


def _generator(name: str, number: int) -> torch.Generator:
    """Of one block: a table that grows keeps its first numbers."""
    return torch.Generator().manual_seed(number * 1000003 + sum(name.encode()))
