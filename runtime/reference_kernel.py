"""One block of attention in plain torch: any device, dtype, head dim, mask and bias; what the other kernels are held to.

Everything is computed and returned in the accumulating dtype, some rows at a time, so that the scores stay small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoseq.runtime.kernel_call import Kernel
from autoseq.runtime.plain import (
    accumulate_dtype,
    plain_scores,
    score_gradients,
    softmax,
    value_gradient,
    weight_gradient,
    weighted_values,
    weights_given,
)

_ROWS = 512  # rows of scores that are held at once


def _forward(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for rows in _slices(q.shape[2]):
        weights, lse = softmax(_scores(q, k, attn_bias, is_causal, rows, scale))
        outs.append(weighted_values(weights, v))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_bias: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(q.dtype)
    dq, dk, dv = q.new_empty(q.shape, dtype=dtype), torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for rows in _slices(q.shape[2]):
        grad = grad_out[:, :, rows].to(dtype)
        weights = weights_given(_scores(q, k, attn_bias, is_causal, rows, scale), lse[:, :, rows])
        delta = (grad * out[:, :, rows].to(dtype)).sum(-1, keepdim=True)
        dq[:, :, rows], share = score_gradients(weights * (weight_gradient(grad, v) - delta), q[:, :, rows], k, scale)
        dk += share
        dv += value_gradient(weights, grad, v)
    return dq, dk, dv


def _slices(rows: int) -> list[slice]:
    return [slice(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS)]


def _scores(q: Tensor, k: Tensor, attn_bias: Tensor | None, is_causal: bool, rows: slice, scale: float) -> Tensor:
    """Scores [B,H,n,m] of some rows."""
    scores = plain_scores(q[:, :, rows], k, scale)
    if attn_bias is not None:
        attn_bias = attn_bias[(None,) * (4 - attn_bias.ndim)]
        bias = attn_bias if attn_bias.shape[2] == 1 else attn_bias[:, :, rows]
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias.to(scores.dtype)
    if is_causal:
        i = torch.arange(rows.start, rows.stop, device=q.device)
        scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) > i[:, None], -torch.inf)
    return scores


REFERENCE = Kernel(
    "reference", "plain torch operators; float64, every device and every mask", lambda: "", lambda _: "", _forward, _backward
)
