"""The flash-attn package's kernels for one block, where it is installed (Dao, "FlashAttention-2", arXiv:2307.08691).

They are called by the operators that the package registers (2.7 and later), whose forward gives the lse and whose backward takes
one. Tensors are [B,n,H,D] there.
"""

from __future__ import annotations

import functools
import importlib
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from autoseq.runtime.kernel_call import HALVES, BlockCall, Kernel, aligned, needs, same_head_dim

_INSTALL = "pip install flash-attn --no-build-isolation"
_NO_LIMITS = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}


def _missing() -> str:
    return _operators()[1]


@functools.cache
def _operators() -> tuple[Any, str]:
    """The namespace of the package's operators, or why there is none."""
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return None, f"flash-attn is not installed; {_INSTALL}"
    try:
        importlib.import_module("flash_attn.flash_attn_interface")
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        return None, f"flash-attn {version} does not import ({error}); build it for this torch: {_INSTALL}"
    if not hasattr(torch.ops.flash_attn, "_flash_attn_backward"):
        return None, f"flash-attn {version} registers no operators; 2.7 and later do: {_INSTALL}"
    return torch.ops.flash_attn, ""


def _cannot_serve(call: BlockCall) -> str:
    return needs(
        (call.device == "cuda", "it runs on CUDA only"),
        (call.capability >= (8, 0), "it needs compute capability 8.0"),
        (call.dtype in HALVES, "it takes float16 and bfloat16 only"),
        (call.bias == "none", "it takes no mask tensor and no bias"),
        (call.head_dim <= 256, "its head dim is at most 256"),
    )


def _forward(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_rest = _operators()[0]._flash_attn_forward(
        *_its_layout(q, k, v), dropout_p=0.0, softmax_scale=scale, causal=is_causal, **_NO_LIMITS, return_softmax=False
    )
    return out.transpose(1, 2)[..., : v.shape[-1]], lse


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, _: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, *padded, out = _its_layout(grad_out, q, k, v, out)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in padded]
    _operators()[0]._flash_attn_backward(
        grad_out, *padded, out, lse.contiguous(), *grads, dropout_p=0.0, softmax_scale=scale, causal=is_causal, **_NO_LIMITS,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    dq, dk, dv = (grad.transpose(1, 2)[..., : x.shape[-1]] for grad, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


def _its_layout(*tensors: Tensor) -> list[Tensor]:
    return [aligned(x.transpose(1, 2)) for x in same_head_dim(*tensors, multiple=8)]


FLASH_ATTN = Kernel("flash_attn", "the flash-attn package on CUDA", _missing, _cannot_serve, _forward, _backward)
