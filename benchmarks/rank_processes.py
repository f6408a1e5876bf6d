"""Starts the ranks of a benchmark, plainly or on the nodes of an emulated slow network, and brings back what they return.

`autoseq.launch` does the same for ranks that share one network; here each node's ranks are started with `ip netns exec`, and meet
over TCP through the slow links. A rank that raises or dies ends the job, and no rank outlives the process that started it.
"""

from __future__ import annotations

import datetime
import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slow_network import DEVICE, SlowNetwork

_GRACE_S = 10.0  # after one rank failed, the others have this long to say why they do too


class RankFailed(Exception):
    """A rank raised, died or hung."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Which rank a process is, and on which node it sits."""

    rank: int
    world_size: int
    node: int
    ranks_per_node: int
    on_network: bool

    @property
    def mesh(self) -> tuple[int, ...]:
        """(nodes, ranks on each), where there are several of both."""
        nodes = self.world_size // self.ranks_per_node
        return (nodes, self.ranks_per_node) if nodes > 1 and self.ranks_per_node > 1 else ()


@dataclass(frozen=True, slots=True)
class _Job:
    seat: Seat
    path: list[str]
    module: str
    function: str
    args: tuple[Any, ...]
    backend: str
    meeting_point: str
    answer: str
    timeout_s: float


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    network: SlowNetwork | None = None,
    ranks_per_node: int = 1,
    backend: str = "autoseq_counted",
    timeout_s: float = 3600.0,
) -> list[Any]:
    """`fn(seat, *args)` on `world_size` new processes inside one process group; what each returned, by rank. Raises RankFailed.

    `fn` is a module-level function. On a network, ranks fill node after node; without one they meet on this machine's loopback.
    """
    meeting_point = f"tcp://{network.address(0)}:29500" if network else f"tcp://127.0.0.1:{_free_port()}"
    with tempfile.TemporaryDirectory(prefix="autoseq-bench-") as folder:
        jobs = [
            _Job(
                Seat(rank, world_size, rank // ranks_per_node, ranks_per_node, network is not None),
                sys.path, fn.__module__, fn.__qualname__, args, backend, meeting_point, str(Path(folder) / str(rank)), timeout_s,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        processes: list[subprocess.Popen[bytes]] = []
        try:
            processes.extend(_start(job, network) for job in jobs)
            _wait(processes, timeout_s)
            return _answers(jobs, processes)
        finally:
            for process in processes:
                _end(process)


def _start(job: _Job, network: SlowNetwork | None) -> subprocess.Popen[bytes]:
    prefix = network.inside(job.seat.node) if network else []
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"GLOO_SOCKET_IFNAME": DEVICE if network else "lo"}
    with open(f"{job.answer}.log", "wb") as log:
        process = subprocess.Popen([*prefix, sys.executable, __file__], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
    assert process.stdin is not None
    process.stdin.write(pickle.dumps(job))
    process.stdin.flush()  # and left open: its end tells the rank that we are gone
    return process


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        time.sleep(0.02)


def _answers(jobs: Sequence[_Job], processes: Sequence[subprocess.Popen[bytes]]) -> list[Any]:
    """What the ranks returned. Raises RankFailed with the words of those that failed, those that still ran last."""
    failed = [(job, process.poll()) for job, process in zip(jobs, processes, strict=True) if process.poll() != 0]
    if failed:
        raise RankFailed("\n".join(_failure(job, code) for job, code in sorted(failed, key=lambda each: each[1] is None)))
    return [pickle.loads(Path(job.answer).read_bytes()) for job in jobs]


def _failure(job: _Job, code: int | None) -> str:
    how = "was not done in time" if code is None else f"ended with exit code {code}"
    log = Path(f"{job.answer}.log").read_text(errors="replace")
    return f"rank {job.seat.rank} {how}:\n{log[-3000:]}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve() -> None:
    job: _Job = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    sys.path[:] = job.path
    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    importlib.import_module("autoseq.runtime.counting")
    fn = getattr(importlib.import_module(job.module), job.function)
    dist.init_process_group(
        job.backend, init_method=job.meeting_point, rank=job.seat.rank, world_size=job.seat.world_size,
        timeout=datetime.timedelta(seconds=job.timeout_s),
    )  # fmt: skip
    result = fn(job.seat, *job.args)
    dist.barrier()  # no rank leaves while another still needs it
    Path(job.answer).write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def _leave_with_parent() -> None:
    # Not through sys.stdin, whose lock the interpreter wants when it ends.
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    # The job was pickled by the module of this name, not by the script that runs it.
    sys.modules["rank_processes"] = sys.modules["__main__"]
    try:
        _serve()
    except Exception:  # noqa: BLE001 (whatever ends a rank is told to the process that started it)
        traceback.print_exc()
        sys.exit(1)
