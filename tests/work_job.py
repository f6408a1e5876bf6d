"""Counts what attentions call on a rank: kernels, and pieces that are computed plainly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from attention_job import Run, axes_of, call_keywords, shard
from autoseq.runtime import blocks, blockwise, work_counts
from autoseq.runtime.strategies import STRATEGIES

TILE = 4


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles of a few rows, so that short sequences have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "TILE", TILE)
        # What was counted in tiles of another size says nothing here, nor what is counted here later.
        work_counts._of_site.cache_clear()
        try:
            yield
        finally:
            work_counts._of_site.cache_clear()


def count_calls(rank: int, P: int, runs: list[Run], mesh: tuple[int, ...] = ()) -> list[tuple[int, int]]:
    """How often a forward, and then a backward, computes a piece."""
    axes, calls = axes_of(mesh), [0]

    def counted(compute: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[0] += 1
            return compute(*args)

        return call

    with small_tiles(), pytest.MonkeyPatch.context() as patch:
        for owner, name in [(blockwise, "attend"), (blockwise, "attend_backward")]:
            patch.setattr(owner, name, counted(getattr(owner, name)))
        for kind in (blockwise.Forward, blockwise.Backward):
            patch.setattr(kind, "_plain", counted(kind._plain))
        return [_calls_of(rank, P, *run, axes, calls) for run in runs]


def _calls_of(rank: int, P: int, strategy: str, layout: Any, case: Any, axes: tuple[str, ...], calls: list[int]) -> tuple[int, int]:
    *qkv, grad = (shard(x, rank, P, layout, padding="edge") for x in case.tensors())
    leaves = [x.requires_grad_() for x in qkv]
    captures, sinks, seed = case.captures(), case.sinks(), case.dropout_seed()
    calls[0] = 0
    out = STRATEGIES[strategy].attention(*leaves, captures, sinks, seed, **call_keywords(case, layout), axes=axes)
    forward, calls[0] = calls[0], 0
    torch.autograd.grad(out, [*leaves, *(x for x in captures if x.requires_grad)], grad)
    return forward, calls[0]
