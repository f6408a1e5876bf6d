"""What kernels of one block have in common: what a call looks like to them, and how tensors are laid out for them.

`runtime/kernels.py` chooses among them; each kernel is a `Kernel`: whether it is there, whether it can serve a call, forward, backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_MADE_OF: MutableMapping[Tensor, dict[Hashable, Tensor]] = WeakTensorKeyDictionary()

HALVES = (torch.float16, torch.bfloat16)

BiasKind = Literal["none", "mask", "float"]
"""What is added to the scores: nothing, 0 or -inf (a boolean tensor), or numbers."""

Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], tuple[Tensor, Tensor]]
"""(q, k, v, attn_bias, is_causal, scale) -> out, lse."""

Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, bool, float], tuple[Tensor, Tensor, Tensor]
]
"""(grad_out, q, k, v, out, lse, attn_bias, is_causal, scale) -> dq, dk, dv; lse is +inf in a row without keys."""


@dataclass(frozen=True, slots=True)
class BlockCall:
    """The facts about one block of attention that decide which kernel computes it."""

    device: str  # "cpu", "cuda", ...
    capability: tuple[int, int]  # of a CUDA device; (0, 0) elsewhere
    dtype: torch.dtype
    rows: int
    keys: int
    key_dim: int
    value_dim: int
    bias: BiasKind

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None) -> BlockCall:
        bias = "none" if attn_bias is None else "mask" if attn_bias.dtype == torch.bool else "float"
        return cls(*device_of(q), q.dtype, q.shape[2], k.shape[2], q.shape[3], v.shape[3], bias)

    @property
    def head_dim(self) -> int:
        """The head dim of a kernel that wants one for all, in multiples of 8."""
        return (max(self.key_dim, self.value_dim) + 7) // 8 * 8


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to compute a block."""

    name: str
    about: str  # one line for people
    missing: Callable[[], str]  # why this installation does not have it, and what to do about that; "" if it has
    cannot_serve: Callable[[BlockCall], str]  # why it cannot compute this block; "" if it can
    forward: Forward
    backward: Backward


def device_of(q: Tensor) -> tuple[str, tuple[int, int]]:
    """The type of a tensor's device and, on CUDA, its compute capability."""
    device = q.device.type
    return device, torch.cuda.get_device_capability(q.device) if device == "cuda" else (0, 0)


@functools.cache
def no_cuda() -> str:
    """Why nothing runs on CUDA here, "" if it does."""
    if not torch.backends.cuda.is_built():
        return "this build of torch has no CUDA; install one from pytorch.org"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


def needs(*conditions: tuple[bool, str]) -> str:
    """The first thing that a kernel needs and does not have."""
    return next((what for holds, what in conditions if not holds), "")


def same_head_dim(*tensors: Tensor, multiple: int = 1) -> list[Tensor]:
    """Zero-padded to one head dim: zeros add nothing to a score, and the extra values are cut off."""
    widest = max(-(-tensor.shape[-1] // multiple) * multiple for tensor in tensors)
    pads = [(tensor, widest - tensor.shape[-1]) for tensor in tensors]
    return [torch.nn.functional.pad(tensor, (0, pad)) if pad else dense_rows(tensor) for tensor, pad in pads]


def dense_rows(tensor: Tensor) -> Tensor:
    """Rows of consecutive memory: gradients may arrive expanded (of a sum) or transposed."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def aligned(tensor: Tensor) -> Tensor:
    """Dense rows that start at multiples of 16 bytes, which CUDA kernels load at once.

    A view into a packed message may start anywhere; a kernel that is handed one would read across the boundary and fail.
    """
    unit = 16 // tensor.element_size()
    offsets = (tensor.storage_offset(), *tensor.stride()[:-1])
    if tensor.stride(-1) == 1 and all(offset % unit == 0 for offset in offsets):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def added(attn_bias: Tensor, q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers to add to the scores, [B|1,H|1,n,m] in `dtype`: -inf where a mask is false."""
    bias = attn_bias[(None,) * (4 - attn_bias.ndim)]
    bias = bias.expand(*bias.shape[:2], q.shape[2], k.shape[2])
    if bias.dtype != torch.bool:
        return bias.to(dtype)
    return torch.zeros(bias.shape, dtype=dtype, device=bias.device).masked_fill_(~bias, -torch.inf)


def once(mask: Tensor, what: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """`what` is made of a boolean mask, made once as long as the mask is there. Neither may be written to.

    A window's tiles have the same tensor in every stage and call (`Mask.within_bounds`); other masks are gone after their block.
    """
    if mask.dtype != torch.bool:
        return make()
    made = _MADE_OF.setdefault(mask, {})
    if what not in made:
        with torch.inference_mode(False):
            made[what] = make()
    return made[what]


def without_keys(attn_bias: Tensor) -> Tensor:
    """Which rows may see no key of the block: [...,n]."""
    return ~attn_bias.any(-1) if attn_bias.dtype == torch.bool else attn_bias.amax(-1) == -torch.inf
