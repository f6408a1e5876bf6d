"""The score of a block: the formula applied to the plain score s, and the way its gradient takes back.

A score's derivative is torch's own: the formula is run under autograd on this block alone, with s and what it looks up as leaves. The
share of a looked-up element is added to its tensor's gradient at once, so nothing of the size of the whole tensor is made a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from autoseq.runtime.formula import Lookup, Points, evaluate_float, parse_score

# A gradient with few elements is a sum of very many shares that nearly cancel (a softmax's add up to 0 in each row).
_SUMMED_IN_FLOAT64 = 2**16


class CaptureGradients:
    """The gradients of some captures, by number, while they are summed over blocks."""

    def __init__(self, captures: Sequence[Tensor], learned: Sequence[int], dtype: torch.dtype) -> None:
        self._totals = {i: _zeros(captures[i], dtype) for i in learned}

    @property
    def learned(self) -> tuple[int, ...]:
        return tuple(self._totals)

    def add(self, lookup: Lookup, grad: Tensor) -> None:
        """Add the gradient of what a block looked up."""
        total = self._totals[lookup.number]
        at = torch.zeros((), dtype=torch.int64, device=grad.device)
        for index, size, stride in zip(lookup.indices, total.shape, total.stride(), strict=True):
            at = at + index % size * stride
        total.view(-1).scatter_add_(0, at.expand(grad.shape).reshape(-1), grad.to(total.dtype).reshape(-1))

    def totals(self) -> list[Tensor]:
        """In the order of the captures' numbers as they were given."""
        return list(self._totals.values())


def _zeros(capture: Tensor, dtype: torch.dtype) -> Tensor:
    return capture.new_zeros(capture.shape, dtype=torch.float64 if capture.numel() <= _SUMMED_IN_FLOAT64 else dtype)


@dataclass(frozen=True, slots=True)
class Score:
    """A score formula and what it looks up."""

    formula: str
    captures: list[Tensor]

    def __call__(self, s: Tensor, points: Points) -> Tensor:
        """The score of a block [B,H,q,k] from its plain score."""
        if not self.formula:
            return s
        return self._evaluate(s, points, (), None)

    def with_gradient(self, s: Tensor, points: Points, gradients: CaptureGradients) -> tuple[Tensor, Pull]:
        """The score, and what takes its gradient back to s and to the captures."""
        if not self.formula:
            return s, Pull(s, None, [], gradients)
        lookups: list[Lookup] = []
        with _autograd():
            leaf = s.detach().requires_grad_()
            score = self._evaluate(leaf, points, gradients.learned, lookups)
        return score.detach(), Pull(leaf, score, lookups, gradients)

    def _evaluate(self, s: Tensor, points: Points, learned: Sequence[int], lookups: list[Lookup] | None) -> Tensor:
        score = evaluate_float(parse_score(self.formula), points, self.captures, s, learned=learned, lookups=lookups)
        return score.to(s.dtype).expand(s.shape)


@dataclass(frozen=True, slots=True)
class Pull:
    """Takes the gradient of one block's score back through its formula, once."""

    s: Tensor
    score: Tensor | None  # None: it is s
    lookups: list[Lookup]
    gradients: CaptureGradients

    def __call__(self, grad: Tensor) -> Tensor:
        """The gradient of s; the captures' shares are added to their gradients."""
        if self.score is None:
            return grad
        if not self.score.requires_grad:  # made of positions alone
            return torch.zeros_like(grad)
        leaves = [self.s, *(lookup.values for lookup in self.lookups)]
        with _autograd():
            shares = torch.autograd.grad(self.score, leaves, grad, allow_unused=True)
        for lookup, share in zip(self.lookups, shares[1:], strict=True):
            if share is not None:
                self.gradients.add(lookup, share)
        return torch.zeros_like(grad) if shares[0] is None else shares[0]


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside the kernel of a custom op: the dispatcher has left it behind there, whatever the grad mode says."""
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        yield
