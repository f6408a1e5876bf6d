"""A pool of rank processes, started once and shared by every test of a pytest run.

`run_ranks(fn, P, ...)` runs the module-level function `fn(rank, P, ...)` on P processes inside a fresh default process group
and returns what each rank returned. An exception on any rank arrives as `RankError` with that rank's traceback; a hang is
ended after `timeout_s`, with the stacks of the ranks that hung.
"""

from __future__ import annotations

import atexit
import datetime
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch._dynamo.guards
import torch.distributed as dist

from autoseq.launch import preloaded, process_context

MAX_RANKS = 8
# The tests' ranks are forked from the same server as autoseq's own, a new one after each death. These a rank's first program imports.
preloaded += ["torch._inductor.fx_passes.joint_graph", "transformers.models.llama.modeling_llama"]
# Dynamo times the guards of each graph, with the processor's caches emptied before: a fifth of a small trace, for a number nobody reads.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # in the tests' own process too, which imports this file
GRACE_S = 15.0
"""Seconds that the other ranks have to return once one has failed; they may wait for it as long as a test's group does."""


class RankError(Exception):
    """A rank raised, died or hung while running a job; `results` holds what the others returned."""

    def __init__(self, message: str, results: dict[int, Any]) -> None:
        super().__init__(message)
        self.results = results


class _Worker:
    """One rank process and the pipe to it."""

    def __init__(self, context: Any, port: int) -> None:
        self.stacks = tempfile.NamedTemporaryFile(prefix="autoseq-stacks-", mode="r")  # noqa: SIM115 (closed by end)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, port, self.stacks.name), daemon=True)
        self.process.start()
        theirs.close()

    def dump_stacks(self) -> str:
        """What the process is doing now, thread by thread."""
        if self.process.pid is None or not self.process.is_alive():
            return "(the process is gone)"
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        return self.stacks.read()

    def end(self, patience_s: float) -> None:
        """Let the process return from its loop, or kill it."""
        self.pipe.close()
        self.process.join(patience_s)
        self.process.kill()
        self.process.join()
        self.stacks.close()


class RankPool:
    """Rank processes that live from job to job; grown on demand, thrown away after a hang or a death."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._store: dist.TCPStore | None = None
        self._jobs = 0

    def run(self, fn: Callable[..., Any], P: int, args: tuple[Any, ...], backend: str, timeout_s: float) -> list[Any]:
        """Run one job on the first P workers."""
        if not 1 <= P <= MAX_RANKS:
            raise ValueError(f"world_size must be 1..{MAX_RANKS}, got {P}")
        self._grow(P)
        self._jobs += 1
        job = (self._jobs, sys.path, fn.__module__, fn.__qualname__, P, args, backend, timeout_s)
        for rank, worker in enumerate(self._workers[:P]):
            worker.pipe.send_bytes(pickle.dumps((rank, *job)))
        return self._collect(fn.__name__, P, timeout_s)

    def close(self, patience_s: float = 0.0) -> None:
        """End every worker; the next job starts new ones."""
        for worker in self._workers:
            worker.end(patience_s)
        self._workers.clear()

    def _grow(self, P: int) -> None:
        if any(not worker.process.is_alive() for worker in self._workers):
            self.close()
        if self._store is None:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        while len(self._workers) < P:
            self._workers.append(_Worker(process_context(), self._store.port))

    def _collect(self, name: str, P: int, timeout_s: float) -> list[Any]:
        ranks: dict[Any, int] = {worker.pipe: rank for rank, worker in enumerate(self._workers[:P])}
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout_s
        while ranks and (ready := wait(list(ranks), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = ranks.pop(pipe)
                ok, value = self._receive(rank, pipe)
                if ok:
                    results[rank] = value
                else:
                    failures.append(value)
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if ranks:
            missing = sorted(ranks.values())
            stacks = "\n".join(f"rank {r} hangs at:\n{self._workers[r].dump_stacks()}" for r in missing)
            failures.append(f"ranks {missing} of {P} did not return within {timeout_s} s\n{stacks}")
            self.close()
        if failures:
            raise RankError(f"{name} failed\n" + "\n".join(failures), results)
        return [results[rank] for rank in range(P)]

    def _receive(self, rank: int, pipe: Any) -> tuple[bool, Any]:
        try:
            return pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._workers[rank].process.join(1)
            return False, f"rank {rank} died with exit code {self._workers[rank].process.exitcode}"


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo", timeout_s: float = 120
) -> list[Any]:
    """`fn(rank, world_size, *args)` on `world_size` processes; what each returned, in rank order. Raises RankError."""
    return _POOL.run(fn, world_size, args, backend, timeout_s)


def close_pool() -> None:
    """End the rank processes."""
    _POOL.close(patience_s=5.0)


_POOL = RankPool()
atexit.register(close_pool)


def _serve(pipe: Connection, port: int, stacks_path: str) -> None:
    torch.set_num_threads(1)
    # Or a rank whose job is done at once closes connections that another one has not finished making.
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    gc.freeze()  # what is imported stays: looking through it again and again is a tenth of a compilation
    client = dist.TCPStore("127.0.0.1", port, is_master=False)
    stacks = open(stacks_path, "a")  # noqa: SIM115 (faulthandler keeps it for the process's life)
    faulthandler.register(signal.SIGUSR1, file=stacks)
    while True:
        try:
            rank, job, path, module, qualname, P, args, backend, timeout_s = pickle.loads(pipe.recv_bytes())
        except EOFError:
            # The last collection of an interpreter that imported torch takes seconds; nothing here needs it.
            gc.freeze()
            return
        sys.path[:] = path
        try:
            reply = True, _run_job(dist.PrefixStore(f"job{job}", client), rank, module, qualname, P, args, backend, timeout_s)
            message = pickle.dumps(reply)
        except Exception as error:  # noqa: BLE001 (whatever a job raises belongs to the test)
            text = f"rank {rank} raised {type(error).__name__}: {error}\n{traceback.format_exc()}"
            message = pickle.dumps((False, text))
        pipe.send_bytes(message)


def _run_job(
    store: dist.Store, rank: int, module: str, qualname: str, P: int, args: tuple[Any, ...], backend: str, timeout_s: float
) -> Any:
    fn: Any = importlib.import_module(module)
    for part in qualname.split("."):
        fn = getattr(fn, part)
    if backend == "autoseq_counted":
        importlib.import_module("autoseq.runtime.counting")
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    timeout = datetime.timedelta(seconds=timeout_s)
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=P, timeout=timeout)
    torch.manual_seed(0)
    try:
        return fn(rank, P, *args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
