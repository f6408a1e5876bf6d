"""Triton forms of `runtime/packing.py`: each element is read once and written once, straight to its place in the message or tensor.

One launch a tensor, whatever the number of ranks. `runtime/fused.py` chooses between these and plain torch, which they are held to.
Imported only where Triton is.
"""

# A kernel is typed by what it is launched with, and launched by subscripting it with a grid. Triton itself may be missing.
# ruff: noqa: ANN001, ANN202
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false, reportMissingImports=false

from __future__ import annotations

from itertools import accumulate
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoseq.runtime.layout import Layout, num_chunks
from autoseq.runtime.packing import pieces_of_heads, shapes_of
from autoseq.runtime.triton_merge import tile_of


@triton.jit
def _split_heads_kernel(
    x, flat, starts, counts, bases, batch, rows, dim, row_tiles, x_at, P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Programs go through (rank, head of its piece, batch, rows); `bases` are where each rank's piece begins."""
    slot = tl.program_id(0) // (row_tiles * batch)
    b = ((tl.program_id(0) // row_tiles) % batch).to(tl.int64)
    i = ((tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    d = tl.arange(0, COLUMNS)[None, :]
    both = (i < rows) & (d < dim)
    first = 0
    for p in tl.static_range(P):
        if (slot >= first) & (slot < first + counts[p]):
            h = (slot - first).to(tl.int64)
            value = tl.load(x + b * x_at[0] + (starts[p] + h) * x_at[1] + i * x_at[2] + d * x_at[3], mask=both)
            tl.store(flat + bases[p] + ((b * counts[p] + h) * rows + i) * dim + d, value, mask=both)
        first += counts[p]


@triton.jit
def _join_heads_kernel(
    flat, x, starts, counts, bases, heads, rows, dim, row_tiles,
    P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """A head is the sum, in dtype SUM, of the pieces that hold it. x is contiguous."""
    pair = tl.program_id(0) // row_tiles
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    i = ((tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    d = tl.arange(0, COLUMNS)[None, :]
    both = (i < rows) & (d < dim)
    total = tl.full([ROWS, COLUMNS], 0.0, SUM)
    for p in tl.static_range(P):
        if (h >= starts[p]) & (h < starts[p] + counts[p]):
            piece = flat + bases[p] + ((b * counts[p] + h - starts[p]) * rows + i) * dim + d
            total += tl.load(piece, mask=both, other=0.0).to(SUM)
    tl.store(x + ((b * heads + h) * rows + i) * dim + d, total.to(x.dtype.element_ty), mask=both)


@triton.jit
def _rows_kernel(
    x, flat, base, rank_size, heads, rows, local_rows, dim, row_tiles, x_at,
    P: tl.constexpr, ZIGZAG: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Between rows in global order and each rank's rows; `layout.to_global` says which are whose."""
    pair = tl.program_id(0) // row_tiles
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    i = ((tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    d = tl.arange(0, COLUMNS)[None, :]
    both = (i < rows) & (d < dim)
    if ZIGZAG:
        half = local_rows // 2
        chunk = i // half
        rank = tl.where(chunk < P, chunk, 2 * P - 1 - chunk)
        local = i % half + tl.where(chunk < P, 0, half)
    else:
        rank = i // local_rows
        local = i % local_rows
    whole = x + b * x_at[0] + h * x_at[1] + i * x_at[2] + d * x_at[3]
    packed = flat + rank * rank_size + base + ((b * heads + h) * local_rows + local) * dim + d
    if PACK:
        tl.store(packed, tl.load(whole, mask=both), mask=both)
    else:
        tl.store(whole, tl.load(packed, mask=both), mask=both)


def split_heads(xs: list[Tensor], starts: list[int], ends: list[int]) -> Tensor:
    """`packing.split_heads`."""
    shapes = [tuple(x.shape) for x in xs]
    flat = xs[0].new_empty(sum(prod(shape) for shape in pieces_of_heads(shapes, starts, ends)))
    for i, x in enumerate(xs):
        B, _, n, dim = x.shape
        rows, columns = tile_of(dim)
        firsts, counts, bases = _of_tensor(i, shapes, starts, ends)
        programs = sum(counts) * B * -(-n // rows)
        if programs and dim:
            with torch.cuda.device_of(x):
                _split_heads_kernel[(programs,)](
                    x, flat, firsts, counts, bases, B, n, dim, -(-n // rows), x.stride(), P=len(counts), ROWS=rows, COLUMNS=columns
                )
    return flat


def join_heads(flat: Tensor, sizes: list[int], starts: list[int], ends: list[int]) -> list[Tensor]:
    """`packing.join_heads`."""
    shapes = shapes_of(sizes)
    xs = [flat.new_empty(shape) for shape in shapes]
    for i, x in enumerate(xs):
        B, H, n, dim = x.shape
        rows, columns = tile_of(dim)
        firsts, counts, bases = _of_tensor(i, shapes, starts, ends)
        if x.numel():
            with torch.cuda.device_of(x):
                _join_heads_kernel[(B * H * -(-n // rows),)](
                    flat, x, firsts, counts, bases, H, n, dim, -(-n // rows), P=len(counts), ROWS=rows, COLUMNS=columns,
                    SUM=tl.float64 if x.dtype == torch.float64 else tl.float32,
                )  # fmt: skip
    return xs


def join_rows(flat: Tensor, sizes: list[int], P: int, layout: Layout) -> list[Tensor]:
    """`packing.join_rows`."""
    ys = [flat.new_empty((B, h, P * s, dim)) for B, h, s, dim in shapes_of(sizes)]
    _move_rows(ys, flat, P, layout, pack=False)
    return ys


def split_rows(ys: list[Tensor], P: int, layout: Layout) -> Tensor:
    """`packing.split_rows`."""
    flat = ys[0].new_empty(sum(y.numel() for y in ys))
    _move_rows(ys, flat, P, layout, pack=True)
    return flat


def _move_rows(ys: list[Tensor], flat: Tensor, P: int, layout: Layout, *, pack: bool) -> None:
    base = 0
    for y in ys:
        B, h, n, dim = y.shape
        rows, columns = tile_of(dim)
        if y.numel():
            with torch.cuda.device_of(y):
                _rows_kernel[(B * h * -(-n // rows),)](
                    y, flat, base, flat.numel() // P, h, n, n // P, dim, -(-n // rows), y.stride(),
                    P=P, ZIGZAG=num_chunks(layout) == 2, PACK=pack, ROWS=rows, COLUMNS=columns,
                )  # fmt: skip
        base += y.numel() // P


def _of_tensor(
    i: int, shapes: list[tuple[int, ...]], starts: list[int], ends: list[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of tensor i, rank by rank: the first head, how many, and where its piece begins."""
    sizes = [prod(shape) // max(1, shape[1]) for shape in shapes]
    counts = [end - start for start, end in zip(starts, ends, strict=True)]
    bases = [0, *accumulate(count * sizes[j % len(shapes)] for j, count in enumerate(counts))]
    every = slice(i, None, len(shapes))
    return tuple(starts[every]), tuple(counts[every]), tuple(bases[:-1][every])
