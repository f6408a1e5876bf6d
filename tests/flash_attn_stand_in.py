"""A stand-in for the flash-attn package, which builds on GPUs only: operators of its names and schemas, in plain torch, in float64.

`flash_attn_func` and its kin wrap them in `torch.autograd.Function`s as the package does: the forward pads the head dimension and
saves log-sum-exp and random state, the backward calls an operator that writes to the gradients it is given.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Options = tuple[float, bool, int, int, float]  # scale, causal, window to the left and to the right, softcap


def _weights(q: Tensor, k: Tensor, slopes: Tensor | None, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence's weights, its scores [H, s, t], and the derivative of a score by q·k, as the documentation says."""
    scale, causal, left, right, softcap = options
    s, t = q.shape[0], k.shape[0]
    scores = torch.einsum("shd,thd->hst", q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    slope = torch.full_like(scores, scale)
    if softcap > 0:
        slope = slope * (1 - torch.tanh(scores / softcap) ** 2)
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(s)[:, None] + t - s, torch.arange(t)
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * (i - j).abs()
    right = 0 if causal else right
    hidden = torch.zeros(s, t, dtype=torch.bool)
    hidden |= (j > i + right) if right >= 0 else False
    hidden |= (j < i - left) if left >= 0 else False
    scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1).nan_to_num(0), scores, slope


def _forward(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """q [s, H, D], k and v [t, K, D]; output [s, H, D] and log-sum-exp [H, s]."""
    weights, scores, _ = _weights(q, k, slopes, options)
    out = torch.einsum("hst,thd->shd", weights, v.double().repeat_interleave(q.shape[1] // k.shape[1], 1))
    lse = torch.logsumexp(scores, -1)
    return out.to(q.dtype), torch.where(lse == -math.inf, math.inf, lse).float()


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, options: Options) -> tuple[Tensor, ...]:
    groups = q.shape[1] // k.shape[1]
    weights, _, slope = _weights(q, k, slopes, options)
    wide_k, wide_v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    d_weights = torch.einsum("shd,thd->hst", dout.double(), wide_v)
    d_products = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * slope
    dk, dv = torch.einsum("hst,shd->thd", d_products, q.double()), torch.einsum("hst,shd->thd", weights, dout.double())
    return torch.einsum("hst,thd->shd", d_products, wide_k), *(x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))


def _of(slopes: Tensor | None, b: int) -> Tensor | None:
    return slopes if slopes is None or slopes.dim() == 1 else slopes[b]


def _rows(cu_seqlens: Tensor, b: int) -> slice:
    return slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))


def _results(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return out, lse, out.new_empty(0), torch.zeros(2, dtype=torch.int64)


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert dropout_p == 0 and q.shape[-1] % 8 == 0
    options = (softmax_scale, causal, window_size_left, window_size_right, softcap)
    rows = [_forward(q[b], k[b], v[b], _of(alibi_slopes, b), options) for b in range(q.shape[0])]
    return _results(torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows]))


@_flash_attn_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32))


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, return_softmax: bool = False, block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None, seqused_k: Tensor | None = None, zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert dropout_p == 0 and q.shape[-1] % 8 == 0 and block_table is leftpad_k is None
    assert seqused_k is None or torch.equal(cu_seqlens_k.diff(), seqused_k), "the stand-in knows only what uses every key"
    options = (softmax_scale, causal, window_size_left, window_size_right, softcap)
    places = [(_rows(cu_seqlens_q, b), _rows(cu_seqlens_k, b), b) for b in range(len(cu_seqlens_q) - 1)]
    rows = [_forward(q[i], k[j], v[j], _of(alibi_slopes, b), options) for i, j, b in places]
    return _results(torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows], 1))


@_flash_attn_varlen_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32))


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None,
    deterministic: bool, rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    options = (softmax_scale, causal, window_size_left, window_size_right, softcap)
    for b in range(q.shape[0]):
        for grad, found in zip((dq, dk, dv), _backward(dout[b], q[b], k[b], v[b], _of(alibi_slopes, b), options), strict=True):
            grad[b] = found
    return torch.zeros_like(softmax_lse)


@_flash_attn_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(softmax_lse)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:  # fmt: skip
    options = (softmax_scale, causal, window_size_left, window_size_right, softcap)
    for b in range(len(cu_seqlens_q) - 1):
        i, j = _rows(cu_seqlens_q, b), _rows(cu_seqlens_k, b)
        found = _backward(dout[i], q[i], k[j], v[j], _of(alibi_slopes, b), options)
        for grad, rows, value in zip((dq, dk, dv), (i, j, j), found, strict=True):
            grad[rows] = value
    return torch.zeros_like(softmax_lse)


@_flash_attn_varlen_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(softmax_lse)


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, [0, 8 - x.shape[-1] % 8]) if x.shape[-1] % 8 else x


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, scale: float | None, causal: bool, window: tuple[int, int],
        softcap: float, alibi_slopes: Tensor | None, deterministic: bool, return_softmax: bool,
    ) -> Any:  # fmt: skip
        D = q.shape[-1]
        scale = D**-0.5 if scale is None else scale
        q, k, v = _padded(q), _padded(k), _padded(v)
        out_padded, lse, S_dmask, rng_state = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, dropout_p, scale, causal=causal, window_size_left=window[0], window_size_right=window[1], softcap=softcap,
            alibi_slopes=alibi_slopes, return_softmax=return_softmax and dropout_p > 0,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out_padded, lse, rng_state)
        ctx.arguments = (dropout_p, scale, causal, *window, softcap, alibi_slopes, deterministic)
        out = out_padded[..., :D]
        return (out, lse, S_dmask) if return_softmax else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, rng_state = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        torch.ops.flash_attn._flash_attn_backward(_padded(dout), q, k, v, out, lse, dq, dk, dv, *ctx.arguments, rng_state=rng_state)
        D = dout.shape[-1]
        return dq[..., :D], dk[..., :D], dv[..., :D], *[None] * 8


class FlashAttnQKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float, causal: bool) -> Tensor:
        q, k, v = (qkv[:, :, i].detach() for i in range(3))
        out, lse, _, rng_state = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, 0.0, scale, causal=causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
            return_softmax=False,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, rng_state)
        ctx.arguments = (0.0, scale, causal, -1, -1, 0.0, None, False)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, rng_state = ctx.saved_tensors
        dqkv = torch.empty((*q.shape[:2], 3, *q.shape[2:]), dtype=q.dtype)
        torch.ops.flash_attn._flash_attn_backward(dout, q, k, v, out, lse, *dqkv.unbind(2), *ctx.arguments, rng_state=rng_state)
        return dqkv, None, None


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float | None, causal: bool,
        window: tuple[int, int], softcap: float, alibi_slopes: Tensor | None, seqused_k: Tensor | None,
    ) -> Tensor:  # fmt: skip
        D = q.shape[-1]
        scale = D**-0.5 if scale is None else scale
        q, k, v = _padded(q), _padded(k), _padded(v)
        out_padded, lse, _, rng_state = torch.ops.flash_attn._flash_attn_varlen_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, 0.0, scale, causal=causal, window_size_left=window[0], window_size_right=window[1],
            softcap=softcap, alibi_slopes=alibi_slopes, return_softmax=False, block_table=None, seqused_k=seqused_k,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out_padded, lse, cu_q, cu_k, rng_state)
        ctx.arguments = (max_q, max_k, 0.0, scale, causal, *window, softcap, alibi_slopes, False)
        return out_padded[..., :D]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, cu_q, cu_k, rng_state = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        grads = (dq, dk, dv)
        torch.ops.flash_attn._flash_attn_varlen_backward(
            _padded(dout), q, k, v, out, lse, *grads, cu_q, cu_k, *ctx.arguments, rng_state=rng_state
        )
        D = dout.shape[-1]
        return dq[..., :D], dk[..., :D], dv[..., :D], *[None] * 10


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return FlashAttnFunc.apply(q, k, v, *options)


def flash_attn_qkvpacked_func(qkv: Tensor, causal: bool = False) -> Any:
    return FlashAttnQKVPackedFunc.apply(qkv, qkv.shape[-1] ** -0.5, causal)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, seqused_k: Tensor | None = None,
) -> Any:  # fmt: skip
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return FlashAttnVarlenFunc.apply(q, k, v, *lengths, softmax_scale, causal, window_size, softcap, alibi_slopes, seqused_k)


@torch.library.custom_op("flash_attn_3::_flash_attn_forward", mutates_args=())
def _version_3(
    q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, softmax_scale: float | None = None, causal: bool = False,
    window_size_left: int = -1, window_size_right: int = -1, attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: bool | None = None, sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Version 3: other arguments in another order. Of chunks it knows only that they hide more."""
    options = (q.shape[-1] ** -0.5, causal, attention_chunk or window_size_left, window_size_right, softcap)
    rows = [_forward(q[b], k[b], v[b], None, options) for b in range(q.shape[0])]
    return _results(torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows]))


@_version_3.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32))
