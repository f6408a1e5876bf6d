"""The blocks of a `BlockMask`: part of flex_attention's mask only where they say something else than its mask_mod.

torch's compiled kernels visit the listed blocks only, and apply the mask_mod in those that are not listed as full. For a block
mask that `create_block_mask` made, that is the mask_mod itself, and the blocks are dropped. One that was put together by hand
(`BlockMask.from_kv_blocks` without a mask_mod, or beside a wider one) hides keys by its blocks alone; then

    allowed = full[b, h, q // 128, k // 128] | (partial[b, h, q // 128, k // 128] & mask_mod(b, h, q, k))

Which of the two it is shows at the corners of every block, in the values of the first call.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.nn.attention.flex_attention import _LARGE_SPARSE_BLOCK_SIZE

from autoseq.passes.sizes import hint


@dataclass(frozen=True, slots=True)
class Blocks:
    """The operands of a `BlockMask` that decide which keys a query meets: nodes of a graph, or their values."""

    counts: Any  # [Bm, Hm, query blocks]: how many of `indices` count
    indices: Any
    full_counts: Any
    full_indices: Any
    sizes: tuple[Any, Any]

    @staticmethod
    def of(block_mask: tuple[Any, ...]) -> "Blocks":
        return Blocks(*block_mask[2:6], sizes=(block_mask[-3], block_mask[-2]))

    @property
    def operands(self) -> list[Any]:
        return [self.counts, self.indices] + ([] if self.full_counts is None else [self.full_counts, self.full_indices])

    def say_nothing(self, values: Mapping[fx.Node, Any], buffers: tuple[Any, ...], mask_mod: Callable[..., Any], lengths: Any) -> bool:
        """Whether the blocks are those of the mask_mod: made from it in the graph, or like it in the values of the first call."""
        if self.sizes[0] == _LARGE_SPARSE_BLOCK_SIZE or "in create_block_mask" in self.counts.meta.get("stack_trace", ""):
            return True
        *known, q_len, k_len, q_size, k_size = (_first_value(x, values) for x in (*self.operands, *buffers, *lengths, *self.sizes))
        if any(isinstance(x, FakeTensor) for x in known):
            return True  # nothing is computed from this graph
        if any(x is None for x in known):
            return False
        blocks, captured = known[: len(self.operands)], known[len(self.operands):]
        return agree(blocks, (q_size, k_size), mask_mod, captured, (q_len, k_len))


def _first_value(x: Any, values: Mapping[fx.Node, Any]) -> Any:
    value = values.get(x) if isinstance(x, fx.Node) else x
    return hint(value) if isinstance(value, torch.SymInt) else value


def agree(blocks: list[Tensor], sizes: tuple[int, int], mask_mod: Callable[..., Any], buffers: list[Any], lengths: tuple[int, int]) -> bool:
    """Whether at every block's corners the mask_mod allows only what is listed, and all of what is listed as full."""
    device, (B, H, _) = blocks[0].device, blocks[0].shape
    corners = [_corners(length, size, device) for length, size in zip(lengths, sizes, strict=True)]
    whole = mask_mod(torch.arange(B, device=device), torch.arange(H, device=device), *corners, *buffers)
    at_blocks = [corner // size for corner, size in zip(corners, sizes, strict=True)]
    counts = [-(-length // size) for length, size in zip(lengths, sizes, strict=True)]
    partial, full = (_lookup(listed(*pair, counts[1]), *at_blocks) for pair in _pairs(blocks))
    return bool((~whole | partial | full).all() and (whole | ~full).all())


def _corners(length: int, size: int, device: torch.device) -> Tensor:
    first = torch.arange(0, length, size, device=device)
    return torch.stack([first, (first + size - 1).clamp(max=length - 1)], 1).flatten()


def _pairs(blocks: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    none = (torch.zeros_like(blocks[0]), torch.zeros_like(blocks[1]))
    return [(blocks[0], blocks[1]), (blocks[2], blocks[3]) if len(blocks) == 4 else none]


def listed(counts: Tensor, indices: Tensor, num_columns: Any) -> Tensor:
    """[B, H, query blocks, key blocks], true for the first `counts` of `indices` in each row."""
    counted = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    columns = torch.where(counted, indices, num_columns).long()  # one column more takes what does not count
    table = torch.zeros((*counts.shape, num_columns + 1), dtype=torch.bool, device=indices.device)
    return table.scatter(-1, columns, torch.ones_like(columns, dtype=torch.bool))[..., :num_columns]


def _lookup(table: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return table[:, :, q.unsqueeze(1), k.unsqueeze(0)]


def allowed(q: Tensor, k: Tensor, mask: Tensor | None, q_size: int, k_size: int, *blocks: Tensor) -> Tensor:
    """The whole mask, from query and key positions, the mask_mod's mask and the blocks."""
    num_columns = (k.shape[0] + k_size - 1) // k_size
    partial, full = (_lookup(listed(*pair, num_columns), q // q_size, k // k_size) for pair in _pairs(list(blocks)))
    return full | (partial if mask is None else partial & mask)
