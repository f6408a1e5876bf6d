"""The 64 bytes that a rank says of a step: a head of eight bytes, then hashes of integers and sketches of floats.

Each tensor has its own numbers where they fit; else all hashes are one, and all sketches are one.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoseq.runtime.fingerprint import SKETCH, combined, odd_integers
from autoseq.runtime.step_message import MESSAGE_BYTES, StepMessage

_HEAD_BYTES, _HASH_BYTES, _FLOAT_BYTES = 8, 8, 4

Values = Tensor | list[int] | list[float]
"""Fingerprints: on a device, or numbers of the host."""


@dataclass(frozen=True, slots=True)
class Head:
    """What ranks compare besides tensors, each number cut to its bits."""

    log: int  # 24 bits: a hash of the calls so far
    optimizer_steps: int  # 16 bits
    writes: int  # 11 bits: to the weights since they were compared
    due: int  # 12 bits that say which weights are due; 0 for none
    is_new_habit: bool  # whether weights were written to as they were not before

    def pack(self) -> int:
        return self.is_new_habit << 63 | self.due << 51 | (self.writes & 0x7FF) << 40 | (self.optimizer_steps & 0xFFFF) << 24 | self.log

    @staticmethod
    def unpack(row: bytes) -> Head:
        (word,) = struct.unpack_from("<Q", row)
        return Head(word & 0xFFFFFF, word >> 24 & 0xFFFF, word >> 40 & 0x7FF, word >> 51 & 0xFFF, bool(word >> 63))


def fits(num_integers: int, num_floats: int) -> bool:
    """Whether each of so many tensors has numbers of its own."""
    return _HEAD_BYTES + _HASH_BYTES * num_integers + _FLOAT_BYTES * SKETCH * num_floats <= MESSAGE_BYTES


def hash_in(row: bytes, place: int) -> int:
    """The n-th hash of a rank's bytes."""
    return struct.unpack_from("<q", row, _HEAD_BYTES + _HASH_BYTES * place)[0]


def sketch_in(row: bytes, num_hashes: int, place: int) -> tuple[float, ...]:
    """The n-th sketch of a rank's bytes, behind the hashes."""
    start = _HEAD_BYTES + _HASH_BYTES * num_hashes + _FLOAT_BYTES * SKETCH * place
    return struct.unpack_from(f"<{SKETCH}f", row, start)


def fill_on_device(message: StepMessage, head: Head, hashed: Sequence[Values], sketched: Sequence[Values], fits: bool) -> None:
    """Nothing waits for the device: numbers of the host travel with the kernels."""
    device, end = message.device, 1
    message.words[0].fill_(_signed(head.pack()))
    if hashed:
        hashes = torch.cat([on(device, x, torch.int64) for x in hashed])
        hashes = hashes if fits else (hashes * odd_integers(len(hashes), device)).sum(0, keepdim=True)
        end += len(hashes)
        message.words[1:end].copy_(hashes)
    sketches = [on(device, x, torch.float32) for x in sketched]
    if not fits and len(sketches) > 1:
        sketches = [combined(torch.stack(sketches))]
    for number, each in enumerate(sketches):
        start = 2 * end + SKETCH * number
        message.floats[start : start + SKETCH].copy_(each)


def fill_on_host(message: StepMessage, head: Head, hashes: Sequence[int], sketches: Sequence[Sequence[float]], fits: bool) -> None:
    """As `fill_on_device`, where everything is a number."""
    if not fits and hashes:
        weights = odd_integers(len(hashes), message.device).tolist()
        hashes = [_signed(sum(map(operator.mul, hashes, weights)) & (1 << 64) - 1)]
    if not fits and len(sketches) > 1:
        sketches = [combined(torch.tensor(sketches)).tolist()]
    numbers = [number for each in sketches for number in each]
    struct.pack_into(f"<Q{len(hashes)}q{len(numbers)}f", message.memory, 0, head.pack(), *hashes, *numbers)


def on(device: torch.device, values: Values, dtype: torch.dtype) -> Tensor:
    """Fingerprints as a tensor."""
    if isinstance(values, Tensor):
        return values.to(device, dtype, non_blocking=True)
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
