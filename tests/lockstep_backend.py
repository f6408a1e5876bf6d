"""autoseq's backend for ranks that are threads (`rank_threads`): compiled once, run by each rank as its own.

The first rank that comes to a program compiles it, while the others wait, so what ranks agree on at compile time is agreed on
by that rank alone. With `inner="eager"` the local graph asks for its rank when it runs, and one serves all. AOTAutograd traces
what a rank does, so there the backend is called once for each rank, which the compiling thread pretends to be.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from enum import Enum
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed.distributed_c10d import _register_process_group, _unregister_process_group
from torch.utils._python_dispatch import _disable_current_modes

from autoseq import backend
from autoseq.runtime import collectives
from autoseq.runtime.groups import SequenceGroup
from autoseq.runtime.output_shard import OutputShard
from rank_threads import RankThreads


class PerRank:
    """What Dynamo calls: this thread's runner."""

    def __init__(self, threads: RankThreads, runners: Sequence[Callable[..., Any]]) -> None:
        self._threads, self._runners = threads, runners

    def __call__(self, *args: Any) -> Any:
        results = self._runners[self._threads.turns.rank](*args)
        # Dynamo holds locks while it looks at what comes next, and may gather a deferred output there: every rank's shard is made by then.
        self._threads.turns.meet("the end of a part")
        return results


def lockstep_backend(threads: RankThreads, options: dict[str, Any]) -> Callable[..., Any]:
    """A backend for torch.compile on these ranks."""

    def compile_for_all(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        turns = threads.turns
        with mock.patch("autoseq.agreement.meet", lambda group, purpose, payload, seconds: [payload] * group.size):
            if options.get("inner") == "eager":
                runner = backend.autoseq(gm, inputs, options=options)
                return PerRank(threads, [_of_rank(runner, rank) for rank in range(turns.P)])
            runners = []
            for rank in range(turns.P):
                with pretended(threads, rank):
                    runners.append(backend.autoseq(copy.deepcopy(gm), inputs, options=options))
            return PerRank(threads, runners)

    return compile_for_all


def _of_rank(value: Any, rank: int) -> Any:
    """What a runner holds, as it is on another rank: its group there, and its own records of what was called."""
    if isinstance(value, SequenceGroup):
        return replace(value, rank=rank)
    if type(value) in (dict, list, set):
        return copy.copy(value)
    names = getattr(type(value), "__slots__", ()) or tuple(getattr(value, "__dict__", ()))
    if not type(value).__module__.startswith("autoseq.") or isinstance(value, Enum) or not names:
        return value
    mine = copy.copy(value)
    for name in names:
        if hasattr(value, name):
            object.__setattr__(mine, name, _of_rank(getattr(value, name), rank))
    return mine


@contextmanager
def pretended(threads: RankThreads, rank: int) -> Iterator[None]:
    """Within it this thread is `rank` to torch.distributed."""
    own = dist.distributed_c10d._world._get_world()
    other = threads.worlds[rank]
    _be(other)
    try:
        yield
    finally:
        _be(own)


def _be(world: Any) -> None:
    name = world.pg_names[world.default_pg]
    _unregister_process_group(name)
    _register_process_group(name, world.default_pg)
    dist.distributed_c10d._world._world.world = world


@contextmanager
def on_threads(threads: RankThreads) -> Iterator[None]:
    """Within it autoseq's ranks may be threads: they nap by passing their turn on, and a deferred output is gathered without waiting."""
    turns, made = threads.turns, {}
    make = OutputShard.__init__

    def note(self: Any, *args: Any) -> None:
        make(self, *args)
        if self._rows is not None:
            made.setdefault(self._serial, {})[turns.rank] = self

    def gather(self: Any) -> Tensor:
        shards = [made[self._serial][rank] for rank in range(turns.P)]
        everyone = torch.stack([shard.rows.open(shard.padded.detach(), shard.rows.local) for shard in shards])
        with mock.patch.object(collectives, "_all_gather_bits", lambda x, group: everyone), torch.no_grad(), _disable_current_modes():
            return self.rows.gather(self.padded.detach()).clone(memory_format=torch.contiguous_format)

    with ExitStack() as stack:
        stack.enter_context(mock.patch("autoseq.runtime.rendezvous.time.sleep", turns.nap))
        stack.enter_context(mock.patch.object(OutputShard, "__init__", note))
        if turns.P > 1:
            stack.enter_context(mock.patch.object(OutputShard, "_gather", gather))
        yield
