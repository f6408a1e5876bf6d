"""Triton forms of what a block's results go through: the merge of (out, lse), and the sums of dq, dk and dv. One pass, one launch each.

`runtime/fused.py` chooses between these and plain torch, which they are held to. Imported only where Triton is.
"""

# A kernel is typed by what it is launched with, and launched by subscripting it with a grid. Triton itself may be missing.
# ruff: noqa: ANN001, ANN202
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false, reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # elements of a program: enough to keep a GPU's memory busy, few enough for its registers


@triton.jit
def _merge_kernel(
    out, lse, block_out, block_lse, heads, rows, dim, row_tiles, out_at, lse_at, block_out_at, block_lse_at,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`*_at` are strides. Offsets are 64 bits wide: long sequences exceed 2^31 elements."""
    pair = tl.program_id(0) // row_tiles
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    i = ((tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    inside = i < rows
    before_at = lse + b * lse_at[0] + h * lse_at[1] + i * lse_at[2]
    before = tl.load(before_at, mask=inside, other=0.0)
    block = tl.load(block_lse + b * block_lse_at[0] + h * block_lse_at[1] + i * block_lse_at[2], mask=inside, other=0.0).to(before.dtype)
    nothing = block == float("-inf")
    weight = tl.where(nothing, 0.0, 1 / (1 + tl.exp(before - block)))

    both = inside[:, None] & (d < dim)[None, :]
    total_at = out + b * out_at[0] + h * out_at[1] + i[:, None] * out_at[2] + d[None, :] * out_at[3]
    part_at = block_out + b * block_out_at[0] + h * block_out_at[1] + i[:, None] * block_out_at[2] + d[None, :] * block_out_at[3]
    total = tl.load(total_at, mask=both, other=0.0)
    part = tl.load(part_at, mask=both, other=0.0).to(total.dtype)
    w = weight[:, None]
    tl.store(total_at, tl.where(w < 0.5, total + w * (part - total), part - (part - total) * (1 - w)), mask=both)

    # The log of the sum, from the larger: where both are -inf there is nothing to add.
    high, low = tl.maximum(before, block), tl.minimum(before, block)
    tl.store(before_at, tl.where(low == float("-inf"), high, high + tl.log(1 + tl.exp(low - high))), mask=inside)


@triton.jit
def _add_kernel(totals, shares, heads, rows, dims, row_tiles, ends, totals_at, shares_at, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tuples hold one entry a pair of tensors; `ends` are the programs that are done after each pair."""
    first = 0
    for n in tl.static_range(len(COLUMNS)):
        if (tl.program_id(0) >= first) & (tl.program_id(0) < ends[n]):
            program = tl.program_id(0) - first
            pair = program // row_tiles[n]
            b, h = (pair // heads[n]).to(tl.int64), (pair % heads[n]).to(tl.int64)
            i = ((program % row_tiles[n]) * ROWS[n] + tl.arange(0, ROWS[n])).to(tl.int64)[:, None]
            d = tl.arange(0, COLUMNS[n])[None, :]
            both = (i < rows[n]) & (d < dims[n])
            at = totals[n] + b * totals_at[n][0] + h * totals_at[n][1] + i * totals_at[n][2] + d * totals_at[n][3]
            share_at = shares[n] + b * shares_at[n][0] + h * shares_at[n][1] + i * shares_at[n][2] + d * shares_at[n][3]
            total = tl.load(at, mask=both, other=0.0)
            tl.store(at, total + tl.load(share_at, mask=both, other=0.0).to(total.dtype), mask=both)
        first = ends[n]


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """`plain.merge`."""
    B, H, n, dim = out.shape
    rows, columns = tile_of(dim)
    row_tiles = -(-n // rows)
    if out.numel():
        with torch.cuda.device_of(out):
            _merge_kernel[(B * H * row_tiles,)](
                out, lse, block_out, block_lse, H, n, dim, row_tiles, out.stride(), lse.stride(), block_out.stride(), block_lse.stride(),
                ROWS=rows, COLUMNS=columns,
            )  # fmt: skip


def accumulate(totals: Sequence[Tensor], shares: Sequence[Tensor]) -> None:
    """`plain.accumulate`."""
    pairs = [(total, share) for total, share in zip(totals, shares, strict=True) if total.numel()]
    tiles = [tile_of(total.shape[3]) for total, _ in pairs]
    row_tiles = [-(-total.shape[2] // rows) for (total, _), (rows, _) in zip(pairs, tiles, strict=True)]
    ends, done = [], 0
    for (total, _), count in zip(pairs, row_tiles, strict=True):
        done += total.shape[0] * total.shape[1] * count
        ends.append(done)
    if not pairs:
        return
    heads, rows, dims = (tuple(total.shape[dim] for total, _ in pairs) for dim in (1, 2, 3))
    with torch.cuda.device_of(pairs[0][0]):
        _add_kernel[(done,)](
            tuple(total for total, _ in pairs), tuple(share for _, share in pairs), heads, rows, dims, tuple(row_tiles), tuple(ends),
            tuple(total.stride() for total, _ in pairs), tuple(share.stride() for _, share in pairs),
            ROWS=tuple(rows for rows, _ in tiles), COLUMNS=tuple(columns for _, columns in tiles),
        )  # fmt: skip


def tile_of(dim: int) -> tuple[int, int]:
    """Rows and columns of a program's tile, powers of 2, for rows of `dim` elements."""
    columns = triton.next_power_of_2(dim)
    return max(1, _TILE // columns), columns
