"""Times real kernels on this rank while all others time theirs: what `measure` fits the rates of kernels to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from autoseq.planning.fitting import Sample
from autoseq.runtime.kernels import attend, attend_backward

_BATCH_S = 0.03  # so long calls are made in a row; several times what a scheduler gives a process at once
_ENOUGH_S = 0.3
_LEAST_BATCHES = 3
_TINY = 16


@dataclass(frozen=True, slots=True)
class KernelEffort:
    """What is timed: attention of these lengths (rows and keys) with these heads, products of square matrices, sums of so many elements."""

    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    matrix_sizes: tuple[int, ...]
    elements: tuple[int, ...]
    repeats: int

    @property
    def steps(self) -> int:
        """Of one dtype."""
        return 2 * len(self.lengths) + len(self.matrix_sizes)


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """Samples of one dtype, in floating-point operations."""

    matmul: list[Sample]
    attention: list[Sample]
    attention_backward: list[Sample]


def time_kernels(dtype: torch.dtype, device: torch.device, effort: KernelEffort, advance: Callable[[], None]) -> KernelTimes:
    """Products, and attention without a mask through the kernels that strategies call. Ranks meet in `advance`, so that they compete."""
    matmul, forward, backward = [], [], []
    for n in effort.matrix_sizes:
        x = torch.ones(n, n, dtype=dtype, device=device)
        matmul.append(Sample(2 * n**3, seconds_of(lambda x=x: x @ x, device, effort.repeats)))
        advance()
    for n in effort.lengths:
        pairs, D = effort.heads * n * n, effort.head_dim
        there, back = _attention(n, dtype, device, effort)
        forward.append(Sample(2 * pairs * 2 * D, seconds_of(there, device, effort.repeats)))
        advance()
        backward.append(Sample(2 * pairs * 5 * D, seconds_of(back, device, effort.repeats)))
        advance()
    return KernelTimes(matmul, forward, backward)


def time_launch(dtype: torch.dtype, device: torch.device, effort: KernelEffort) -> float:
    """Seconds of a block so small that only the call counts."""
    there, _ = _attention(_TINY, dtype, device, effort)
    return seconds_of(there, device, effort.repeats)


def time_memory(device: torch.device, effort: KernelEffort) -> list[Sample]:
    """Sums in float32, as partial results are added up: two are read and one is written."""
    samples = []
    for count in effort.elements:
        total, part = torch.zeros(count, device=device), torch.ones(count, device=device)
        samples.append(Sample(12 * count, seconds_of(lambda a=total, b=part: a.add_(b), device, effort.repeats)))
    return samples


def _attention(n: int, dtype: torch.dtype, device: torch.device, effort: KernelEffort) -> tuple[Callable[[], object], Callable[[], object]]:
    """A block's forward and backward."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, effort.heads, n, effort.head_dim)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    scale = effort.head_dim**-0.5
    out, lse = attend(q, k, v, None, False, scale)
    return lambda: attend(q, k, v, None, False, scale), lambda: attend_backward(grad, q, k, v, out.to(dtype), lse, None, False, scale)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of one of many calls in a row: ranks that take turns on a core each have it whole for as long as one short call."""
    _timed(call, device, 1)
    count = max(1, int(_BATCH_S / _timed(call, device, 1)))
    seconds: list[float] = []
    while len(seconds) < repeats and (len(seconds) < _LEAST_BATCHES or sum(seconds) * count < _ENOUGH_S):
        seconds.append(_timed(call, device, count) / count)
    return median(seconds)


def _timed(call: Callable[[], object], device: torch.device, count: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
