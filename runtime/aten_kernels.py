"""ATen's fused kernels for one block: flash, cuDNN and memory-efficient attention on CUDA, flash attention on CPU.

They are called by their operators, not through `scaled_dot_product_attention`, since that returns no lse and its backward takes none.
All compute in float32 inside and round what they return to the inputs' dtype once. Each can be switched off like SDPA's own, with
`torch.nn.attention.sdpa_kernel` or `torch.backends.cuda.enable_flash_sdp` and its kin.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from autoseq.runtime.kernel_call import HALVES, BlockCall, Kernel, added, aligned, needs, no_cuda, once, same_head_dim, without_keys
from autoseq.runtime.plain import accumulate_dtype

_aten = torch.ops.aten
_Grads = tuple[Tensor, Tensor, Tensor]


def _on_cuda(call: BlockCall, oldest: tuple[int, int]) -> str:
    return needs(
        (call.device == "cuda", "it runs on CUDA only"),
        (call.capability >= oldest, "it needs compute capability {}.{}".format(*oldest)),
    )


def _halves_without_bias(call: BlockCall, widest: int) -> str:
    return _on_cuda(call, (8, 0)) or needs(
        (call.dtype in HALVES, "it takes float16 and bfloat16 only"),
        (call.bias == "none", "it takes no mask tensor and no bias"),
        (call.head_dim <= widest, f"its head dim is at most {widest}"),
    )


# Flash on CUDA --------------------------------------------------------------------------------------------------------


def _flash_missing() -> str:
    return no_cuda() or needs(
        (torch.backends.cuda.is_flash_attention_available(), "this build of torch has no flash attention"),
        (torch.backends.cuda.flash_sdp_enabled(), "it is switched off in torch.backends.cuda"),
    )


def _flash_cannot_serve(call: BlockCall) -> str:
    # What torch itself refuses: the backward of these head dims does not fit the shared memory of consumer GPUs.
    small = (8, 0) < call.capability < (9, 0) or call.capability >= (12, 0)
    return _halves_without_bias(call, 256) or needs(
        (not (small and 192 < call.head_dim <= 224), "its backward takes no head dim of 200 to 224 on this device")
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    padded = map(aligned, same_head_dim(q, k, v, multiple=8))
    out, lse = _aten._scaled_dot_product_flash_attention(*padded, 0.0, is_causal, scale=scale)[:2]
    return out[..., : v.shape[-1]], lse


def _flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, _: Tensor | None, is_causal: bool, scale: float
) -> _Grads:
    grad_out, *padded = map(aligned, same_head_dim(grad_out, q, k, v, out, multiple=8))
    # Without dropout the kernel draws nothing, so the generator's state is never read.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    lengths = (None, None, q.shape[2], k.shape[2])
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
        grad_out, *padded, lse.contiguous(), *lengths, 0.0, is_causal, state, state[:0], scale=scale
    )
    return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


# cuDNN ----------------------------------------------------------------------------------------------------------------


def _cudnn_missing() -> str:
    return no_cuda() or needs(
        (torch.backends.cudnn.is_available(), "this build of torch has no cuDNN"),
        (torch.backends.cuda.cudnn_sdp_enabled(), "it is switched off in torch.backends.cuda"),
    )


def _cudnn_cannot_serve(call: BlockCall) -> str:
    return _halves_without_bias(call, 128) or needs((call.keys > 1, "it needs more than one key"))


def _cudnn(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    padded = map(aligned, same_head_dim(q, k, v, multiple=8))
    out, lse = _aten._scaled_dot_product_cudnn_attention(*padded, None, True, 0.0, is_causal, False, scale=scale)[:2]
    return out[..., : v.shape[-1]], lse.reshape(q.shape[:3])


def _cudnn_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, _: Tensor | None, is_causal: bool, scale: float
) -> _Grads:
    grad_out, *padded = map(aligned, same_head_dim(grad_out, q, k, v, out, multiple=8))
    lse = lse.contiguous()
    lse = lse[..., None] if _cudnn_lse_dims(q.device, q.dtype) == 4 else lse
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    lengths = (None, None, q.shape[2], k.shape[2])
    dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, *padded, lse, state, state, None, *lengths, 0.0, is_causal, scale=scale
    )
    return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


@functools.cache
def _cudnn_lse_dims(device: torch.device, dtype: torch.dtype) -> int:
    """Versions of torch differ in whether the lse has a last dim of 1. The backward takes what the forward gives: ask it once."""
    q = torch.zeros(1, 1, 64, 64, dtype=dtype, device=device)
    return _aten._scaled_dot_product_cudnn_attention(q, q, q, None, True, 0.0, False, False, scale=1.0)[1].ndim


# Memory-efficient -----------------------------------------------------------------------------------------------------


def _efficient_missing() -> str:
    return no_cuda() or needs((torch.backends.cuda.mem_efficient_sdp_enabled(), "it is switched off in torch.backends.cuda"))


def _efficient_cannot_serve(call: BlockCall) -> str:
    return _on_cuda(call, (8, 0) if call.dtype == torch.bfloat16 else (7, 0)) or needs(
        (call.dtype in (torch.float32, *HALVES), "it takes float32, float16 and bfloat16 only")
    )


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    padded = _for_efficient(q, k, v, attn_bias)
    bias = _efficient_bias(attn_bias, *padded[:2])
    out, lse = _aten._scaled_dot_product_efficient_attention(*padded, bias, True, 0.0, is_causal, scale=scale)[:2]
    out, lse = out[..., : v.shape[-1]], lse[..., : q.shape[2]]
    if attn_bias is not None:
        empty = without_keys(attn_bias)
        out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return out, lse


def _efficient_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_bias: Tensor | None,
    is_causal: bool,
    scale: float,
) -> _Grads:
    padded = _for_efficient(q, k, v, attn_bias)
    grad_out, out = (x.to(padded[0].dtype) for x in same_head_dim(grad_out, out, multiple=8))
    # The kernel is told the strides of out's batches and heads but takes its rows to be those of a contiguous [B,n,H,D].
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    # It loads lse by the 32 rows; past the last one the weights must come out as e^-inf.
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf).contiguous()
    bias, state = _efficient_bias(attn_bias, *padded[:2]), torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        grad_out, *padded, bias, out, lse, state, state, 0.0, [True, True, True, False], is_causal, scale=scale
    )
    return dq[..., : q.shape[-1]], _of_kv_heads(dk[..., : k.shape[-1]], k), _of_kv_heads(dv[..., : v.shape[-1]], v)


def _for_efficient(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None) -> list[Tensor]:
    """q, k and v with as many heads each, and head dims in multiples of 8; that of v may differ.

    The kernel adds a bias in the queries' dtype. A mask survives that, but numbers would be rounded before they are added: beside
    them everything is float32.
    """
    if attn_bias is not None and attn_bias.is_floating_point():
        q, k, v = q.float(), k.float(), v.float()
    q, k = same_head_dim(q, k, multiple=8)
    (v,) = same_head_dim(v, multiple=8)
    ratio = q.shape[1] // k.shape[1]
    if ratio > 1:
        k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    return [aligned(x) for x in (q, k, v)]


def _of_kv_heads(grad: Tensor, kv: Tensor) -> Tensor:
    """The sum over the query heads that share a KV head, in float32."""
    ratio = grad.shape[1] // kv.shape[1]
    return grad if ratio == 1 else grad.unflatten(1, (-1, ratio)).sum(2, dtype=torch.float32)


def _efficient_bias(attn_bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """[B,H,n,m] in the queries' dtype; rows must start at multiples of 16 bytes, so they are cut out of longer ones."""
    if attn_bias is None:
        return None
    bias = added(attn_bias, q, k, q.dtype)
    bias = torch.nn.functional.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]]
    return aligned(bias).expand(*q.shape[:2], -1, -1)


# Flash on CPU ---------------------------------------------------------------------------------------------------------


def _cpu_cannot_serve(call: BlockCall) -> str:
    return needs(
        (call.device == "cpu", "it runs on the CPU only"),
        (call.dtype in (torch.float64, torch.float32, *HALVES), "it takes float64, float32, bfloat16 and float16 only"),
    )


def _cpu(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    bias = _cpu_bias(attn_bias, q, k)
    padded = same_head_dim(q, k, v)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*padded, 0.0, is_causal, attn_mask=bias, scale=scale)
    if attn_bias is not None:
        # For a row without keys the kernel gives out 0, as we want, but lse 0, which would count as e^0 in a merge.
        lse = lse.masked_fill(once(attn_bias, "without keys", lambda: without_keys(attn_bias)), -torch.inf)
    return out[..., : v.shape[-1]], lse


def _cpu_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_bias: Tensor | None,
    is_causal: bool,
    scale: float,
) -> _Grads:
    padded = same_head_dim(grad_out, q, k, v, out)
    bias = _cpu_bias(attn_bias, q, k)
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *padded, lse, 0.0, is_causal, attn_mask=bias, scale=scale
    )
    return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def _cpu_bias(attn_bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    # The kernel takes a float32 mask beside float64 queries without complaint, and reads it as float64: garbage.
    dtype = accumulate_dtype(q.dtype)
    return None if attn_bias is None else once(attn_bias, (q.shape[2], k.shape[2], dtype), lambda: added(attn_bias, q, k, dtype))


FLASH = Kernel("flash", "ATen's flash attention on CUDA", _flash_missing, _flash_cannot_serve, _flash, _flash_backward)
CUDNN = Kernel("cudnn", "ATen's cuDNN attention on CUDA", _cudnn_missing, _cudnn_cannot_serve, _cudnn, _cudnn_backward)
EFFICIENT = Kernel(
    "efficient", "ATen's memory-efficient attention on CUDA", _efficient_missing, _efficient_cannot_serve, _efficient, _efficient_backward
)
CPU = Kernel("cpu", "ATen's flash attention on CPU", lambda: "", _cpu_cannot_serve, _cpu, _cpu_backward)
