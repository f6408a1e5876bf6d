"""The work that is benchmarked: one attention, its tensors, the rows a rank holds of them, and the answer to check against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from autoseq.runtime.layout import Layout, rank_positions
from autoseq.runtime.strategy import Site

MaskKind = Literal["none", "causal", "window"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Two orders of summation differ by the rounding of a few thousand terms; halves are rounded on their way in and out, 2^-9 each.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 3e-2, "float16": 1e-2}


@dataclass(frozen=True, slots=True)
class Work:
    """Forward and backward of one attention, in global sizes."""

    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    dtype: str = "float32"
    mask: MaskKind = "causal"
    window: int = 256

    @property
    def max_ahead(self) -> int | None:
        return None if self.mask == "none" else 0

    @property
    def max_behind(self) -> int | None:
        return self.window - 1 if self.mask == "window" else None

    def site(self, mesh: tuple[int, ...] = ()) -> Site:
        """As strategies are asked about it."""
        n, D = self.seq_len, self.head_dim
        element_bytes = DTYPES[self.dtype].itemsize
        return Site(self.batch, n, n, self.heads, self.kv_heads, D, D, element_bytes, self.max_ahead, self.max_behind, mesh=mesh)

    def tensors(self) -> tuple[Tensor, ...]:
        """q, k, v and the gradient of out, [B,H,S,D] and [B,K,S,D]; the same on every rank."""
        generator = torch.Generator().manual_seed(0)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        shapes = [(self.batch, count, self.seq_len, self.head_dim) for count in heads]
        return tuple(torch.randn(shape, generator=generator).to(DTYPES[self.dtype]) for shape in shapes)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention to whole sequences, heads first, as a user of torch writes it."""
        mask = self.dense_mask() if self.mask == "window" else None
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.mask == "causal", enable_gqa=gqa)

    def dense_mask(self) -> Tensor:
        i = torch.arange(self.seq_len)
        return (i <= i[:, None]) & (i > i[:, None] - self.window)

    def answer(self) -> tuple[Tensor, ...]:
        """out, dq, dk, dv on one device."""
        *qkv, grad = self.tensors()
        leaves = [x.requires_grad_() for x in qkv]
        out = self.sdpa(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)


def rows_of(x: Tensor, rank: int, P: int, layout: Layout) -> Tensor:
    """A rank's rows of [B,H,S,D]; S is a multiple of what the layout needs."""
    return x[:, :, rank_positions(rank, P, x.shape[2] // P, layout, x.device)]


def relative_error(x: Tensor, expected: Tensor) -> float:
    """L2, relative to the expected norm."""
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()
