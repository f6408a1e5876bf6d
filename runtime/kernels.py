"""One block of attention: (out, lse) and their gradients, by the fastest kernel that gives an lse.

`attend` and `attend_backward` know nothing of ranks, chunks or masks of positions. The backward takes the *global* out and
lse of the query rows, so the gradients of many blocks simply add up (Liu et al., "Ring Attention", arXiv:2310.01889; Dao,
"FlashAttention-2", arXiv:2307.08691). ATen's flash kernels serve CPU and CUDA; plain torch serves everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

_aten = torch.ops.aten
_REFERENCE_ROWS = 512  # rows of scores that the reference holds at once
_HALVES = (torch.float16, torch.bfloat16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which out, lse and gradients of `dtype` tensors are summed over blocks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    for start in range(0, q.shape[2], _REFERENCE_ROWS):
        rows = slice(start, start + _REFERENCE_ROWS)
        scores, values = _scores(q[:, :, rows], k, v, _rows_of(attn_bias, rows), is_causal, start, scale)
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - torch.where(lse == -torch.inf, torch.inf, lse)[..., None])
        outs.append((weights @ values).flatten(1, 2))
        lses.append(lse.flatten(1, 2))
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
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    grad_out, out, keys = grad_out.to(dtype), out.to(dtype), k.to(dtype)
    dq, dk, dv = q.new_empty(q.shape, dtype=dtype), torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for start in range(0, q.shape[2], _REFERENCE_ROWS):
        rows = slice(start, start + _REFERENCE_ROWS)
        scores, values = _scores(q[:, :, rows], k, v, _rows_of(attn_bias, rows), is_causal, start, scale)
        weights = torch.exp(scores - lse[:, :, rows].unflatten(1, groups)[..., None])
        grad = grad_out[:, :, rows].unflatten(1, groups)
        delta = (grad * out[:, :, rows].unflatten(1, groups)).sum(-1, keepdim=True)
        grad_scores = weights * (grad @ values.mT - delta) * scale
        dq[:, :, rows] = (grad_scores @ keys[:, :, None]).flatten(1, 2)
        dk += (grad_scores.mT @ q[:, :, rows].to(dtype).unflatten(1, groups)).sum(2)
        dv += (weights.mT @ grad).sum(2)
    return dq, dk, dv


def _scores(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, is_causal: bool, first_row: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Scores [B,K,H/K,n,m] of rows that start at `first_row`, and values that broadcast beside them."""
    dtype = accumulate_dtype(q.dtype)
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    scores = (q.to(dtype).unflatten(1, groups) @ k.to(dtype)[:, :, None].mT) * scale
    if attn_bias is not None:
        bias = attn_bias.to(dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        scores = scores + bias.unflatten(1, groups)
    if is_causal:
        i = torch.arange(first_row, first_row + q.shape[2], device=q.device)
        scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) > i[:, None], -torch.inf)
    return scores, v.to(dtype)[:, :, None]


def _rows_of(attn_bias: Tensor | None, rows: slice) -> Tensor | None:
    if attn_bias is None:
        return None
    attn_bias = _four_dims(attn_bias)
    return attn_bias if attn_bias.shape[2] == 1 else attn_bias[:, :, rows]
