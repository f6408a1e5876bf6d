"""Strided views: `as_strided` reads memory, and a rank's memory is laid out otherwise than one device's. It becomes an index.

Part of `normalize`, called where `hidden_writes` meets the operator.

    y.as_strided((4, 3), (8, 1), 2)      →      y.permute(by stride).reshape(-1)[2 + 8 * arange(4)[:, None] + arange(3)]

Legal because a tensor that fills its memory without gaps, its dims in the order of their strides, is that memory. Sizes and strides
are those of the traced program, which are one device's; so no gather and no kernel that chooses other strides changes the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from autoseq.passes.sizes import hint


@dataclass(frozen=True, slots=True)
class Strided:
    """A strided view of `base`, at `offset` from its start. `order` has the dims of `base`, the outermost in memory first."""

    base: Tensor
    order: tuple[int, ...]
    size: tuple[Any, ...]
    stride: tuple[Any, ...]
    offset: Any

    def read(self, base: Tensor) -> Tensor:
        return base.permute(self.order).reshape(-1)[self._index()]

    def write_back(self, values: Tensor) -> Tensor:
        """`base` with the values of the view."""
        opened = self.base.permute(self.order)
        flat = opened.reshape(-1).index_put((self._index(),), values)
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return flat.reshape(opened.shape).permute(back)

    def _index(self) -> Tensor:
        index = torch.full((), self.offset, dtype=torch.int64, device=self.base.device)
        for size, stride in zip(self.size, self.stride, strict=True):
            index = index.unsqueeze(-1) + torch.arange(size, device=self.base.device) * stride
        return index


def strided(
    x: Tensor, values: Tensor, size: Sequence[Any], stride: Sequence[Any], storage_offset: Any = None
) -> Strided | Literal["has gaps", "does not hold all of it"]:
    """`x.as_strided(size, stride, storage_offset)` of `values`, which x has; or why it is no index of them.

    A tensor that is itself a view with gaps is not its memory. Around a view autograd knows no history, and a rank no memory.
    """
    order = tuple(sorted(range(x.dim()), key=lambda dim: -hint(x.stride(dim))))
    numel: Any = 1
    for dim in reversed(order):
        if hint(x.shape[dim]) != 1 and hint(x.stride(dim)) != hint(numel):
            return "has gaps"
        numel = numel * x.shape[dim]
    first = 0 if storage_offset is None else storage_offset - x.storage_offset()
    last = first + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if all(hint(n) for n in size) and not 0 <= hint(first) <= hint(last) < hint(numel):
        return "does not hold all of it"
    return Strided(values, order, tuple(size), tuple(stride), first)
