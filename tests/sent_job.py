"""What a rank does where messages are told apart by receiver: attend, and tell what was sent to whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from attention_job import Run, axes_of, call_keywords, shard
from autoseq.runtime.counting import CountedGroup, _bytes
from autoseq.runtime.strategies import STRATEGIES

Sent = tuple[Counter[int], Counter[int]]
"""Bytes by the receiver's rank among all, forward and backward."""


def sent_on_rank(rank: int, P: int, runs: list[Run], mesh: tuple[int, ...]) -> list[Sent]:
    """What `rank` sends to whom. Whole rows that are gathered or reduced go round a ring, all to the next of the group."""
    axes, sent = axes_of(mesh), Counter[int]()
    with pytest.MonkeyPatch.context() as patch:
        for method, receivers in _RECEIVERS.items():
            patch.setattr(CountedGroup, method, _recorded(getattr(CountedGroup, method), receivers, sent))
        return [_attend(rank, P, run, axes, sent) for run in runs]


def _attend(rank: int, P: int, run: Run, axes: tuple[str, ...], sent: Counter[int]) -> Sent:
    strategy, layout, case = run
    *qkv, grad = (shard(x, rank, P, layout, padding="edge") for x in case.tensors())
    leaves = [x.requires_grad_() for x in qkv]
    sent.clear()
    out = STRATEGIES[strategy].attention(*leaves, case.captures(), **call_keywords(case, layout), axes=axes)
    forward = Counter(sent)
    sent.clear()
    torch.autograd.grad(out, leaves, grad)
    return forward, Counter(sent)


def _recorded(call: Any, receivers: Callable[..., dict[int, int]], sent: Counter[int]) -> Any:
    def recorded(self: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        ranks = dist.get_process_group_ranks(self)
        for place, size in receivers(self, *args, *kwargs.values()).items():
            if place != self.rank() and size:
                sent[ranks[place]] += size
        return call(self, *args, **kwargs)

    return recorded


def _pieces(group: dist.ProcessGroup, _: Any, x: torch.Tensor, __: Any, sizes: list[int], *___: Any) -> dict[int, int]:
    row = _bytes(x) // max(1, x.shape[0])
    return {place: size * row for place, size in enumerate(sizes or [x.shape[0] // group.size()] * group.size())}


def _round(group: dist.ProcessGroup, shard_bytes: int) -> dict[int, int]:
    return {(group.rank() + 1) % group.size(): (group.size() - 1) * shard_bytes}


def _gathered(group: dist.ProcessGroup, _: Any, xs: Any, *__: Any) -> dict[int, int]:
    return _round(group, _bytes(xs))


def _reduced(group: dist.ProcessGroup, _: Any, xs: Any, *__: Any) -> dict[int, int]:
    return _round(group, _bytes(xs) // group.size())


_RECEIVERS: dict[str, Callable[..., dict[int, int]]] = {
    "send": lambda _, xs, to, *__: {to: _bytes(xs)},
    **dict.fromkeys(("alltoall_base", "all_to_all_single"), _pieces),
    **dict.fromkeys(("_allgather_base", "all_gather_single", "allgather_into_tensor_coalesced"), _gathered),
    **dict.fromkeys(("_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_tensor_coalesced"), _reduced),
}
_RECEIVERS = {method: receivers for method, receivers in _RECEIVERS.items() if hasattr(dist.ProcessGroup, method)}
