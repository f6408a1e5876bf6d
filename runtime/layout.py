"""Which rank holds which rows of a sharded dimension.

The sequence is cut into equal chunks, the last ones padded. `contiguous` gives rank r chunk r of P. `zigzag` gives it chunks
r and 2P-1-r of 2P, which balances causal attention: every rank then holds an early and a late piece (the order of
zigzag ring attention, as in Brandon et al., "Striped Attention", arXiv:2311.09431, section 5, and ring-flash-attention).

Lengths may be `torch.SymInt`; the number of ranks P is always a plain int. "Rank-major" means rank 0's rows, then rank 1's,
as an all-gather delivers them; "global" means the order of the unsharded sequence.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Layout = Literal["contiguous", "zigzag"]


def num_chunks(layout: Layout) -> int:
    """Chunks that each rank holds."""
    return {"contiguous": 1, "zigzag": 2}[layout]


def grain(P: int, layout: Layout) -> int:
    """The padded global length is a multiple of this."""
    return P * num_chunks(layout)


def local_length(n: int, P: int, layout: Layout) -> int:
    """Rows per rank, padding included: the same on every rank."""
    return (n + grain(P, layout) - 1) // grain(P, layout) * num_chunks(layout)


def rank_chunks(rank: int, P: int, layout: Layout) -> list[int]:
    """The ids of the chunks that `rank` holds, in its local order."""
    return [rank] if num_chunks(layout) == 1 else [rank, 2 * P - 1 - rank]


def chunk_ranges(rank: int, P: int, s: int, n: int, layout: Layout) -> list[tuple[int, int, int]]:
    """(local start, global start, valid rows) of each chunk of `rank`, for s padded rows per rank and n valid rows in all."""
    chunk = s // num_chunks(layout)
    starts = [(i * chunk, c * chunk) for i, c in enumerate(rank_chunks(rank, P, layout))]
    return [(local, start, max(0, min(chunk, n - start))) for local, start in starts]


def rank_positions(rank: int, P: int, s: int, layout: Layout, device: torch.device | str) -> Tensor:
    """The global positions of the s padded rows of `rank`; padding has positions n and above. Shape (s,), int64."""
    chunk = s // num_chunks(layout)
    pieces = [torch.arange(chunk, device=device) + c * chunk for c in rank_chunks(rank, P, layout)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def to_global(x: Tensor, dim: int, P: int, layout: Layout) -> Tensor:
    """Rank-major rows in `dim` (P*s of them) to global order."""
    if num_chunks(layout) == 1 or P == 1:
        return x
    early, late = x.unflatten(dim, (P, 2, x.shape[dim] // (2 * P))).unbind(dim % x.ndim + 1)
    return torch.cat([early, late.flip(dim % x.ndim)], dim % x.ndim).flatten(dim % x.ndim, dim % x.ndim + 1)


def to_ranked(x: Tensor, dim: int, P: int, layout: Layout) -> Tensor:
    """Global order in `dim` (P*s padded rows) to rank-major rows: the inverse of `to_global`."""
    if num_chunks(layout) == 1 or P == 1:
        return x
    dim = dim % x.ndim
    early, late = x.unflatten(dim, (2, P, x.shape[dim] // (2 * P))).unbind(dim)
    return torch.stack([early, late.flip(dim)], dim + 1).flatten(dim, dim + 2)
