"""What ranks do in the tests of faults: attend over a group of their own until one of them, at a chosen message, stops."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from attention_job import call_keywords, shard
from autoseq.runtime.collectives import all_reduce
from autoseq.runtime.counting import BACKEND, CountedGroup
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from dense_attention import Case

VICTIM = 1
EXIT_CODE = 9
STALLED_S = 30.0  # a rank that stalls wakes up when the others have given up; this long if they never do

Phase = Literal["forward", "backward"]
Mesh = tuple[int, ...]  # nodes and ranks in each; empty for one level


@dataclass(frozen=True)
class Outcome:
    """What one rank saw: the error's type and text, and the seconds until it came."""

    error: str
    seconds: float


class Messages:
    """Counts what the process posts on counted groups, and does something before the `stop_at`-th."""

    def __init__(self) -> None:
        self.posted, self.stop_at, self.stop = 0, 0, lambda: None

    def count(self, op: str, sent: Any) -> None:
        self.posted += 1
        if self.posted == self.stop_at:
            self.stop()

    def stop_in(self, messages: int, stop: Callable[[], None]) -> None:
        self.posted, self.stop_at, self.stop = 0, messages, stop


def attend(
    rank: int, P: int, strategy: str, layout: Layout, case: Case, group: str, axes: tuple[str, ...]
) -> tuple[Callable[[], Tensor], Callable[[Tensor], Any]]:
    """The forward and the backward of one rank's attention."""
    leaves = [shard(x, rank, P, layout, padding="edge").requires_grad_() for x in case.tensors()[:3]]
    keywords = {**call_keywords(case, layout), "group": group, "axes": axes}

    def forward() -> Tensor:
        return STRATEGIES[strategy].attention(*leaves, [], None, None, **keywords)

    return forward, lambda out: torch.autograd.grad(out, leaves, torch.ones_like(out))


def stall_in_each(rank: int, P: int, cases: dict[str, tuple[str, Layout, Case, Phase]], mesh: Mesh, timeout_s: float) -> dict[str, Outcome]:
    """One case after the other, each on a new group in which VICTIM stalls halfway through the phase until the others gave up."""
    outcomes = {}
    for number, (name, (strategy, layout, case, phase)) in enumerate(cases.items()):
        done = f"case {number} is done on "

        def wait_for_the_others(done: str = done) -> None:
            keys = [f"{done}{other}" for other in range(P) if other != VICTIM]
            dist.distributed_c10d._get_default_store().wait(keys, datetime.timedelta(seconds=STALLED_S))
            raise InterruptedError("the others gave up")

        outcomes[name] = stop_halfway(rank, P, strategy, layout, case, phase, mesh, timeout_s, wait_for_the_others)
        dist.distributed_c10d._get_default_store().set(f"{done}{rank}", "")
        dist.barrier()
    return outcomes


def die_in_one(rank: int, P: int, strategy: str, layout: Layout, case: Case, phase: Phase, mesh: Mesh, timeout_s: float) -> Outcome:
    """VICTIM dies halfway through the phase."""
    return stop_halfway(rank, P, strategy, layout, case, phase, mesh, timeout_s, lambda: os._exit(EXIT_CODE))


def stop_halfway(
    rank: int, P: int, strategy: str, layout: Layout, case: Case, phase: Phase, mesh: Mesh, timeout_s: float, stop: Callable[[], None]
) -> Outcome:
    """A healthy step that counts messages, then one in which VICTIM stops before its middle message of the phase.

    A rank that needs nothing more from VICTIM ends its phase, and finds out at the next exchange.
    """
    messages = Messages()
    with mock.patch.object(CountedGroup, "count", messages.count):
        healthy, doomed = (new_groups(rank, mesh, s) for s in (60, timeout_s))
        forward, backward = attend(rank, P, strategy, layout, case, *healthy)
        out = forward()
        sent = {"forward": messages.posted}
        backward(out)
        sent["backward"] = messages.posted - sent["forward"]
        forward, backward = attend(rank, P, strategy, layout, case, *doomed)
        out = forward() if phase == "backward" else torch.empty(0)
        dist.barrier()
        if rank == VICTIM:
            messages.stop_in(sent[phase] // 2 + 1, stop)
        return outcome_of(lambda: (backward(out) if phase == "backward" else forward(), all_reduce(torch.ones(1), group=doomed[0])))


def new_groups(rank: int, mesh: Mesh, timeout_s: float) -> tuple[str, tuple[str, ...]]:
    """A group of all ranks and, with a mesh of nodes, those across nodes and inside this rank's node."""
    keywords: dict[str, Any] = dict(backend=BACKEND, timeout=datetime.timedelta(seconds=timeout_s))
    world = dist.new_group(**keywords).group_name
    if not mesh:
        return world, ()
    inside = torch.arange(mesh[0] * mesh[1]).view(mesh)
    axes = []
    for parts in (inside.T.tolist(), inside.tolist()):
        made = [dist.new_group(part, **keywords) for part in parts]
        axes.append(next(group.group_name for group, part in zip(made, parts, strict=True) if rank in part))
    return world, tuple(axes)


def outcome_of(step: Callable[[], Any]) -> Outcome:
    start = time.monotonic()
    try:
        step()
    except Exception as error:  # noqa: BLE001 (which error it is, is what the test asks)
        return Outcome(f"{type(error).__name__}: {error}", time.monotonic() - start)
    return Outcome("no error", time.monotonic() - start)


def die_in_compiled_backward(rank: int, P: int, inner: str) -> tuple[Outcome, Outcome]:
    """VICTIM dies halfway through the backward of a compiled step. What the others see there, and in their next forward."""
    messages = Messages()
    with mock.patch.object(CountedGroup, "count", messages.count):
        x = torch.randn(1, 2, 16, 4, requires_grad=True)
        compiled = torch.compile(attend_causally, backend="autoseq", options={"inner": inner, "strategy": "ulysses", "outputs": "full"})
        healthy, doomed = compiled(x).sum(), compiled(x).sum()
        messages.posted = 0
        healthy.backward()
        if rank == VICTIM:
            messages.stop_in(messages.posted // 2 + 1, lambda: os._exit(EXIT_CODE))
        return outcome_of(doomed.backward), outcome_of(lambda: compiled(x))


def attend_causally(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)
