"""The oracle of the attention tests: dense S x S attention in float64, differentiated by torch, and the cases it is asked about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autoseq.runtime.formula import Points
from autoseq.runtime.hashing import keep_mask
from autoseq.runtime.mask import Mask
from autoseq.runtime.tiles import EmptyRows, Problem


@dataclass(frozen=True)
class MaskCase:
    """A mask in the strategies' terms and, for the oracle, as a dense boolean that broadcasts to [B, H, q, k]."""

    max_ahead: int | None
    max_behind: int | None
    predicate: str
    captures: list[Tensor]
    dense: Tensor


@dataclass(frozen=True)
class ScoreCase:
    """A score in the strategies' terms, with `{0}`, `{1}`, ... for its own captures, and as dense torch code for the oracle."""

    formula: str = ""
    captures: list[Tensor] = field(default_factory=list)
    dense: Callable[..., Tensor] = lambda s: s  # of s [B,H,q,k] and the captures
    learned: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """One attention in global sizes. The same seed gives the same tensors on every rank."""

    q_len: int
    k_len: int
    mask: str = "causal"
    score: str = "plain"
    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    value_dim: int = 8
    dtype: torch.dtype = torch.float64
    seed: int = 0
    has_sinks: bool = False
    dropout_p: float = 0.0
    empty_rows: EmptyRows = "zero"

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

    def score_case(self) -> ScoreCase:
        return SCORES[self.score](self, torch.Generator().manual_seed(self.seed + 2))

    def captures(self) -> list[Tensor]:
        """What mask and score look up, the mask's first; those of the score that learn require grad."""
        mask, score = self.mask_case(), self.score_case()
        return [*mask.captures, *(c.requires_grad_(i in score.learned) for i, c in enumerate(score.captures))]

    def sinks(self) -> Tensor | None:
        """One number a head, requiring grad."""
        if not self.has_sinks:
            return None
        return torch.randn(self.heads, generator=torch.Generator().manual_seed(self.seed + 3)).to(self.dtype).requires_grad_()

    def dropout_seed(self) -> Tensor | None:
        return torch.tensor(2**40 + self.seed) if self.dropout_p > 0 else None

    def settings(self) -> dict[str, Any]:
        """The keywords of a strategy's call that do not depend on who calls."""
        mask, first = self.mask_case(), len(self.mask_case().captures)
        return dict(
            scale=self.scale,
            score=self.score_case().formula.format(*(f"c{first + i}" for i in range(9))),
            predicate=mask.predicate,
            max_ahead=mask.max_ahead,
            max_behind=mask.max_behind,
            empty_rows=self.empty_rows,
            dropout_p=self.dropout_p,
            q_len=self.q_len,
            k_len=self.k_len,
        )

    def problem(self, first_head: int = 0) -> Problem:
        """The same for `Forward` and `Backward`."""
        terms = self.settings()
        mask = Mask(terms["max_ahead"], terms["max_behind"], terms["predicate"])
        captures, sinks = [c.detach() for c in self.captures()], self.sinks()
        sinks = None if sinks is None else sinks.detach()
        own = (sinks, self.dropout_seed(), self.dropout_p, self.empty_rows, first_head, self.heads // self.kv_heads)
        return Problem(mask, captures, self.scale, terms["score"], *own)

    def learned(self) -> list[int]:
        """The captures that get a gradient."""
        return [i for i, capture in enumerate(self.captures()) if capture.requires_grad]


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
}


def _distance(case: Case) -> Tensor:
    return torch.arange(case.k_len) - torch.arange(case.q_len)[:, None]


def _random(case: Case, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(case.dtype)


def _alibi(case: Case, generator: torch.Generator) -> ScoreCase:
    distance, slopes = _distance(case), _random(case, generator, case.heads).abs() * 0.1
    return ScoreCase(
        "f_add(s, f_mul({0}(h), to_float32(k - q)))", [slopes], lambda s, slopes: s + slopes[:, None, None] * distance, learned=(0,)
    )


def _relative_bias(case: Case, generator: torch.Generator) -> ScoreCase:
    """T5: distances fall into buckets, a learned table has a number for each bucket and head."""
    table, buckets = _random(case, generator, 5, case.heads), torch.arange(case.q_len + case.k_len) * 5 // (case.q_len + case.k_len)
    at = buckets[_distance(case) + case.q_len]
    return ScoreCase(
        f"f_add(s, {{0}}({{1}}(k - q + {case.q_len}), h))",
        [table, buckets],
        lambda s, table, _: s + table[at].permute(2, 0, 1),
        learned=(0,),
    )


def _dense_float_mask(case: Case, generator: torch.Generator) -> ScoreCase:
    """A mask as models make it: the least finite number where a key is hidden, which in one row is everywhere."""
    hidden = torch.rand(case.batch, 1, case.q_len, case.k_len, generator=generator) > 0.7
    hidden[:, :, case.q_len // 2] = True
    mask = torch.zeros(hidden.shape, dtype=case.dtype).masked_fill(hidden, torch.finfo(torch.float32).min)
    return ScoreCase("f_add(s, {0}(b, 0, q, k))", [mask], lambda s, mask: s + mask)


def _dense_bias(case: Case, generator: torch.Generator, learned: tuple[int, ...] = ()) -> ScoreCase:
    bias = _random(case, generator, 1, case.heads, case.q_len, case.k_len)
    return ScoreCase("f_add(s, {0}(0, h, q, k))", [bias], lambda s, bias: s + bias, learned)


def _hidden_by_infinity(case: Case, generator: torch.Generator) -> ScoreCase:
    kept = torch.rand(case.k_len, generator=generator) > 0.3
    formula = "f_where(Ne({0}(k), 0), f_mul(s, const(1, 2)), const(-1, 0))"
    return ScoreCase(formula, [kept], lambda s, kept: torch.where(kept != 0, s * 0.5, -torch.inf))


def _two_that_learn(case: Case, generator: torch.Generator) -> ScoreCase:
    gates, shifts = _random(case, generator, case.heads), _random(case, generator, case.batch, case.k_len)
    return ScoreCase(
        "f_add(f_mul(f_sigmoid(s), {0}(h)), f_mul(f_exp(f_neg({1}(b, k))), s))",
        [gates, shifts],
        lambda s, gates, shifts: s.sigmoid() * gates[:, None, None] + (-shifts[:, None, None, :]).exp() * s,
        learned=(0, 1),
    )


def _without_s(case: Case, _: torch.Generator) -> ScoreCase:
    table = (torch.arange(case.q_len)[:, None] + torch.arange(case.k_len)).remainder(3).double()
    return ScoreCase("to_float32(Mod(q + k, 3))", [], lambda s: table.expand(s.shape))


SCORES: dict[str, Callable[[Case, torch.Generator], ScoreCase]] = {
    "plain": lambda case, _: ScoreCase(),
    "softcap": lambda case, _: ScoreCase("f_mul(f_tanh(f_div(s, const(3, 2))), const(3, 2))", [], lambda s: (s / 1.5).tanh() * 1.5),
    "ALiBi with slopes that learn": _alibi,
    "relative bias from a table that learns": _relative_bias,
    "a dense float mask": _dense_float_mask,
    "a dense bias": _dense_bias,
    "a dense bias that learns": lambda case, generator: _dense_bias(case, generator, learned=(0,)),
    "keys hidden by -inf": _hidden_by_infinity,
    "two captures that learn": _two_that_learn,
    "a score without s": _without_s,
}


def kinds_beside(score: str) -> list[EmptyRows]:
    """What rows without keys may get, with a score: where it hides keys itself, a finite mask beside it is refused or not the last word."""
    kinds: list[EmptyRows] = ["zero", "nan", "nan_fill"]
    return ["zero"] if score == "a dense float mask" else kinds if score == "keys hidden by -inf" else [*kinds, "uniform", "uniform_fill"]


def dense_attention(case: Case) -> tuple[Tensor, ...]:
    """out, dq, dk, dv, then the gradients of the captures that learn and of the sinks, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in case.tensors()[:3]]
    own = case.score_case()
    looked_up = [c.detach().double().requires_grad_(i in own.learned) if c.is_floating_point() else c for i, c in enumerate(own.captures)]
    sinks = case.sinks()
    sinks = None if sinks is None else sinks.detach().double().requires_grad_()
    ratio = case.heads // case.kv_heads
    q, k, v = (leaves[0], *(x.repeat_interleave(ratio, 1) for x in leaves[1:]))
    scores = own.dense((q @ k.mT) * case.scale, *looked_up)
    weights = _softmax(scores, case.mask_case().dense.expand(scores.shape), sinks, case.empty_rows)
    if case.dropout_p > 0:
        points = Points.of(case.batch, range(case.heads), torch.arange(case.q_len), torch.arange(case.k_len))
        weights = weights * keep_mask(case.dropout_seed(), points, case.dropout_p) / (1 - case.dropout_p)
    out = weights @ v
    leaves += [x for x in looked_up if x.requires_grad] + ([] if sinks is None else [sinks])
    grads = torch.autograd.grad(out, leaves, case.tensors()[3].double(), allow_unused=True)
    return out.detach(), *(torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True))


def _softmax(scores: Tensor, allowed: Tensor, sinks: Tensor | None, empty_rows: EmptyRows) -> Tensor:
    if empty_rows == "zero":
        scores = scores.masked_fill(~allowed, -torch.inf)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        if sinks is None:
            return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    else:
        number = -torch.inf if empty_rows.startswith("nan") else torch.finfo(torch.float64).min
        hidden = scores.masked_fill(~allowed, number)
        scores = hidden if empty_rows.endswith("_fill") else scores + torch.zeros_like(scores).masked_fill(~allowed, number)
    if sinks is None:
        return scores.softmax(-1)
    column = sinks[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def relative_error(x: Tensor, expected: Tensor) -> float:
    """L2 error relative to the expected norm, or to 1 where that is less: inputs are of order 1, and some gradients are 0."""
    return (x.double() - expected.double()).norm().item() / max(expected.double().norm().item(), 1.0)


NAMES = ("out", "dq", "dk", "dv", "the first further gradient", "the second", "the third")


def check_close(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """out and all gradients agree to a relative L2 error, and are NaN exactly where they should be."""
    assert len(results) == len(expected)
    for name, x, y in zip(NAMES, results, expected, strict=False):
        assert x.shape == y.shape, name
        assert torch.equal(x.isnan(), y.isnan()), f"{name} is NaN at {int(x.isnan().sum())} places, not {int(y.isnan().sum())}"
        x, y = x.nan_to_num(0), y.nan_to_num(0)
        assert x.isfinite().all(), f"{name} is not finite"
        error = relative_error(x, y)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
