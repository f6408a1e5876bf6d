"""Attention of one block by plain torch operators, from its scores: what the fast kernels cannot do, and what they are held to.

Everything is computed in the accumulating dtype. Scores and weights are [B,H,n,m]; keys and values have K heads, H a multiple of K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which out, lse and gradients of `dtype` tensors are summed over blocks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plain_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale · q·k of q [B,H,n,D] and k [B,K,m,D]."""
    dtype = accumulate_dtype(q.dtype)
    return (_grouped(q.to(dtype), k) @ _beside_groups(k, dtype).mT).flatten(1, 2) * scale


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and lse [B,H,n] of scores. A row of -inf has weights 0 and lse -inf.

    The weights are divided by their sum, not by e^lse: in a row of the lowest numbers the log of that sum is rounded away.
    """
    top = scores.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total), (top + total.log()).squeeze(-1)


def weights_given(scores: Tensor, lse: Tensor) -> Tensor:
    """The weights of a block's scores in a softmax over more blocks, of which the lse is given."""
    # With lse +inf the weights of a row without keys come out as e^-inf = 0; -inf would give inf - inf = NaN.
    return torch.exp(scores - torch.where(lse == -torch.inf, torch.inf, lse)[..., None])


def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """weights · v: [B,H,n,Dv]."""
    return (_grouped(weights, v) @ _beside_groups(v, weights.dtype)).flatten(1, 2)


def value_gradient(weights: Tensor, grad_out: Tensor, v: Tensor) -> Tensor:
    """dv [B,K,m,Dv] of `weighted_values`."""
    return (_grouped(weights, v).mT @ _grouped(grad_out.to(weights.dtype), v)).sum(2)


def weight_gradient(grad_out: Tensor, v: Tensor) -> Tensor:
    """The gradient of the weights of `weighted_values`, of a gradient in the accumulating dtype."""
    return weighted_values(grad_out, v.mT)


def score_gradients(grad: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """dq and dk of `plain_scores`."""
    grad = grad * scale
    return weighted_values(grad, k), value_gradient(grad, q, k)


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block's (out, lse) into the accumulators, in place.

    The block's weight is the sigmoid of the difference of the lses, so nothing overflows; where both are -inf it is 0.
    """
    block_lse = block_lse.to(lse.dtype)
    # -inf - -inf is NaN: a block without keys must weigh 0 even in a row that has none so far.
    lead = torch.where(block_lse == -torch.inf, -torch.inf, block_lse - lse)
    out.lerp_(block_out.to(out.dtype), torch.sigmoid(lead)[..., None])
    # Not lse + softplus(lead): with a block far below (a bias of -1e30) that would cancel to nothing.
    lse.copy_(torch.logaddexp(lse, block_lse))


def accumulate(totals: Sequence[Tensor], shares: Sequence[Tensor]) -> None:
    """Add each share to its total, in place and in the total's dtype."""
    for total, share in zip(totals, shares, strict=True):
        total.add_(share)


def _grouped(x: Tensor, kv: Tensor) -> Tensor:
    return x.unflatten(1, (kv.shape[1], x.shape[1] // kv.shape[1]))


def _beside_groups(kv: Tensor, dtype: torch.dtype) -> Tensor:
    return kv.to(dtype)[:, :, None]
