"""What a rank holds during an attention: the most bytes of packed rows on their way, and what is saved for the backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_job import Run, axes_of, call_keywords, shard
from autoseq.runtime.packed import Packed
from autoseq.runtime.strategies import STRATEGIES


@dataclass
class Held:
    """Bytes of what is alive, and the most that they have been."""

    now: int = 0
    most: int = 0

    def add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def start(self) -> None:
        self.most = self.now


@contextmanager
def packed_rows() -> Iterator[Held]:
    """The buffers of packed rows."""
    held, make = Held(), Packed.empty

    def empty(*args: Any, **settings: Any) -> Packed:
        packed = make(*args, **settings)
        storage = packed.message().untyped_storage()
        held.add(storage.nbytes())
        weakref.finalize(storage, held.add, -storage.nbytes())
        return packed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packed, "empty", empty)
        yield held


@dataclass(frozen=True)
class Found:
    """Of one attention on one rank."""

    forward: int
    backward: int
    kept: int


def hold_on_rank(rank: int, P: int, runs: list[Run], mesh: tuple[int, ...] = ()) -> list[Found]:
    axes = axes_of(mesh)
    return [_held(rank, P, *run, axes) for run in runs]


def _held(rank: int, P: int, strategy: str, layout: Any, case: Any, axes: tuple[str, ...]) -> Found:
    *qkv, grad = (shard(x, rank, P, layout, padding="edge").contiguous() for x in case.tensors())
    leaves = [x.requires_grad_() for x in qkv]
    saved: dict[int, int] = {}

    def save(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with packed_rows() as held:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            out = STRATEGIES[strategy].attention(*leaves, case.captures(), **call_keywords(case, layout), axes=axes)
        forward, kept = held.most, sum(saved.values())
        held.start()
        torch.autograd.grad(out, leaves, grad)
        return Found(forward, held.most, kept)
