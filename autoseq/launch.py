"""Starts ranks on this machine and brings back what they return: for commands that are their own torchrun.

One process a rank, gloo on CPUs and NCCL where there is a GPU for each rank. A rank that raises ends the job with its error;
one that dies, or never returns, ends it too: the parent watches all of them and stops the rest. A rank whose parent dies ends
itself. Ranks can tell the parent of their progress while they run.

On Linux's CPUs ranks are forked from a server, a process that has only imported torch and autoseq: once for all ranks.
It starts with the first job and ends with its parent. Processes that use GPUs, or other systems, start from nothing.
"""

import contextlib
import datetime
import gc
import importlib
import logging
import multiprocessing as mp
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from autoseq.logs import log_to_stderr
from autoseq.runtime import errors
from autoseq.runtime.errors import AutoSeqError

Backend = Literal["plain", "counted"]
Listener = Callable[[int, Any], None]
"""Called in the parent with (rank, message) for each message."""

log = logging.getLogger("autoseq")

preloaded = [
    "torch.distributed", "torch._dynamo", "torch._functorch.aot_autograd", "torch._dynamo.backends.debugging", "autoseq.backend",
    "autoseq.cli",
]  # fmt: skip
"""What the server has imported before it forks. None of it may start a thread, which a fork would lose (Inductor's compiler does)."""

_GRACE_S = 5.0  # after one rank failed for no clear reason, the others have this long to give a better one
_LEAVING_S = 2.0  # and ranks that are done have this long to leave by themselves


class LaunchError(AutoSeqError):
    """A rank raised something unforeseen, died or hung; `details` holds its traceback."""

    details: str = ""


@dataclass(frozen=True, slots=True)
class Rank:
    """What a rank function knows of itself."""

    index: int
    world_size: int
    device: torch.device
    _pipe: Connection

    def tell(self, message: Any) -> None:
        """Send a picklable message to the parent."""
        self._pipe.send(("told", message))


def device_kind(world_size: int) -> Literal["cuda", "cpu"]:
    """Where `world_size` ranks run: on GPUs if each can have its own."""
    return "cuda" if torch.cuda.device_count() >= world_size and dist.is_nccl_available() else "cpu"


def process_context(device: Literal["cuda", "cpu"] = "cpu") -> Any:
    """How rank processes start, as a context of `multiprocessing`: from the server, or each by itself where there can be none."""
    if device == "cpu" and sys.platform == "linux":
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(preloaded)
        try:
            with _safe_path():
                forkserver.ensure_running()
        except OSError as error:
            log.warning("ranks are started one by one and import torch each: no server to fork them from can be started (%s)", error)
        else:
            return context
    return mp.get_context("spawn")


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Python that is started here imports nothing from the current folder, where a user's `profile.py` would stand for the library's."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTHONSAFEPATH"]
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: Backend = "plain",
    timeout_s: float = 1800.0,
    listen: Listener | None = None,
) -> list[Any]:
    """`fn(rank, *args)` on `world_size` new processes inside one process group; what each returned, by rank.

    `fn` is a module-level function; arguments and results are pickled. `backend="counted"` counts messages and bytes
    (`runtime.counting`). Ranks see the environment variables of now; but what torch reads while it is imported, forked ranks
    have as it was at the first call. Raises the ranks' own AutoSeqError, or LaunchError if a rank could not start, raised
    another error, died, or was not done after `timeout_s`. No rank outlives the call.
    """
    with tempfile.TemporaryDirectory(prefix="autoseq-") as folder:
        device, store = device_kind(world_size), str(Path(folder) / "store")
        verbose = log.isEnabledFor(logging.DEBUG)
        job = _Job(fn.__module__, fn.__qualname__, args, world_size, backend, device, store, timeout_s, verbose)
        with _processes(job) as ranks:
            return _Watch(ranks, timeout_s, listen).collect()


@dataclass(frozen=True, slots=True)
class _Job:
    module: str
    qualname: str
    args: tuple[Any, ...]
    world_size: int
    backend: Backend
    device: Literal["cuda", "cpu"]
    store: str
    timeout_s: float
    verbose: bool


@contextlib.contextmanager
def _processes(job: _Job) -> Iterator[dict[Connection, Any]]:
    """The rank processes by the parent's end of their pipes, in rank order; killed at the end if they still run."""
    ranks: dict[Connection, Any] = {}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // job.world_size))}
    context, setting = process_context(job.device), (threads | dict(os.environ), sys.path, pickle.dumps(job))
    try:
        for index in range(job.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, index, *setting), daemon=True)
            try:
                process.start()
            except (EOFError, OSError) as error:
                why = "the server that forks ranks has ended; what it said stands above" if isinstance(error, EOFError) else str(error)
                raise LaunchError(f"rank {index} could not be started: {why} ({type(error).__name__})") from error
            theirs.close()
            ranks[ours] = process
        yield ranks
    finally:
        deadline = time.monotonic() + _LEAVING_S
        for pipe, process in ranks.items():
            pipe.close()
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()


class _Watch:
    """Collects the ranks' results and failures."""

    def __init__(self, ranks: dict[Connection, Any], timeout_s: float, listen: Listener | None) -> None:
        self._processes = list(ranks.values())
        self._open = {pipe: index for index, pipe in enumerate(ranks)}
        self._timeout_s, self._listen = timeout_s, listen
        self._deadline = time.monotonic() + timeout_s
        self._results: dict[int, Any] = {}
        self._failures: list[AutoSeqError] = []

    def collect(self) -> list[Any]:
        while self._open and (ready := wait(list(self._open), max(0.0, self._deadline - time.monotonic()))):
            for pipe in ready:
                self._receive(pipe)  # type: ignore[arg-type]
        if self._open and not self._failures:
            raise LaunchError(f"ranks {sorted(self._open.values())} were not done after {self._timeout_s:g} s and were stopped")
        if self._failures:
            raise min(self._failures, key=_severity)
        return [self._results[index] for index in range(len(self._processes))]

    def _receive(self, pipe: Connection) -> None:
        index = self._open[pipe]
        try:
            kind, value = pipe.recv()
        except (EOFError, ConnectionResetError):
            kind, value = "failed", self._death(index)
        if kind == "told":
            if self._listen:
                self._listen(index, value)
            return
        del self._open[pipe]
        if kind == "returned":
            self._results[index] = value
        else:
            self._failures.append(value)
            self._deadline = min(self._deadline, time.monotonic() + _GRACE_S * (_severity(value) > 0))

    def _death(self, index: int) -> AutoSeqError:
        self._processes[index].join(1)
        code = self._processes[index].exitcode
        how = f"was killed by signal {-code} (out of memory?)" if code is not None and code < 0 else f"ended with exit code {code}"
        return LaunchError(f"rank {index} {how} before it returned")


_CONSEQUENCES = (errors.MessageError, errors.RendezvousError, errors.RankMismatchError)


def _severity(error: AutoSeqError) -> int:
    """An error of autoseq's own says most, then a death, then any other error; last what followed from another rank's failure."""
    if isinstance(error, _CONSEQUENCES):
        return 3
    if not isinstance(error, LaunchError):
        return 0
    return 2 if error.details else 1


def _serve(pipe: Connection, index: int, environment: dict[str, str], path: list[str], pickled: bytes) -> None:
    os.environ.clear()  # the server's, which may be older
    os.environ.update(environment)
    sys.path[:] = path
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # gloo prints to stdout, which belongs to the parent's results
    gc.freeze()  # what is imported stays: looking through it again and again is a tenth of a compilation
    try:
        reply = "returned", _run(pipe, index, pickle.loads(pickled))
    except AutoSeqError as error:
        reply = "failed", _sendable(index, error)
    except BaseException as error:  # noqa: BLE001 (whatever ends a rank belongs to the parent)
        failure = LaunchError(f"rank {index} failed: {type(error).__name__}: {error}")
        failure.details = traceback.format_exc()
        reply = "failed", failure
    with contextlib.suppress(BrokenPipeError):  # the parent has given up
        pipe.send(reply)
    pipe.close()


def _end_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _sendable(index: int, error: AutoSeqError) -> AutoSeqError:
    """An error that unpickles in the parent: of its own class where that is one of autoseq's."""
    known = getattr(errors, type(error).__name__, None)
    if known is type(error):
        return known(str(error))
    failure = LaunchError(f"rank {index}: {error}")
    failure.details = traceback.format_exc()
    return failure


def _run(pipe: Connection, index: int, job: _Job) -> Any:
    log_to_stderr(verbose=job.verbose)
    if index > 0:
        log.setLevel(logging.ERROR)  # what rank 0 says holds for all
    if job.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    fn: Any = importlib.import_module(job.module)
    for part in job.qualname.split("."):
        fn = getattr(fn, part)
    device = torch.device("cuda", index) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        _backend(job), store=dist.FileStore(job.store, job.world_size), rank=index, world_size=job.world_size,
        timeout=datetime.timedelta(seconds=job.timeout_s),
    )  # fmt: skip
    result = fn(Rank(index, job.world_size, device, pipe), *job.args)
    dist.barrier()  # no rank leaves while another still needs it
    dist.destroy_process_group()
    return result


def _backend(job: _Job) -> str:
    if job.backend == "counted":
        from autoseq.runtime.counting import BACKEND

        return BACKEND
    return "nccl" if job.device == "cuda" else "gloo"
