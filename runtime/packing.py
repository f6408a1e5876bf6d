"""Packs tensors into one message for an all-to-all, and unpacks it: heads for rows and back, each in one copy.

The orders are those of `runtime/head_exchange.py`: pieces for rank 0 first, within them tensor by tensor, each piece contiguous.
Starts and ends of heads come tensor by tensor for rank 0, then for rank 1, ... On CUDA `runtime/fused.py` takes Triton's forms.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

from torch import Tensor

from autoseq.runtime.layout import Layout, num_chunks
from autoseq.runtime.plain import accumulate_dtype

Shape = tuple[int, ...]


def split_heads(xs: list[Tensor], starts: list[int], ends: list[int]) -> Tensor:
    """One flat buffer: for each rank in turn, its heads [start, end) of each [B,H,s,D]."""
    pieces = pieces_of_heads([tuple(x.shape) for x in xs], starts, ends)
    flat = xs[0].new_empty(sum(prod(shape) for shape in pieces))
    parts = flat.split([prod(shape) for shape in pieces])
    for i, (part, shape, start, end) in enumerate(zip(parts, pieces, starts, ends, strict=True)):
        part.view(shape).copy_(xs[i % len(xs)][:, start:end])
    return flat


def join_heads(flat: Tensor, sizes: list[int], starts: list[int], ends: list[int]) -> list[Tensor]:
    """The transpose of split_heads: tensors of the given sizes [B,H,s,D]; heads that came from several ranks are summed.

    The sum is float32: in bfloat16 the error would grow with the number of ranks that share a KV head.
    """
    shapes = shapes_of(sizes)
    pieces = pieces_of_heads(shapes, starts, ends)
    dtype = accumulate_dtype(flat.dtype) if _overlap(starts, ends, len(shapes)) else flat.dtype
    totals = [flat.new_zeros(shape, dtype=dtype) for shape in shapes]
    parts = flat.split([prod(shape) for shape in pieces])
    for i, (part, shape, start, end) in enumerate(zip(parts, pieces, starts, ends, strict=True)):
        totals[i % len(totals)][:, start:end] += part.view(shape)
    return [total.to(flat.dtype) for total in totals]


def join_stages(flats: list[Tensor], sizes: list[int], tensors: list[int], starts: list[int], ends: list[int]) -> list[Tensor]:
    """`join_heads` from several buffers, one after the other: piece i is of heads [start, end) of tensor `tensors[i]`."""
    pieces = [piece for piece in zip(tensors, starts, ends, strict=True) if piece[1] < piece[2]]
    shared = [_shared([heads for i, *heads in pieces if i == number]) for number in range(len(sizes) // 4)]
    dtype = flats[0].dtype
    accumulate = accumulate_dtype(dtype)
    totals = [
        flats[0].new_zeros(shape, dtype=accumulate) if several else flats[0].new_empty(shape)
        for shape, several in zip(shapes_of(sizes), shared, strict=True)
    ]
    left = iter(pieces)
    for flat in flats:
        place = 0
        while place < flat.numel():
            number, start, end = next(left)
            target = totals[number][:, start:end]
            piece = flat[place : place + target.numel()].view(target.shape)
            place += target.numel()
            target.add_(piece) if shared[number] else target.copy_(piece)
    return [total.to(dtype) for total in totals]


def join_rows(flat: Tensor, sizes: list[int], P: int, layout: Layout) -> list[Tensor]:
    """Tensors [B,h,P*s,D] in global order, from the flat buffers of all ranks; sizes are each tensor's [B,h,s,D]."""
    shapes = shapes_of(sizes)
    ys = [flat.new_empty((B, h, P * s, D)) for B, h, s, D in shapes]
    for y, ranked in zip(ys, _ranked(flat, shapes, P), strict=True):
        for whole, part in _chunks(y, ranked, P, layout):
            whole.copy_(part)
    return ys


def split_rows(ys: list[Tensor], P: int, layout: Layout) -> Tensor:
    """The inverse of join_rows: for each rank in turn, its rows of each [B,h,P*s,D]."""
    flat = ys[0].new_empty(sum(y.numel() for y in ys))
    shapes = [(y.shape[0], y.shape[1], y.shape[2] // P, y.shape[3]) for y in ys]
    for y, ranked in zip(ys, _ranked(flat, shapes, P), strict=True):
        for whole, part in _chunks(y, ranked, P, layout):
            part.copy_(whole)
    return flat


def _ranked(flat: Tensor, shapes: list[Shape], P: int) -> list[Tensor]:
    """Views [P,B,h,s,D] of each tensor's pieces of a flat buffer."""
    parts = flat.view(P, flat.numel() // P).split([prod(shape) for shape in shapes], 1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _chunks(y: Tensor, ranked: Tensor, P: int, layout: Layout) -> list[tuple[Tensor, Tensor]]:
    """The same rows as views [B,h,P,rows,D] of a tensor in global order and of its pieces [P,B,h,s,D], as few as there can be."""
    pieces = ranked.movedim(0, 2)
    if num_chunks(layout) == 1:
        return [(y.unflatten(2, (P, y.shape[2] // P)), pieces)]
    # The late chunks come in the reverse order of the ranks, and a view cannot go backwards.
    half = y.shape[2] // (2 * P)
    early, late = pieces[:, :, :, :half], pieces[:, :, :, half:]
    chunks = y.unflatten(2, (2 * P, half))
    return [(chunks[:, :, :P], early), *((chunks[:, :, 2 * P - 1 - p], late[:, :, p]) for p in range(P))]


def pieces_of_heads(shapes: list[Shape], starts: list[int], ends: list[int]) -> list[Shape]:
    """The shape of each piece [B,heads,s,D], in the order of the message."""
    whole = [shapes[i % len(shapes)] for i in range(len(starts))]
    return [(B, end - start, s, D) for (B, _, s, D), start, end in zip(whole, starts, ends, strict=True)]


def shapes_of(sizes: list[int]) -> list[Shape]:
    """Sizes as an operator's schema holds them, four a tensor, as shapes."""
    return [tuple(sizes[i : i + 4]) for i in range(0, len(sizes), 4)]


def _overlap(starts: list[int], ends: list[int], num_tensors: int) -> bool:
    """Whether some head is on several ranks."""
    later = zip(starts[num_tensors:], ends[: len(ends) - num_tensors], strict=True)
    return any(start < end for start, end in later)


def _shared(ranges: list[list[int]]) -> bool:
    """Whether some head is in several ranges."""
    return any(start < end for (_, end), (start, _) in pairwise(sorted(ranges)))
