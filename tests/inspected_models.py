"""Models that are inspected: one attention with whatever follows it, and those of `models` by name."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models

EXAMPLE = "examples/plain_gpt.py:tiny"


class OneAttention(nn.Module):
    """One causal attention, and after it whatever a test asks for."""

    def __init__(self, after: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.qkv, self.out, self.after = nn.Linear(8, 24), nn.Linear(8, 8), after

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(self.after(y.transpose(1, 2).flatten(2)))


def make_one(after: Callable[[Tensor], Tensor] = lambda y: y, with_mask: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    mask = {"mask": torch.rand(16, 16) > 0.5} if with_mask else {}
    return OneAttention(after), {"x": torch.randn(1, 16, 8), **mask}


def make_model(name: str, batch_size: int, length: int) -> tuple[nn.Module, dict[str, Any]]:
    return models.make(name), dict(models.batch(name, batch_size=batch_size, length=length))


def break_graph(y: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return y
