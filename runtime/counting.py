"""A c10d backend that counts what a rank sends: `init_process_group("autoseq_counted")` after importing this module.

It hands every call to gloo (CPU tensors) or NCCL (CUDA tensors) and adds its messages and bytes to process-wide counters, by
the conventions of `runtime.traffic`. Tests hold each strategy's cost formula to these counts; `autoseq demo` prints them.

It is a `ProcessGroup` in Python rather than a `Backend`, because only the former can be overridden from Python: the calls of
torch.distributed and of the functional collectives both reach it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autoseq.runtime.step_message import posts_a_comparison
from autoseq.runtime.traffic import (
    SILENT,
    Traffic,
    all_gather_traffic,
    all_reduce_traffic,
    all_to_all_traffic,
    reduce_scatter_traffic,
    send_traffic,
)

BACKEND = "autoseq_counted"

_COMPARISON = "comparison of a step"

_counts: dict[str, Traffic] = {}
# Backward passes run on autograd's threads.
_lock = Lock()


def counters() -> dict[str, tuple[int, int]]:
    """Op name -> (messages, bytes sent) of this process since the last reset; ops never called are absent."""
    with _lock:
        return {op: (count.messages, count.bytes) for op, count in _counts.items() if op != _COMPARISON}


def check_counters() -> tuple[int, int]:
    """(messages, bytes sent) by which ranks compared what they were given; `counters` does not have them."""
    with _lock:
        count = _counts.get(_COMPARISON, SILENT)
        return count.messages, count.bytes


def reset_counters() -> None:
    """Forget every count."""
    with _lock:
        _counts.clear()


def _bytes(tensors: Tensor | list[Any]) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(each) for each in tensors)


def _all_to_all(group: dist.ProcessGroup, sent: Tensor, sizes: list[int]) -> Traffic:
    P = group.size()
    if sizes:
        row = _bytes(sent) // max(1, sent.shape[0])
        return all_to_all_traffic([size * row for size in sizes], group.rank())
    return all_to_all_traffic([_bytes(sent) // P] * P, group.rank())


def _root(opts: Any) -> int:
    return opts.rootRank


# Method of ProcessGroup -> (name in the counters, what the arguments of a call make this rank send). Broadcast, scatter and
# gather are counted where the data starts: no strategy uses them.
_Count = Callable[..., Traffic]
_METHODS: dict[str, tuple[str, _Count]] = {
    "allreduce": ("all_reduce", lambda g, xs, *_: all_reduce_traffic(_bytes(xs), g.size())),
    "allreduce_coalesced": ("all_reduce", lambda g, xs, *_: all_reduce_traffic(_bytes(xs), g.size())),
    "allgather": ("all_gather", lambda g, _, xs, *__: all_gather_traffic(_bytes(xs), g.size())),
    "allgather_coalesced": ("all_gather", lambda g, _, xs, *__: all_gather_traffic(_bytes(xs), g.size())),
    "allgather_into_tensor_coalesced": ("all_gather", lambda g, _, xs, *__: all_gather_traffic(_bytes(xs), g.size())),
    "_allgather_base": ("all_gather", lambda g, _, x, *__: all_gather_traffic(_bytes(x), g.size())),
    "all_gather_single": ("all_gather", lambda g, _, x, *__: all_gather_traffic(_bytes(x), g.size())),
    "reduce_scatter": ("reduce_scatter", lambda g, _, xs, *__: reduce_scatter_traffic(_bytes(xs), g.size())),
    "reduce_scatter_tensor_coalesced": (
        "reduce_scatter",
        lambda g, _, xs, *__: reduce_scatter_traffic(_bytes(xs), g.size()),
    ),
    "_reduce_scatter_base": ("reduce_scatter", lambda g, _, x, *__: reduce_scatter_traffic(_bytes(x), g.size())),
    "reduce_scatter_single": ("reduce_scatter", lambda g, _, x, *__: reduce_scatter_traffic(_bytes(x), g.size())),
    "alltoall": ("all_to_all", lambda g, _, xs, *__: all_to_all_traffic([_bytes(x) for x in xs], g.rank())),
    "alltoall_base": ("all_to_all", lambda g, _, x, __, sizes, *___: _all_to_all(g, x, sizes)),
    "all_to_all_single": ("all_to_all", lambda g, _, x, __, sizes, *___: _all_to_all(g, x, sizes)),
    "send": ("send", lambda g, xs, *_: send_traffic(_bytes(xs))),
    "broadcast": ("broadcast", lambda g, xs, opts, *_: Traffic(1, _bytes(xs) if g.rank() == _root(opts) else 0)),
    "scatter": ("scatter", lambda g, _, xs, opts, *__: Traffic(1, _bytes(xs) if g.rank() == _root(opts) else 0)),
    "gather": ("gather", lambda g, _, xs, opts, *__: Traffic(1, _bytes(xs) if g.rank() != _root(opts) else 0)),
    "reduce": ("reduce", lambda g, xs, opts, *_: Traffic(1, _bytes(xs) if g.rank() != _root(opts) else 0)),
    "barrier": ("barrier", lambda *_: Traffic(1, 0)),
}


class CountedGroup(dist.ProcessGroup):
    """Counts, then does what the plain group over the same backends does."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue] (torch's stub lists another constructor)
        self._plain = dist.ProcessGroup(store, rank, size)
        kinds = dist.ProcessGroup.BackendType
        self._add("cpu", kinds.GLOO, dist.ProcessGroupGloo(store, rank, size, timeout))
        if torch.cuda.is_available() and dist.is_nccl_available():
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            nccl_store = dist.PrefixStore("nccl", store)
            self._add("cuda", kinds.NCCL, dist.ProcessGroupNCCL(nccl_store, rank, size, options))

    def _add(self, device: str, kind: Any, backend: Any) -> None:
        # Here for the group's name and for coalescing, which go round the methods below; there for the work itself.
        for group in (self, self._plain):
            group._register_backend(torch.device(device), kind, backend)

    def count(self, op: str, sent: Traffic) -> None:
        """Add one call to the process's counters."""
        with _lock:
            _counts[op] = _counts.get(op, SILENT) + sent


def _counted(method: str, op: str, count: _Count) -> Callable[..., Any]:
    def call(self: CountedGroup, *args: Any, **kwargs: Any) -> Any:
        sent = count(self, *args, *kwargs.values())
        self.count(_COMPARISON if posts_a_comparison() else op, sent)
        return getattr(self._plain, method)(*args, **kwargs)

    call.__name__ = method
    return call


for _method, (_op, _count) in _METHODS.items():
    if hasattr(dist.ProcessGroup, _method):
        setattr(CountedGroup, _method, _counted(_method, _op, _count))

if not hasattr(dist.Backend, BACKEND.upper()):
    dist.Backend.register_backend(BACKEND, CountedGroup, devices=["cpu", "cuda"])
