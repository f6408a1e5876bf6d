"""The oracle of the attention tests: softmax attention with a dense mask in float64, and the cases it is asked about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoseq.runtime.mask import Mask


@dataclass(frozen=True)
class MaskCase:
    """A mask in the strategies' terms and, for the oracle, as a dense boolean that broadcasts to [B, H, q, k]."""

    max_ahead: int | None
    max_behind: int | None
    predicate: str
    captures: list[Tensor]
    dense: Tensor
    score: str = ""
    bias: Tensor | None = None  # what the score adds, for the oracle

    def mask(self) -> Mask:
        return Mask(self.max_ahead, self.max_behind, self.predicate)

    def settings(self) -> dict[str, Any]:
        """The keywords of a strategy's call that the mask decides."""
        return dict(max_ahead=self.max_ahead, max_behind=self.max_behind, predicate=self.predicate, score=self.score)


@dataclass(frozen=True)
class Case:
    """One attention in global sizes. The same seed gives the same tensors on every rank."""

    q_len: int
    k_len: int
    mask: str = "causal"
    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    value_dim: int = 8
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of out, full length."""
        generator = torch.Generator().manual_seed(self.seed)
        B, H, K = self.batch, self.heads, self.kv_heads
        shapes = (
            (B, H, self.q_len, self.head_dim),
            (B, K, self.k_len, self.head_dim),
            (B, K, self.k_len, self.value_dim),
            (B, H, self.q_len, self.value_dim),
        )
        q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype) for shape in shapes)
        return q, k, v, grad

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def mask_case(self) -> MaskCase:
        q, k = torch.arange(self.q_len)[:, None], torch.arange(self.k_len)
        return MASKS[self.mask](self, q, k, torch.Generator().manual_seed(self.seed + 1))


def _segments(case: Case, length: int) -> Tensor:
    return torch.arange(length).expand(case.batch, -1) * 3 // length + torch.arange(case.batch)[:, None]


def _segment_mask(case: Case, q: Tensor, k: Tensor, _: torch.Generator) -> MaskCase:
    docs_q, docs_k = _segments(case, case.q_len), _segments(case, case.k_len)
    dense = (k <= q) & (docs_q[:, :, None] == docs_k[:, None, :])
    return MaskCase(0, None, "Eq(c0(b, q), c1(b, k))", [docs_q, docs_k], dense[:, None])


def _key_padding(case: Case, q: Tensor, k: Tensor, generator: torch.Generator) -> MaskCase:
    # The first batch element has its first third padded on the left, so its first causal rows see nothing at all.
    kept = torch.rand(case.batch, case.k_len, generator=generator) > 0.2
    kept[0, : case.k_len // 3] = False
    return MaskCase(0, None, "Ne(c0(b, k), 0)", [kept], ((k <= q) & kept[:, None, :])[:, None])


def _nothing(case: Case, q: Tensor, k: Tensor, _: torch.Generator) -> MaskCase:
    kept = torch.zeros(case.batch, case.k_len, dtype=torch.bool)
    return MaskCase(None, None, "Ne(c0(b, k), 0)", [kept], kept[:, None, None, :].expand(-1, 1, case.q_len, -1))


def _bias(case: Case, q: Tensor, k: Tensor, _: torch.Generator) -> MaskCase:
    slopes = torch.arange(1, case.heads + 1).view(1, -1, 1, 1) * -0.1
    # float32, as a float32 model would make it: the oracle then sees the same numbers.
    bias = slopes * (q - k).abs()
    return MaskCase(0, None, "", [bias], (k <= q), "f_add(s, c0(0, h, q, k))", bias)


MASKS: dict[str, Callable[[Case, Tensor, Tensor, torch.Generator], MaskCase]] = {
    "none": lambda case, q, k, _: MaskCase(None, None, "", [], (k <= q) | True),
    "causal": lambda case, q, k, _: MaskCase(0, None, "", [], k <= q),
    "causal aligned at the end": lambda case, q, k, _: MaskCase(
        case.k_len - case.q_len, None, "", [], k - q <= case.k_len - case.q_len
    ),
    "window": lambda case, q, k, _: MaskCase(0, 4, "", [], (k <= q) & (q - k <= 4)),
    "window on both sides": lambda case, q, k, _: MaskCase(2, 3, "", [], (k - q <= 2) & (q - k <= 3)),
    "only the future": lambda case, q, k, _: MaskCase(None, -1, "", [], k > q),
    "segments": _segment_mask,
    "key padding": _key_padding,
    "every key masked": _nothing,
    "chunks": lambda case, q, k, _: MaskCase(0, None, "Eq(q//5, k//5)", [], (k <= q) & (q // 5 == k // 5)),
    "prefix": lambda case, q, k, _: MaskCase(None, None, "(k <= q) | (k < 6)", [], (k <= q) | (k < 6)),
    "head dependent": lambda case, q, k, _: MaskCase(
        None, None, "Eq(Mod(h, 2), 0) | (k >= q)", [], (torch.arange(case.heads)[:, None, None] % 2 == 0) | (k >= q)
    ),
    "additive bias": _bias,
}


def dense_attention(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, dq, dk, dv in float64. A row without keys has out 0 and no gradient."""
    q, k, v, grad = (x.double() for x in case.tensors())
    mask, ratio = case.mask_case(), case.heads // case.kv_heads
    keys, values = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    scores = (q @ keys.mT) * case.scale + (0 if mask.bias is None else mask.bias.double())
    # A large finite number instead of -inf: a row without keys is then wiped by the product, not NaN.
    weights = scores.masked_fill(~mask.dense, -1e300).softmax(-1) * mask.dense
    out = weights @ values
    grad_scores = weights * (grad @ values.mT - (grad * out).sum(-1, keepdim=True)) * case.scale
    dq, dk, dv = grad_scores @ keys, grad_scores.mT @ q, weights.mT @ grad
    return out, dq, dk.unflatten(1, (-1, ratio)).sum(2), dv.unflatten(1, (-1, ratio)).sum(2)


def relative_error(x: Tensor, expected: Tensor) -> float:
    """L2 error relative to the expected norm, or to 1 where that is less: inputs are of order 1, and some gradients are 0."""
    return (x.double() - expected.double()).norm().item() / max(expected.double().norm().item(), 1.0)


def check_close(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """out, dq, dk, dv agree to a relative L2 error, and none holds a NaN or an infinity."""
    for name, x, y in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        assert x.shape == y.shape, name
        assert x.isfinite().all(), f"{name} is not finite"
        error = relative_error(x, y)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
