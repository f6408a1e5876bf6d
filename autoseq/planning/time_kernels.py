"""Times real kernels on this rank while all others time theirs: what `measure` fits the rates of kernels to.

On CPUs counted is the time that the calling thread, which takes its part in every kernel, had a core, times the threads that take turns
on one: what else runs on the machine is not in it. On CUDA it is the time until the device is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

import torch

from autoseq.planning.fitting import Sample
from autoseq.runtime.blockwise import Backward, Forward
from autoseq.runtime.kernels import attend, attend_backward
from autoseq.runtime.mask import Mask
from autoseq.runtime.tiles import Problem

_BATCH_S = 0.03  # so long calls are made in a row
_LEAST_S = 1e-6  # a call takes no less, whatever a coarse clock says
_ENOUGH_S = 0.2
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


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds of kernels on a device of which each core is shared by so many threads (`shared_cores`)."""

    device: torch.device
    turns: float = 1.0

    def now(self) -> float:
        """On CUDA, once the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return self.turns * time.thread_time()


def time_kernels(dtype: torch.dtype, clock: Clock, effort: KernelEffort, advance: Callable[[], None]) -> KernelTimes:
    """Products, and attention without a mask through the kernels that strategies call. Ranks meet in `advance`, so that they compete."""
    matmul, forward, backward = [], [], []
    for n in effort.matrix_sizes:
        x = torch.ones(n, n, dtype=dtype, device=clock.device)
        matmul.append(Sample(2 * n**3, seconds_of(lambda x=x: x @ x, clock, effort.repeats)))
        advance()
    for n in effort.lengths:
        pairs, D = effort.heads * n * n, effort.head_dim
        there, back = _attention(n, dtype, clock.device, effort)
        forward.append(Sample(2 * pairs * 2 * D, seconds_of(there, clock, effort.repeats)))
        advance()
        backward.append(Sample(2 * pairs * 5 * D, seconds_of(back, clock, effort.repeats)))
        advance()
    return KernelTimes(matmul, forward, backward)


def time_launch(dtype: torch.dtype, clock: Clock, effort: KernelEffort) -> float:
    """Seconds that a block costs beside its work: of one so small that nothing else counts, the mean of forward and backward.

    On CUDA the kernel is launched while others run, and what the runtime does to find and merge blocks is done meanwhile. A CPU does that
    instead of computing, so there it is a block as the runtime calls it, after a larger one has taken the caches.
    """
    if clock.device.type == "cuda":
        calls = _attention(_TINY, dtype, clock.device, effort)
        return sum(seconds_of(call, clock, effort.repeats) for call in calls) / len(calls)
    _, before = _attention(effort.lengths[len(effort.lengths) // 2], dtype, clock.device, effort)
    calls = _blocks(dtype, clock.device, effort)
    return sum(_seconds_after(before, call, clock, effort.repeats) for call in calls) / len(calls)


def time_memory(clock: Clock, effort: KernelEffort) -> list[Sample]:
    """Sums in float32, as partial results are added up: two are read and one is written."""
    samples = []
    for count in effort.elements:
        total, part = torch.zeros(count, device=clock.device), torch.ones(count, device=clock.device)
        samples.append(Sample(12 * count, seconds_of(lambda a=total, b=part: a.add_(b), clock, effort.repeats)))
    return samples


def _blocks(dtype: torch.dtype, device: torch.device, effort: KernelEffort) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward and backward of a block among those of a longer attention."""
    q, k, v, grad = _tensors(_TINY, dtype, device, effort)
    chunks, problem = [(0, 0, _TINY)], Problem(Mask(), [], effort.head_dim**-0.5)
    there = Forward(q, effort.heads, effort.head_dim, chunks, chunks, problem)
    there.add(k, v, chunks)
    out, lse = (x.clone() for x in there.result())
    back = Backward(grad, q, out.to(dtype), lse, effort.heads, chunks, chunks, problem)
    dk, dv = (torch.zeros_like(x, dtype=back.dq.dtype) for x in (k, v))
    return lambda: there.add(k, v, chunks), lambda: back.add(k, v, chunks, dk, dv)


def _attention(n: int, dtype: torch.dtype, device: torch.device, effort: KernelEffort) -> tuple[Callable[[], object], Callable[[], object]]:
    """A block's forward and backward."""
    q, k, v, grad = _tensors(n, dtype, device, effort)
    scale = effort.head_dim**-0.5
    out, lse = attend(q, k, v, None, False, scale)
    return lambda: attend(q, k, v, None, False, scale), lambda: attend_backward(grad, q, k, v, out.to(dtype), lse, None, False, scale)


def _tensors(n: int, dtype: torch.dtype, device: torch.device, effort: KernelEffort) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, effort.heads, n, effort.head_dim)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))


def seconds_of(call: Callable[[], object], clock: Clock, repeats: int) -> float:
    """Of one of many calls in a row, the median of some rows."""
    _timed(call, clock, 1)
    count = max(1, int(_BATCH_S / max(_LEAST_S, _timed(call, clock, 1))))
    seconds: list[float] = []
    while len(seconds) < repeats and (len(seconds) < _LEAST_BATCHES or sum(seconds) * count < _ENOUGH_S):
        seconds.append(_timed(call, clock, count) / count)
    return median(seconds)


def _seconds_after(before: Callable[[], object], call: Callable[[], object], clock: Clock, repeats: int) -> float:
    """Of a call that follows on another, the median; the mean where the clock is so coarse that most calls take no time."""
    seconds: list[float] = []
    for _ in range(repeats):
        before()
        seconds.append(_timed(call, clock, 1))
    return max(_LEAST_S, median(seconds) or fmean(seconds))


def _timed(call: Callable[[], object], clock: Clock, count: int) -> float:
    start = clock.now()
    for _ in range(count):
        call()
    return clock.now() - start
