"""Stand-ins for the attention operators on CUDA, ATen's and flash-attn's, in float64 on any device, as strict as the kernels behind them.

Each takes what the operator takes and checks what its kernel takes for granted: a wrong layout there is a wrong number, not an error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Grads = tuple[Tensor, Tensor, Tensor]


def _check_loads(*tensors: Tensor) -> None:
    """Rows are dense and start at multiples of 16 bytes."""
    for x in tensors:
        unit = 16 // x.element_size()
        assert x.stride(-1) == 1
        assert all(offset % unit == 0 for offset in (x.storage_offset(), *x.stride()[:-1]))


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    scores = scores if bias is None else scores + bias.double()
    if is_causal:
        assert bias is None
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Rows without keys are NaN: nothing is promised of them."""
    scores = _scores(q, k, bias, is_causal, scale)
    out = scores.softmax(-1) @ v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
    lse = scores.logsumexp(-1)
    return out.to(q.dtype), lse.masked_fill(lse == -math.inf, math.nan).float()


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Grads:
    ratio = q.shape[1] // k.shape[1]
    grad_out, out = grad_out.double(), out.double()
    weights = (_scores(q, k, bias, is_causal, scale) - lse.double()[..., None]).exp()
    wide = v.double().repeat_interleave(ratio, 1)
    grad = weights * (grad_out @ wide.mT - (grad_out * out).sum(-1, keepdim=True)) * scale
    dq = grad @ k.double().repeat_interleave(ratio, 1)
    dk, dv = (x.unflatten(1, (-1, ratio)).sum(2) for x in (grad.mT @ q.double(), weights.mT @ grad_out))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class AtenOnCuda:
    """In the place of `torch.ops.aten`."""

    def __init__(self, cudnn_lse_dims: int = 4) -> None:
        self.cudnn_lse_dims = cudnn_lse_dims
        self.called: list[str] = []

    def _scaled_dot_product_flash_attention(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, is_causal: bool, *, scale: float
    ) -> tuple[Tensor, ...]:
        self.called.append("flash")
        _check_loads(q, k, v)
        assert dropout_p == 0 and q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
        return *_forward(q, k, v, None, is_causal, scale), q

    def _scaled_dot_product_flash_attention_backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cum_q: None, cum_k: None, max_q: int,
        max_k: int, dropout_p: float, is_causal: bool, seed: Tensor, offset: Tensor, *, scale: float,
    ) -> Grads:  # fmt: skip
        self.called.append("flash backward")
        _check_loads(grad_out, q, k, v, out)
        assert cum_q is cum_k is None and dropout_p == 0 and (max_q, max_k) == (q.shape[2], k.shape[2])
        assert lse.is_contiguous() and lse.shape == q.shape[:3] and (seed.dtype, seed.shape) == (torch.uint64, (2,))
        return _backward(grad_out, q, k, v, None, out, lse, is_causal, scale)

    def _scaled_dot_product_cudnn_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: None, with_lse: bool, dropout_p: float, is_causal: bool, debug: bool, *, scale: float
    ) -> tuple[Tensor, ...]:
        self.called.append("cudnn")
        _check_loads(q, k, v)
        assert bias is None and with_lse and dropout_p == 0 and not debug and q.shape[-1] % 8 == 0
        out, lse = _forward(q, k, v, None, is_causal, scale)
        return out, lse.reshape((*lse.shape, 1)[: self.cudnn_lse_dims]), q

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor, offset: Tensor, bias: None,
        cum_q: None, cum_k: None, max_q: int, max_k: int, dropout_p: float, is_causal: bool, *, scale: float,
    ) -> Grads:  # fmt: skip
        self.called.append("cudnn backward")
        _check_loads(grad_out, q, k, v, out)
        assert bias is cum_q is cum_k is None and dropout_p == 0 and (max_q, max_k) == (q.shape[2], k.shape[2])
        assert lse.ndim == self.cudnn_lse_dims and lse.is_contiguous()
        return _backward(grad_out, q, k, v, None, out, lse.reshape(q.shape[:3]), is_causal, scale)

    def _scaled_dot_product_efficient_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, with_lse: bool, dropout_p: float, is_causal: bool, *, scale: float
    ) -> tuple[Tensor, ...]:
        self.called.append("efficient")
        self._check_efficient(q, k, v, bias)
        assert with_lse and dropout_p == 0
        out, lse = _forward(q, k, v, bias, is_causal, scale)
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
        return out.transpose(1, 2).contiguous().transpose(1, 2), padded, q, q

    def _scaled_dot_product_efficient_attention_backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, seed: Tensor,
        offset: Tensor, dropout_p: float, wanted: list[bool], is_causal: bool, *, scale: float,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        self.called.append("efficient backward")
        self._check_efficient(q, k, v, bias)
        assert dropout_p == 0 and wanted == [True, True, True, False]
        assert out.transpose(1, 2).is_contiguous() and out.dtype == q.dtype and out.shape == grad_out.shape
        assert lse.is_contiguous() and lse.shape[-1] % 32 == 0 and (lse[..., q.shape[2] :] == math.inf).all()
        return *_backward(grad_out, q, k, v, bias, out, lse[..., : q.shape[2]], is_causal, scale), None

    @staticmethod
    def _check_efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
        _check_loads(q, k, v)
        assert q.shape[1] == k.shape[1] == v.shape[1] and q.shape[-1] == k.shape[-1]
        assert q.shape[-1] % 8 == v.shape[-1] % 8 == 0
        if bias is not None:
            _check_loads(bias)
            assert bias.dtype == q.dtype and bias.shape == (*q.shape[:3], k.shape[2])


class FlashAttn:
    """The package's operators, which take any layout, in front of its stand-in."""

    @staticmethod
    def _flash_attn_forward(*tensors: Tensor, **options: object) -> tuple[Tensor, ...]:
        _check_loads(*tensors)
        return torch.ops.flash_attn._flash_attn_forward(*tensors, **options)

    @staticmethod
    def _flash_attn_backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *grads: Tensor, **options: object
    ) -> Tensor:
        _check_loads(grad_out, q, k, v, out, *grads)
        assert lse.is_contiguous() and all(grad.is_contiguous() for grad in grads)
        return torch.ops.flash_attn._flash_attn_backward(grad_out, q, k, v, out, lse, *grads, **options)
