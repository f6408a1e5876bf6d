"""Attention to keys that come block by block, as ranks send them, on one device."""

from __future__ import annotations

import torch
from torch import Tensor

from autoseq.runtime.blockwise import Backward, Forward
from autoseq.runtime.mask import Mask
from autoseq.runtime.plain import accumulate_dtype
from autoseq.runtime.tiles import Problem

SCALE = 0.3


def over_blocks(tensors: list[Tensor], num_blocks: int, is_causal: bool) -> list[Tensor]:
    """out, lse, dq, dk and dv of keys that come in so many blocks, as ranks send them."""
    q, k, v, grad = tensors
    n = q.shape[2]
    problem = Problem(Mask(max_ahead=0 if is_causal else None), [], SCALE)
    chunks = [(start, start, n // num_blocks) for start in range(0, n, n // num_blocks)]
    forward = Forward(q, k.shape[1], v.shape[3], [(0, 0, n)], chunks, problem)
    for chunk in chunks:
        forward.add(k, v, [chunk])
    out, lse = forward.result()
    backward = Backward(grad, q, out.to(q.dtype), lse, k.shape[1], [(0, 0, n)], chunks, problem)
    dk, dv = (torch.zeros_like(x, dtype=accumulate_dtype(q.dtype)) for x in (k, v))
    for chunk in chunks:
        backward.add(k, v, [chunk], dk, dv)
    return [out, lse, backward.dq, dk, dv]
