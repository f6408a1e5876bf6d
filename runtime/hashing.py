"""Random bits that are a hash of what they are for: drawn without a generator, so that any rank draws the same at any time.

The dropout of a tensor and of attention probabilities must be the same when it is recomputed, and attention's on every rank that
happens to compute a probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoseq.runtime.formula import Points

_WORD = 0xFFFFFFFF
# The multipliers of MurmurHash3's finalizer less 2^32: modulo 2^32 they are the same, and no product of theirs overflows an int64.
_ROUNDS = ((0x85EBCA6B - 2**32, 16), (0xC2B2AE35 - 2**32, 13))


def mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (the finalizer of MurmurHash3) of int64."""
    x = x & _WORD
    for multiplier, shift in _ROUNDS:
        x = ((x ^ (x >> shift)) * multiplier) & _WORD
    return x ^ (x >> 16)


def _mix_in_place(x: Tensor) -> Tensor:
    """The same without new memory for each of its steps, which on a whole block costs several times the arithmetic."""
    shifted = torch.empty_like(x)
    x.bitwise_and_(_WORD)
    for multiplier, shift in _ROUNDS:
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted).mul_(multiplier).bitwise_and_(_WORD)
    torch.bitwise_right_shift(x, 16, out=shifted)
    return x.bitwise_xor_(shifted)


def keep_mask(seed: Tensor, points: Points, p: float) -> Tensor:
    """Which attention probabilities of a block survive dropout with probability p: bool [B, H, q, k].

    A function of the seed (int64) and the global (b, h, q, k). Two hashes of the row and one of the key go into each bit: with one
    state of 32 bits, a long sequence would have rows that drop the same keys, or the same ones shifted.
    """
    seed = seed.to(points.q.device)
    low, high = mix(seed), mix((seed >> 32) + 0x9E3779B9)
    first = mix(mix(mix(mix(low + high) + points.b) + points.h) + points.q)
    second = mix(mix(mix(mix(low ^ high) + points.b) ^ points.h) ^ points.q)
    return _mix_in_place((first ^ mix(points.k + 0x632BE5A7)).add_(second)) >= int(p * 2**32)


def dropout_weights(seed: Tensor | None, points: Points, p: float, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies the probabilities of a block by: 0, or 1 / (1 - p) where they are kept."""
    assert seed is not None
    kept = keep_mask(seed, points, p).to(dtype)
    return kept.div_(1 - p) if p < 1 else kept
