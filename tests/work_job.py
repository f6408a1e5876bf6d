"""Counts what attentions call on a rank: kernels, pieces that are computed plainly, and the packing of heads and keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_job import Run, axes_of, call_keywords, shard
from autoseq.runtime import blocks, blockwise, fused, gather_kv, gathered, packing
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.tiles import Tile
from autoseq.runtime.timeline import NO_WORK, Work

TILE = 4


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles of a few rows, so that short sequences have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "TILE", TILE)
        yield


def count_calls(rank: int, P: int, runs: list[Run], mesh: tuple[int, ...] = ()) -> list[tuple[Work, Work]]:
    """How often a forward, and then a backward, computes a piece, what pairs it is given then, and what it packs; nothing else."""
    axes, made = axes_of(mesh), [NO_WORK]

    def counted(compute: Any, first: int) -> Any:
        """`first` is the place of the queries among the arguments; keys and values follow."""

        def call(*args: Any) -> Any:
            made[0] += _given(args[first], args[first + 1], args[-1] if isinstance(args[-1], Tile) else args[-3:-1])
            return compute(*args)

        return call

    def packed(copy: Any) -> Any:
        """Packing gives the buffer, unpacking gets it, or several."""

        def call(first: Any, *args: Any) -> Any:
            result = copy(first, *args)
            buffers = [result] if isinstance(result, Tensor) else [first] if isinstance(first, Tensor) else first
            made[0] += replace(NO_WORK, packed_bytes=sum(buffer.nbytes for buffer in buffers))
            return result

        return call

    with small_tiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "attend", counted(blockwise.attend, 0))
        patch.setattr(blockwise, "attend_backward", counted(blockwise.attend_backward, 1))
        patch.setattr(blockwise.Forward, "_plain", counted(blockwise.Forward._plain, 1))
        patch.setattr(blockwise.Backward, "_plain", counted(blockwise.Backward._plain, 2))
        for name in ("split_heads", "join_heads", "split_rows", "join_rows"):
            patch.setattr(fused, name, packed(getattr(fused, name)))
        patch.setattr(packing, "join_stages", packed(packing.join_stages))
        patch.setattr(gather_kv, "pack_rows", packed(gather_kv.pack_rows))
        for name in ("pack_keys", "pack_gradients"):
            patch.setattr(gathered, name, packed(getattr(gathered, name)))
        return [_calls_of(rank, P, *run, axes, made) for run in runs]


def _given(q: Tensor, k: Tensor, masked: Tile | tuple[Tensor | None, bool]) -> Work:
    """One call; kernels are told what is masked by a tensor, or that it is causal."""
    bias, is_causal = (masked.allowed, masked.causal) if isinstance(masked, Tile) else masked
    rows = q.shape[0] * q.shape[1] * q.shape[2]
    kind = "masked_pairs" if bias is not None else "causal_pairs" if is_causal else "full_pairs"
    return Work(0, 1, 0, causal_rows=rows if is_causal else 0, **{kind: rows * k.shape[2]})


def _calls_of(rank: int, P: int, strategy: str, layout: Any, case: Any, axes: tuple[str, ...], made: list[Work]) -> tuple[Work, Work]:
    *qkv, grad = (shard(x, rank, P, layout, padding="edge") for x in case.tensors())
    leaves = [x.requires_grad_() for x in qkv]
    captures, sinks, seed = case.captures(), case.sinks(), case.dropout_seed()
    made[0] = NO_WORK
    out = STRATEGIES[strategy].attention(*leaves, captures, sinks, seed, **call_keywords(case, layout), axes=axes)
    forward, made[0] = made[0], NO_WORK
    torch.autograd.grad(out, [*leaves, *(x for x in captures if x.requires_grad)], grad)
    return forward, made[0]
