"""Attention in stages, each some of the heads: the messages of one stage travel while the attention of another is computed.

    forward and backward alike, with three stages:

    messages in      0   1     2                            1 is posted before stage 0 is computed, and waited for after it
    computed             0     1     2
    messages out               0     1     2                0 is posted before stage 1 is computed, and waited for after it

The order is written out in one autograd function, so that it is the order of the traced graph too. Who needs few bytes gets one stage:
each message has its latency. How many there are is the same on every rank, for it decides which collectives are called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.autograd import Function

from autoseq.runtime.attention_call import Terms
from autoseq.runtime.plain import accumulate_dtype
from autoseq.runtime.posted import Posted

HeadRange = tuple[int, int]
"""Heads [start, end)."""

MAX_STAGES = 4

# In the formulas of costs.
STAGES = sympy.Symbol("c", positive=True, integer=True)

# Below about a megabyte a message takes as long as its latency does, and a kernel of so few heads does not fill a device.
MIN_STAGE_BYTES = 2**20


def num_stages(message_bytes: int, pieces: int) -> int:
    """How many stages a message of that size is cut into, if it has so many pieces. The size may be symbolic."""
    for stages in range(min(MAX_STAGES, pieces), 1, -1):
        if message_bytes >= stages * MIN_STAGE_BYTES:
            return stages
    return 1


def cut(heads: HeadRange, stages: int) -> list[HeadRange]:
    """Consecutive heads in as equal parts as they go; some are empty if there are too few."""
    start, count = heads[0], num_heads(heads)
    return [(start + i * count // stages, start + (i + 1) * count // stages) for i in range(stages)]


def num_heads(heads: HeadRange) -> int:
    """How many there are."""
    return heads[1] - heads[0]


def queries_of(kv_heads: HeadRange, heads_per_kv: int, among: HeadRange) -> HeadRange:
    """Those of some query heads that use some KV heads."""
    start, end = max(kv_heads[0] * heads_per_kv, among[0]), min(kv_heads[1] * heads_per_kv, among[1])
    return (start, end) if start < end else (among[0], among[0])


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients a backward is to find: of which captures, whether of the sinks, and of which of q, k and v (0, 1, 2)."""

    learned: list[int]
    sinks: bool
    of_qkv: list[int]


class Staged(ABC):
    """A strategy's attention, both ways."""

    @abstractmethod
    def forward(self, terms: Terms, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """out, and what the backward needs."""

    @abstractmethod
    def backward(
        self, terms: Terms, wanted: Wanted, grad_out: Tensor, kept: Sequence[Tensor]
    ) -> tuple[list[Tensor | None], list[list[Tensor]]]:
        """dq, dk, dv as far as they are wanted, and each stage's gradients of the captures and sinks."""


def attend_in_stages(staged: Staged, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """The attention, with a gradient for q, k, v, captures and sinks."""
    captures, sinks, seed = terms.tensors
    return _InStages.apply(staged, replace(terms, tensors=([], None, None)), q, k, v, *captures, sinks, seed)


def pipelined(stages: int, post: Callable[[int], Posted], work: Callable[[int, Tensor], Posted | None]) -> list[Tensor]:
    """What the stages' work sent and this rank got of it. `post(i)` sends what stage i works on, `work(i, what came)` posts its results."""
    landed, leaving, upcoming = [], None, post(0)
    for number in range(stages):
        here = upcoming
        if number + 1 < stages:
            upcoming = post(number + 1)
        sent = work(number, here.arrived())
        # What this stage has worked on must be gone before the next but one is posted.
        del here
        if leaving is not None:
            landed.append(leaving.arrived())
        leaving = sent
    return landed if leaving is None else [*landed, leaving.arrived()]


def stage_buffers(stages: int, there: tuple[int, int], home: tuple[int, int]) -> int:
    """The most bytes of buffers that `pipelined` holds, of equal stages that send and get so many in all on the way there and home.

    What is sent is held until it has arrived. Of what comes there two stages are held, of what has come home all.
    """
    (sent, came), (returned, landed) = there, home
    on_the_way, on_the_way_home = sent + came, returned + landed
    most = on_the_way
    for number in range(stages):
        before = min(number, 1) * on_the_way_home + max(0, number - 1) * landed
        ahead = on_the_way if number + 1 < stages else 0
        posting = on_the_way + ahead + before if ahead else 0
        most = max(most, posting, came + ahead + before + on_the_way_home)
    return most // stages


class _InStages(Function):
    @staticmethod
    def forward(ctx: Any, staged: Staged, terms: Terms, q: Tensor, k: Tensor, v: Tensor, *looked_up: Tensor | None) -> Tensor:
        out, kept = staged.forward(_with(terms, looked_up), q, k, v)
        ctx.staged, ctx.terms, ctx.num_kept = staged, terms, len(kept)
        ctx.save_for_backward(*kept, *looked_up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint, around the program, unpacks no tensor twice
        kept, looked_up = saved[: ctx.num_kept], saved[ctx.num_kept :]
        needed = ctx.needs_input_grad
        captures = needed[5 : 5 + len(looked_up) - 2]
        wanted = Wanted(_numbers(captures), needed[-2], _numbers(needed[2:5]))
        with torch.no_grad():  # second derivatives are `second_derivative`'s matter
            dqkv, shares = ctx.staged.backward(_with(ctx.terms, looked_up), wanted, grads[0], kept)
            found = iter(_totals(shares))
        learned = [next(found) if each else None for each in (*captures, wanted.sinks)]
        return None, None, *dqkv, *learned, None


def _with(terms: Terms, looked_up: Sequence[Tensor | None]) -> Terms:
    *captures, sinks, seed = looked_up
    return replace(terms, tensors=([x for x in captures if x is not None], sinks, seed))


def _numbers(needed: Sequence[bool]) -> list[int]:
    return [i for i, each in enumerate(needed) if each]


def _totals(shares: list[list[Tensor]]) -> list[Tensor]:
    """The sum over stages, rounded once."""
    if len(shares) == 1:
        return shares[0]
    return [add_up(of_one).to(of_one[0].dtype) for of_one in zip(*shares, strict=True)]


def add_up(parts: Sequence[Tensor]) -> Tensor:
    """The sum in the accumulating dtype."""
    total = parts[0].to(accumulate_dtype(parts[0].dtype))
    for part in parts[1:]:
        total = total + part
    return total


def cat_heads(parts: Sequence[Tensor]) -> Tensor:
    """Stages' heads beside each other again."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
