"""A c10d process group whose ranks are threads of one process: `rank_threads` runs them.

A collective deposits what this rank gives and is done once all ranks have deposited; only waiting for it blocks, as with gloo.
Ranks that call different collectives, or give tensors that do not fit together, are an error, where gloo would hang or mix them up.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "autoseq_threads"

Wait = Callable[[Callable[[], bool], str], None]
Finish = Callable[[list[Any]], None]


class Mailbox:
    """What the ranks of a group have given to each other."""

    def __init__(self, P: int, wait_until: Wait) -> None:
        self.P, self.wait_until = P, wait_until
        self.calls: dict[int, dict[int, tuple[str, Any]]] = defaultdict(dict)
        self.letters: dict[tuple[int, int, int], deque[list[Tensor]]] = defaultdict(deque)

    def deposit(self, number: int, rank: int, kind: str, given: Any) -> None:
        """What `rank` gives to the group's collective of this number."""
        self.calls[number][rank] = (kind, given)
        kinds = {rank: kind for rank, (kind, _) in self.calls[number].items()}
        assert len(set(kinds.values())) == 1, f"ranks call different collectives: {dict(sorted(kinds.items()))}"

    def all_of(self, number: int, kind: str) -> list[Any]:
        """What all ranks gave to the collective; waits for them."""
        call = self.calls[number]
        self.wait_until(lambda: len(call) == self.P, f"{kind} number {number}")
        return [call[rank][1] for rank in range(self.P)]


class _Later(dist._Work):
    """What is finished when it is waited for."""

    def __init__(self, finish: Callable[[], None]) -> None:
        super().__init__()
        self._finish: Callable[[], None] | None = finish

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        finish, self._finish = self._finish, None
        if finish is not None:
            with torch.no_grad():
                finish()
        return True


class ThreadGroup(dist.ProcessGroup):
    """One rank's end of the group."""

    mailbox: Mailbox  # of the group that is being made

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue] (torch's stub lists another constructor)
        self._mailbox, self._calls = self.mailbox, 0

    def getBackendName(self) -> str:
        return BACKEND

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def _collective(self, kind: str, given: Any, finish: Finish) -> dist.Work:
        self._calls += 1
        number = self._calls
        self._mailbox.deposit(number, self.rank(), kind, given)
        return _Later(lambda: finish(self._mailbox.all_of(number, kind)))

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        name = next(name for name in _REDUCTIONS if op == getattr(dist.ReduceOp, name))
        finish = _REDUCTIONS[name]
        return self._collective(f"allreduce {name}", _copies(tensors), lambda given: _each(tensors, [finish(xs) for xs in _columns(given)]))

    def all_gather_single(self, output: Tensor, given: Tensor, opts: Any = None) -> dist.Work:
        return self.all_gather_single_coalesced([output], [given])

    def all_gather_single_coalesced(self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None) -> dist.Work:
        def finish(given: list[Any]) -> None:
            _each(outputs, [torch.cat([x.reshape(-1) for x in xs]) for xs in _columns(given)])

        return self._collective("all_gather", _copies(tensors), finish)

    def allgather(self, outputs: list[list[Tensor]], tensors: list[Tensor], opts: Any = None) -> dist.Work:
        def finish(given: list[Any]) -> None:
            for output, xs in zip(outputs, _columns(given), strict=True):
                _each(output, xs)

        return self._collective("allgather", _copies(tensors), finish)

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any = None) -> dist.Work:
        return self.reduce_scatter_single_coalesced([output], [given])

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None) -> dist.Work:
        def finish(given: list[Any]) -> None:
            _each(outputs, [_sum(xs).reshape(-1).chunk(self.size())[self.rank()] for xs in _columns(given)])

        return self._collective("reduce_scatter", _copies(tensors), finish)

    def all_to_all_single(self, output: Tensor, given: Tensor, arriving: list[int], leaving: list[int], opts: Any = None) -> dist.Work:
        sizes = list(leaving) or [given.shape[0] // self.size()] * self.size()

        def finish(everyone: list[Any]) -> None:
            pieces = [x.narrow(0, _start(sent, self.rank()), sent[self.rank()]) for x, sent in everyone]
            assert not arriving or [len(piece) for piece in pieces] == list(arriving), "a rank sends another size than is awaited"
            output.copy_(torch.cat(pieces).view(output.shape))

        return self._collective("all_to_all", (given.detach().clone(), sizes), finish)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        return self._collective("broadcast", _copies(tensors), lambda given: _each(tensors, given[opts.rootRank]))

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._collective("barrier", None, lambda _: None)

    def send(self, tensors: list[Tensor], to: int, tag: int) -> dist.Work:
        self._mailbox.letters[self.rank(), to, tag].append(_copies(tensors))
        return _Later(lambda: None)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> dist.Work:
        letters = self._mailbox.letters[source, self.rank(), tag]

        def finish() -> None:
            self._mailbox.wait_until(lambda: bool(letters), f"a message from rank {source}, tag {tag}")
            _each(tensors, letters.popleft())

        return _Later(finish)

    # The names of torch 2.12 and before; from C++ each is called by the name that is there, and by position.
    allreduce_coalesced = allreduce
    _allgather_base = all_gather_single  # pyright: ignore[reportAssignmentType]
    allgather_into_tensor_coalesced = all_gather_single_coalesced  # pyright: ignore[reportAssignmentType]
    _reduce_scatter_base = reduce_scatter_single  # pyright: ignore[reportAssignmentType]
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # pyright: ignore[reportAssignmentType]
    alltoall_base = all_to_all_single  # pyright: ignore[reportAssignmentType]


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().clone() for x in tensors]


def _columns(given: list[list[Tensor]]) -> list[list[Tensor]]:
    for xs in zip(*given, strict=True):
        assert len({(x.shape, x.dtype) for x in xs}) == 1, f"ranks give tensors that differ: {[(x.shape, x.dtype) for x in xs]}"
    return [list(xs) for xs in zip(*given, strict=True)]


def _each(outputs: list[Tensor], values: list[Tensor]) -> None:
    for output, value in zip(outputs, values, strict=True):
        output.detach().copy_(value.view(output.shape))


def _sum(xs: list[Tensor]) -> Tensor:
    return torch.stack(xs).sum(0).to(xs[0].dtype)


_REDUCTIONS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "SUM": _sum, "MAX": lambda xs: torch.stack(xs).amax(0), "MIN": lambda xs: torch.stack(xs).amin(0),
}  # fmt: skip


def _start(sizes: list[int], rank: int) -> int:
    return [0, *accumulate(sizes)][rank]


if not hasattr(dist.Backend, BACKEND.upper()):
    dist.Backend.register_backend(BACKEND, ThreadGroup, devices=["cpu"])
