"""Ranks that autoseq starts itself: results, progress, and no failure that hangs or hides."""

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from autoseq import launch
from autoseq.launch import LaunchError, Rank, device_kind, run_ranks
from autoseq.runtime.errors import StrategyError


def total(rank: Rank, start: float) -> float:
    rank.tell(("reporting", rank.index))
    x = torch.full((1,), start + rank.index, device=rank.device)
    dist.all_reduce(x)
    return x.item()


def raises(rank: Rank, error: Exception) -> None:
    if rank.index == 1:
        raise error
    dist.barrier()


def dies(rank: Rank) -> None:
    if rank.index == 1:
        os._exit(3)
    dist.barrier()


def hangs(rank: Rank) -> None:
    time.sleep(60)


def test_results_come_in_rank_order_and_messages_on_the_way() -> None:
    told: list[Any] = []
    assert run_ranks(total, 2, 10.0, listen=lambda rank, message: told.append((rank, message))) == [21.0, 21.0]
    assert sorted(told) == [(0, ("reporting", 0)), (1, ("reporting", 1))]


@pytest.mark.parametrize(
    ("fn", "arguments", "error", "message"),
    [
        pytest.param(raises, (StrategyError("few heads"),), StrategyError, "^few heads$", id="autoseq's own errors arrive as they are"),
        pytest.param(raises, (KeyError("x"),), LaunchError, "^rank 1 failed: KeyError: 'x'$", id="any other names rank and type"),
        pytest.param(dies, (), LaunchError, "^rank 1 ended with exit code 3 before it returned$", id="a rank that dies"),
    ],
)
def test_one_ranks_failure_ends_all_within_seconds(fn: Any, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_ranks(fn, 2, *arguments, timeout_s=60)


def test_ranks_that_never_return_are_stopped() -> None:
    with pytest.raises(LaunchError, match=r"ranks \[0\] were not done after 8 s and were stopped"):
        run_ranks(hangs, 1, timeout_s=8)


def variables(rank: Rank, names: list[str]) -> tuple[list[str | None], list[str]]:
    """What this process and one that it starts see."""
    command = ["sh", "-c", "; ".join(f"echo ${{{name}-unset}}" for name in names)]
    return [os.environ.get(name) for name in names], subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


READS_AT_IMPORT = """
    import os

    SEEN = os.environ.get("AUTOSEQ_TEST_NEW")

    class Argument:
        pass

    def seen(rank, argument):
        return SEEN
"""


def test_ranks_see_the_environment_as_it_is_when_they_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not as it was when the server did that they are forked from: what is new, changed and gone since, in whatever they import too."""
    names = ["AUTOSEQ_TEST_NEW", "AUTOSEQ_TEST_CHANGED", "AUTOSEQ_TEST_GONE"]
    monkeypatch.setenv("AUTOSEQ_TEST_CHANGED", "old")
    monkeypatch.setenv("AUTOSEQ_TEST_GONE", "old")
    assert run_ranks(variables, 1, names) == [([None, "old", "old"], ["unset", "old", "old"])]
    monkeypatch.setenv("AUTOSEQ_TEST_NEW", "new")
    monkeypatch.setenv("AUTOSEQ_TEST_CHANGED", "new")
    monkeypatch.delenv("AUTOSEQ_TEST_GONE")
    assert run_ranks(variables, 1, names) == [(["new", "new", None], ["new", "new", "unset"])]
    (tmp_path / "reads_at_import.py").write_text(textwrap.dedent(READS_AT_IMPORT))
    monkeypatch.syspath_prepend(tmp_path)
    import reads_at_import  # pyright: ignore[reportMissingImports]

    assert run_ranks(reads_at_import.seen, 1, reads_at_import.Argument()) == ["new"]


# Processes of their own ------------------------------------------------------------------------------------------------


def script(code: str, *path: Path) -> subprocess.Popen[str]:
    """A Python program that can import this file, and what is in `path`. It starts a server of its own."""
    paths = [*map(str, path), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)


def forked_from(rank: Rank) -> tuple[int, int]:
    """What this rank was forked from, and how many threads that has."""
    server = os.getppid()
    return server, len(os.listdir(f"/proc/{server}/task"))


def tell_and_hang(rank: Rank) -> None:
    rank.tell((os.getpid(), os.getppid()))
    time.sleep(600)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


WITH_SERVER = pytest.mark.skipif(sys.platform != "linux" or device_kind(2) == "cuda", reason="there ranks are not forked from a server")


@WITH_SERVER
@pytest.mark.skipif(os.environ.get("OMP_NUM_THREADS") != "1", reason="NumPy's library has threads of its own, and starts them again")
def test_a_server_serves_job_after_job_and_has_no_thread_that_a_fork_would_lose() -> None:
    (server, threads), same = run_ranks(forked_from, 2)
    assert same == (server, threads) == run_ranks(forked_from, 2)[0]
    assert server != os.getpid() and threads == 1


@WITH_SERVER
def test_a_killed_parent_leaves_no_rank_and_no_server() -> None:
    code = (
        "from autoseq import launch; from test_launch import tell_and_hang; launch.preloaded[:] = ['autoseq.launch']\n"
        "launch.run_ranks(tell_and_hang, 2, listen=lambda rank, told: print(*told, flush=True))"
    )
    parent = script(code)
    assert parent.stdout is not None
    with parent.stdout as printed:
        (first, server), (second, same) = ([int(pid) for pid in printed.readline().split()] for _ in range(2))
    assert server == same != parent.pid and all(map(is_running, (first, second, server)))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while left := list(filter(is_running, (first, second, server))):
        assert time.monotonic() < deadline, f"processes {left} outlive their parent"
        time.sleep(0.05)


@WITH_SERVER
def test_a_server_that_ends_is_an_error_and_no_hang(tmp_path: Path) -> None:
    (tmp_path / "ends_the_server.py").write_text("raise SystemExit(3)")
    code = (
        "from autoseq import launch; from test_launch import total; launch.preloaded[:] = ['ends_the_server']\n"
        "try: launch.run_ranks(total, 2, 10.0)\n"
        "except launch.LaunchError as error: print(error)"
    )
    said, _ = script(code, tmp_path).communicate(timeout=60)
    assert re.match(r"rank 0 could not be started: .*\((EOFError|ConnectionRefusedError|ConnectionResetError)\)", said)


@WITH_SERVER
def test_files_in_the_current_folder_are_not_taken_for_the_librarys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch imports `profile`, and whatever a user has of that name is not meant."""
    (tmp_path / "profile.py").write_text("raise SystemExit('taken for the library')")
    monkeypatch.chdir(tmp_path)
    code = (
        "import sys; sys.path.remove('')\n"
        "from autoseq import launch; from test_launch import total; launch.preloaded[:] = ['torch', 'profile', 'autoseq.launch']\n"
        "print(launch.run_ranks(total, 2, 10.0))"
    )
    said, _ = script(code).communicate(timeout=120)
    assert said == "[21.0, 21.0]\n"


@WITH_SERVER
def test_without_a_server_ranks_start_by_themselves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def too_long() -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(launch.forkserver, "ensure_running", too_long)
    assert launch.process_context("cpu").get_start_method() == "spawn"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith("no server to fork them from can be started (AF_UNIX path too long)")
