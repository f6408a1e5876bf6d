"""All ranks of a group as threads of one process that take turns: one runs, until it has to wait for another.

What runs on them is autoseq's own: its runners, collectives, strategies and deferred outputs, over a c10d group that hands
tensors from thread to thread. A thread passes its turn on only where it waits, so a run is the same every time, and where no
rank can go on there is an error at once, in place of a hang. Every rank has a random state of its own, as a process has.

Dynamo's compiled code serves all threads, so a program is compiled once: by the first rank that comes to it, alone (see
`lockstep_backend`).
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import ThreadLocalWorld

from thread_group import BACKEND, Mailbox, ThreadGroup

SHORT_NAP_S = 0.0002
really_sleep = time.sleep


class RanksStopped(BaseException):
    """Another rank failed, or none could go on: this thread ends. No `except Exception` may keep it."""


class NoRankCanGoOn(AssertionError):
    """Every rank waits for another: on real ranks, a hang."""


class Turns:
    """Whose turn it is among `P` threads."""

    def __init__(self, P: int) -> None:
        self.P = P
        self._ready: list[Callable[[], bool] | None] = [lambda: True] * P  # None: its job is done
        self._where = [""] * P
        self._gates = [threading.Semaphore(0) for _ in range(P)]
        self._own = threading.local()
        self.failure: BaseException | None = None
        self._met = [0] * P

    @property
    def rank(self) -> int:
        """The rank of this thread; -1 for a thread that is none."""
        return getattr(self._own, "rank", -1)

    def enter(self, rank: int) -> None:
        """Called by a rank's thread before anything else."""
        self._own.rank = rank
        self._gates[rank].acquire()

    def start(self) -> None:
        """Let the first rank run."""
        self._pass_on(0)

    def leave(self, failure: BaseException | None) -> None:
        """This rank's job is done, or has failed."""
        self._ready[self.rank] = None
        if failure is not None and self.failure is None and not isinstance(failure, RanksStopped):
            self.failure = failure
        self._stop_all() if self.failure is not None else self._pass_on(0)

    def wait_until(self, ready: Callable[[], bool], where: str) -> None:
        """Go on when `ready` holds; the lowest rank that can run goes first."""
        if not ready():
            self._give_away(ready, where, first=0)

    def meet(self, where: str) -> None:
        """Go on when all ranks have come; the lowest goes first, until it waits or is done."""
        self._met[self.rank] += 1
        number = self._met[self.rank]
        self._give_away(lambda: min(self._met) >= number, where, first=0)

    def nap(self, _seconds: float) -> None:
        """In place of `time.sleep`: the others run meanwhile."""
        really_sleep(SHORT_NAP_S)
        self._give_away(lambda: True, "a meeting in the store", first=self.rank + 1)

    def _give_away(self, ready: Callable[[], bool], where: str, first: int) -> None:
        rank, drawn = self.rank, torch.get_rng_state()
        self._ready[rank], self._where[rank] = ready, where
        self._pass_on(first)
        self._gates[rank].acquire()
        if self.failure is not None:
            raise RanksStopped
        torch.set_rng_state(drawn)

    def _pass_on(self, first: int) -> None:
        waiting = [(rank, ready) for rank in ((first + i) % self.P for i in range(self.P)) if (ready := self._ready[rank]) is not None]
        chosen = next((rank for rank, is_ready in waiting if is_ready()), None)
        if chosen is not None:
            self._gates[chosen].release()
        elif waiting:
            places = ", ".join(f"rank {rank} waits for {self._where[rank]}" for rank, _ in sorted(waiting, key=lambda pair: pair[0]))
            self.failure = NoRankCanGoOn(f"no rank can go on: {places}")
            self._stop_all()

    def _stop_all(self) -> None:
        for gate in self._gates:
            gate.release()


class RankThreads:
    """Runs one function on P ranks, each a thread with a process group of its own; serves one job."""

    def __init__(self, P: int) -> None:
        self.turns = Turns(P)
        self._mailbox = Mailbox(P, self.turns.wait_until)
        self.worlds: list[Any] = [None] * P
        self._store = dist.HashStore()

    def run(self, job: Callable[[int], Any]) -> list[Any]:
        """`job(rank)` on every rank; what each returned. The first failure is raised, with the traceback of its thread."""
        results: list[Any] = [None] * self.turns.P
        world = dist.distributed_c10d._world
        torch._C._distributed_c10d._set_thread_isolation_mode(True)
        dist.distributed_c10d._world = ThreadLocalWorld()
        drawn, hook = torch.get_rng_state(), sys.excepthook  # which every init_process_group wraps
        try:
            threads = [threading.Thread(target=self._serve, args=(rank, job, results, drawn), daemon=True) for rank in range(self.turns.P)]
            for thread in threads:
                thread.start()
            self.turns.start()
            for thread in threads:
                thread.join()
        finally:
            dist.distributed_c10d._world = world
            torch._C._distributed_c10d._set_thread_isolation_mode(False)
            sys.excepthook = hook
        if self.turns.failure is not None:
            raise self.turns.failure
        return results

    def _serve(self, rank: int, job: Callable[[int], Any], results: list[Any], drawn: torch.Tensor) -> None:
        failure: BaseException | None = None
        self.turns.enter(rank)
        try:
            if self.turns.failure is None:
                torch.set_rng_state(drawn)
                with torch.autograd.set_multithreading_enabled(False):
                    self._join(rank)
                    results[rank] = job(rank)
        except BaseException as error:  # noqa: BLE001 (raised again in the thread that asked)
            error.add_note("".join(traceback.format_exception(error)[-12:])) if not isinstance(error, RanksStopped) else None
            failure = error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            self.turns.leave(failure)

    def _join(self, rank: int) -> None:
        ThreadGroup.mailbox = self._mailbox
        dist.init_process_group(BACKEND, store=self._store, rank=rank, world_size=self.turns.P, timeout=timedelta(seconds=20))
        self.worlds[rank] = dist.distributed_c10d._world._get_world()
        self.turns.wait_until(lambda: None not in self.worlds, "the group")
