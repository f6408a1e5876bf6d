"""One block of attention: (out, lse) and their gradients, by the fastest kernel that can compute it.

`attend` and `attend_backward` know nothing of ranks, chunks or masks of positions. The backward takes the *global* out and
lse of the query rows, so the gradients of many blocks simply add up (Liu et al., "Ring Attention", arXiv:2310.01889; Dao,
"FlashAttention-2", arXiv:2307.08691), and the kernel of a backward need not be that of the forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoseq.runtime.aten_kernels import CPU, CUDNN, EFFICIENT, FLASH
from autoseq.runtime.flash_attn_kernel import FLASH_ATTN
from autoseq.runtime.kernel_call import BlockCall, Kernel
from autoseq.runtime.reference_kernel import REFERENCE

KERNELS: tuple[Kernel, ...] = (FLASH_ATTN, FLASH, CUDNN, EFFICIENT, CPU, REFERENCE)
"""In the order they are tried. The last one serves everything."""


def attend(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [B,H,n,D] to k [B,K,m,D] and v [B,K,m,Dv], H a multiple of K: out [B,H,n,Dv] and lse [B,H,n].

    `attn_bias` is boolean, true where a row may see a key, or what is added to the scores, -inf where it may not; broadcastable to
    [B,H,n,m]. `is_causal` needs n == m and no bias. A row that may see no key has out 0 and lse -inf. lse is float32 (float64
    for float64 inputs); out may be in the inputs' dtype.
    """
    return choose(BlockCall.of(q, k, v, attn_bias)).forward(q, k, v, attn_bias, is_causal, scale)


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
    kernel = choose(BlockCall.of(q, k, v, attn_bias))
    return kernel.backward(grad_out, q, k, v, out, lse, attn_bias, is_causal, scale)


def choose(call: BlockCall) -> Kernel:
    """The first kernel that is there and can serve the call."""
    return next(kernel for kernel in KERNELS if not why_not(kernel, call))


def why_not(kernel: Kernel, call: BlockCall) -> str:
    """Why a kernel does not compute a block: what it cannot do, or why it is not there; "" if it does."""
    return kernel.cannot_serve(call) or kernel.missing()
