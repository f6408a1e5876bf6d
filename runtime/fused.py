"""What stands between a strategy's messages and its kernels, in one pass each: by Triton on CUDA, by plain torch elsewhere.

    merge            a block's (out, lse) into the running ones
    accumulate       a block's dq, dk and dv into the sums
    split_heads, join_heads, split_rows, join_rows      what an all-to-all sends and receives

Triton comes with CUDA builds of torch; where it is missing, the plain forms serve CUDA too.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoseq.runtime import packing, plain
from autoseq.runtime.layout import Layout

_OLDEST = (7, 0)  # the oldest compute capability that Triton compiles for


def why_plain(x: Tensor) -> str:
    """Why the Triton forms do not serve tensors like x; "" if they do."""
    if x.device.type != "cuda":
        return "Triton compiles for GPUs only"
    return missing() or ("" if _capability(x.device) >= _OLDEST else "Triton needs compute capability 7.0")


@functools.cache
def missing() -> str:
    """Why Triton is not there, and what to do about that."""
    there = importlib.util.find_spec("triton") is not None
    return "" if there else "Triton is not installed; it comes with CUDA builds of torch, or: pip install triton"


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block's (out, lse) into the accumulators, in place: out [B,H,n,Dv] and lse [B,H,n] of any strides."""
    _merging(out).merge(out, lse, block_out, block_lse)


def accumulate(totals: Sequence[Tensor], shares: Sequence[Tensor]) -> None:
    """Add each share to its total, in place and in the total's dtype: [B,H,n,D] of any strides."""
    _merging(totals[0]).accumulate(totals, shares)


def split_heads(xs: list[Tensor], starts: list[int], ends: list[int]) -> Tensor:
    """`packing.split_heads`."""
    return _packing(xs[0]).split_heads(xs, starts, ends)


def join_heads(flat: Tensor, sizes: list[int], starts: list[int], ends: list[int]) -> list[Tensor]:
    """`packing.join_heads`."""
    return _packing(flat).join_heads(flat, sizes, starts, ends)


def split_rows(ys: list[Tensor], P: int, layout: Layout) -> Tensor:
    """`packing.split_rows`."""
    return _packing(ys[0]).split_rows(ys, P, layout)


def join_rows(flat: Tensor, sizes: list[int], P: int, layout: Layout) -> list[Tensor]:
    """`packing.join_rows`."""
    return _packing(flat).join_rows(flat, sizes, P, layout)


# Triton may be missing, so its forms are imported where they serve.


def _merging(x: Tensor) -> Any:
    """The module whose forms merge and add tensors like x."""
    if why_plain(x):
        return plain
    from autoseq.runtime import triton_merge

    return triton_merge


def _packing(x: Tensor) -> Any:
    """The module whose forms pack tensors like x."""
    if why_plain(x):
        return packing
    from autoseq.runtime import triton_packing

    return triton_packing


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
