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
    if why_plain(out):
        plain.merge(out, lse, block_out, block_lse)
    else:
        from autoseq.runtime import triton_merge

        triton_merge.merge(out, lse, block_out, block_lse)


def accumulate(totals: Sequence[Tensor], shares: Sequence[Tensor]) -> None:
    """Add each share to its total, in place and in the total's dtype: [B,H,n,D] of any strides."""
    if why_plain(totals[0]):
        plain.accumulate(totals, shares)
    else:
        from autoseq.runtime import triton_merge

        triton_merge.accumulate(totals, shares)


def split_heads(xs: list[Tensor], starts: list[int], ends: list[int]) -> Tensor:
    """`packing.split_heads`."""
    if why_plain(xs[0]):
        return packing.split_heads(xs, starts, ends)
    from autoseq.runtime import triton_packing

    return triton_packing.split_heads(xs, starts, ends)


def join_heads(flat: Tensor, sizes: list[int], starts: list[int], ends: list[int]) -> list[Tensor]:
    """`packing.join_heads`."""
    if why_plain(flat):
        return packing.join_heads(flat, sizes, starts, ends)
    from autoseq.runtime import triton_packing

    return triton_packing.join_heads(flat, sizes, starts, ends)


def split_rows(ys: list[Tensor], P: int, layout: Layout) -> Tensor:
    """`packing.split_rows`."""
    if why_plain(ys[0]):
        return packing.split_rows(ys, P, layout)
    from autoseq.runtime import triton_packing

    return triton_packing.split_rows(ys, P, layout)


def join_rows(flat: Tensor, sizes: list[int], P: int, layout: Layout) -> list[Tensor]:
    """`packing.join_rows`."""
    if why_plain(flat):
        return packing.join_rows(flat, sizes, P, layout)
    from autoseq.runtime import triton_packing

    return triton_packing.join_rows(flat, sizes, P, layout)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
