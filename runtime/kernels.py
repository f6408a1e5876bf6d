"""One block of attention: (out, lse) and their gradients, by the fastest kernel that gives an lse.

`attend` and `attend_backward` know nothing of ranks, chunks or masks of positions. The backward takes the *global* out and
lse of the query rows, so the gradients of many blocks simply add up (Liu et al., "Ring Attention", arXiv:2310.01889; Dao,
"FlashAttention-2", arXiv:2307.08691). ATen's flash kernels serve CPU and CUDA; plain torch serves everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

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

_aten = torch.ops.aten
_REFERENCE_ROWS = 512  # rows of scores that the reference holds at once
_HALVES = (torch.float16, torch.bfloat16)


def attend(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [B,H,n,D] to k [B,K,m,D] and v [B,K,m,Dv], H a multiple of K: out [B,H,n,Dv] and lse [B,H,n].

    `attn_bias` is additive, -inf where masked, broadcastable to [B,H,n,m]; `is_causal` needs n == m and no bias.
    A row that may see no key has out 0 and lse -inf. lse is float32 (float64 for float64 inputs).
    """
    kernel = _kernel(q, v, attn_bias)
    if kernel == "reference":
        return _reference(q, k, v, attn_bias, is_causal, scale)
    value_dim = v.shape[-1]
    q, k, v = _same_head_dim(q, k, v)
    if kernel == "cuda":
        out, lse = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[:2]
        return out[..., :value_dim], lse
    attn_bias = _kernel_bias(attn_bias, q.dtype)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=attn_bias, scale=scale)
    if attn_bias is not None:
        # For a row without keys the kernel gives out 0, as we want, but lse 0, which would count as e^0 in a merge.
        lse = lse.masked_fill(attn_bias.amax(-1) == -torch.inf, -torch.inf)
    return out[..., :value_dim], lse


def attend_backward(
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
    """The block's share of dq, dk, dv, given the out and lse of the query rows over *all* blocks."""
    # With lse +inf the probabilities of a row without keys come out as e^-inf = 0; -inf would give inf - inf = NaN.
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    kernel = _kernel(q, v, attn_bias)
    if kernel == "reference":
        return _reference_backward(grad_out, q, k, v, out, lse, attn_bias, is_causal, scale)
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    q, k, v, out, grad_out = _same_head_dim(q, k, v, out, grad_out)
    if kernel == "cuda":
        dq, dk, dv = _cuda_backward(grad_out, q, k, v, out, lse, is_causal, scale)
    else:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, is_causal, attn_mask=_kernel_bias(attn_bias, q.dtype), scale=scale
        )
    return dq[..., :key_dim], dk[..., :key_dim], dv[..., :value_dim]


def _kernel(q: Tensor, v: Tensor, attn_bias: Tensor | None) -> str:
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64, *_HALVES):
        return "cpu"
    head_dim = max(q.shape[-1], v.shape[-1])
    if q.device.type == "cuda" and q.dtype in _HALVES and attn_bias is None and head_dim <= 256:
        # The aten op runs on sm80 and newer.
        return "cuda" if torch.cuda.get_device_capability(q.device) >= (8, 0) else "reference"
    return "reference"


def _same_head_dim(*tensors: Tensor) -> list[Tensor]:
    """Zero-padded to one head dim: zeros add nothing to a score, and the extra values are cut off. CUDA wants multiples of 8."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    if tensors[0].device.type == "cuda":
        widest = (widest + 7) // 8 * 8
    pads = [(tensor, widest - tensor.shape[-1]) for tensor in tensors]
    return [torch.nn.functional.pad(tensor, (0, pad)) if pad else _dense_rows(tensor) for tensor, pad in pads]


def _dense_rows(tensor: Tensor) -> Tensor:
    # Gradients may arrive expanded (of a sum) or transposed; the flash kernels read a row of a head as consecutive memory.
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _kernel_bias(attn_bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # The CPU kernel takes a float32 mask beside float64 queries without complaint, and reads it as float64: garbage.
    return None if attn_bias is None else _four_dims(attn_bias).to(accumulate_dtype(dtype))


def _four_dims(attn_bias: Tensor) -> Tensor:
    return attn_bias[(None,) * (4 - attn_bias.ndim)]


def _cuda_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Without dropout the kernel draws nothing, so the generator's state is never read.
    no_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return _aten._scaled_dot_product_flash_attention_backward(
        grad_out, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, is_causal, no_state, no_state[:0], scale=scale
    )


def _reference(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Plain torch, some rows at a time; results in the accumulating dtype."""
    outs, lses = [], []
    for rows in _slices(q.shape[2]):
        weights, lse = softmax(_scores(q, k, attn_bias, is_causal, rows, scale))
        outs.append(weighted_values(weights, v))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _reference_backward(
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
    return [slice(start, min(start + _REFERENCE_ROWS, rows)) for start in range(0, rows, _REFERENCE_ROWS)]


def _scores(q: Tensor, k: Tensor, attn_bias: Tensor | None, is_causal: bool, rows: slice, scale: float) -> Tensor:
    """Scores [B,H,n,m] of some rows."""
    scores = plain_scores(q[:, :, rows], k, scale)
    if attn_bias is not None:
        attn_bias = _four_dims(attn_bias)
        scores = scores + (attn_bias if attn_bias.shape[2] == 1 else attn_bias[:, :, rows]).to(scores.dtype)
    if is_causal:
        i = torch.arange(rows.start, rows.stop, device=q.device)
        scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) > i[:, None], -torch.inf)
    return scores
