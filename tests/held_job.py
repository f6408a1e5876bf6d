"""What a rank holds during an attention: the most bytes of packed rows on their way, and what is saved for the backward."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from attention_job import Run, axes_of, call_keywords, shard
from autoseq.runtime import attention_call, stages, visit_op
from autoseq.runtime.packed import Packed
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.visits import QUERIES


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
        _follow(held, packed.message().untyped_storage())
        return packed

    def work_on(self: Any, kind: int, guest: int, came: Packed | None) -> Packed | None:
        found = work(self, kind, guest, came)
        if kind == QUERIES and found is not None:  # dq, which is sent from where it was computed
            _follow(held, found.message().untyped_storage())
        return found

    work = visit_op._BackwardTrip.work_on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packed, "empty", empty)
        patch.setattr(visit_op._BackwardTrip, "work_on", work_on)
        yield held


def _follow(held: Held, storage: torch.UntypedStorage) -> None:
    held.add(storage.nbytes())
    weakref.finalize(storage, held.add, -storage.nbytes())


BUFFERS = (
    "split_heads", "split_rows", "all_to_all_single", "pack_rows", "all_gather_into_tensor", "reduce_scatter_tensor",
    "gathered_attention_backward", "send_rows", "send_gradients",
)  # fmt: skip


class Watch(TorchDispatchMode):
    """The bytes of what operators returned that make messages or receive them, while it is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.held = Held()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for key, (storage, size) in list(self._alive.items()):
            if storage.expired():
                del self._alive[key]
                self.held.add(-size)
        name = func.overloadpacket.__name__
        if name == "wait_tensor":
            time.sleep(0.02)
        if name in BUFFERS:
            # Of an attention's backward only the gradients of gathered keys are a buffer.
            storage = (result[1] if isinstance(result, tuple) else result).untyped_storage()
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.held.add(storage.nbytes())
        return result


def hold_in_stages(rank: int, P: int, runs: list[Run], stages_asked: int) -> list[tuple[int, int]]:
    """The most that buffers of a forward, and of a backward, hold: in so many stages, however short the messages."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        in_stages(patch, stages_asked)
        for strategy, layout, case in runs:
            *qkv, grad = (shard(x, rank, P, layout, padding="edge").contiguous() for x in case.tensors())
            leaves = [x.requires_grad_() for x in qkv]
            attempts = []
            for _ in range(3):
                with Watch() as forward:
                    out = STRATEGIES[strategy].attention(*leaves, case.captures(), **call_keywords(case, layout))
                with Watch() as backward:
                    torch.autograd.grad(out, leaves, grad)
                attempts.append((forward.held.most, backward.held.most))
            # A thread of gloo may hold a message for a moment after it has been waited for, so the least is what must be held.
            found.append((min(forward for forward, _ in attempts), min(backward for _, backward in attempts)))
    return found


def in_stages(patch: pytest.MonkeyPatch, number: int) -> None:
    patch.setattr(stages, "MAX_STAGES", number)
    patch.setattr(stages, "MIN_STAGE_BYTES", 1)


@dataclass(frozen=True)
class Found:
    """Of one attention on one rank."""

    forward: int
    backward: int
    kept: int  # as a compiled program keeps it
    kept_eagerly: int
    inputs: int  # bytes of q, k and v


def hold_on_rank(rank: int, P: int, runs: list[Run], mesh: tuple[int, ...] = ()) -> list[Found]:
    axes = axes_of(mesh)
    return [_held(rank, P, *run, axes) for run in runs]


def _held(rank: int, P: int, strategy: str, layout: Any, case: Any, axes: tuple[str, ...]) -> Found:
    *qkv, grad = (shard(x, rank, P, layout, padding="edge").contiguous() for x in case.tensors())
    leaves = [x.requires_grad_() for x in qkv]

    def attention() -> tuple[Tensor, int]:
        saved: dict[int, int] = {}

        def save(x: Tensor) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            out = STRATEGIES[strategy].attention(*leaves, case.captures(), **call_keywords(case, layout), axes=axes)
        return out, sum(saved.values())

    _, kept_eagerly = attention()
    with packed_rows() as held, pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_call, "twice_differentiable", lambda out, *_: out)
        out, kept = attention()
        forward = held.most
        held.start()
        torch.autograd.grad(out, leaves, grad)
        return Found(forward, held.most, kept, kept_eagerly, sum(x.untyped_storage().nbytes() for x in leaves))
