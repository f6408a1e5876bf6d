"""The emulated slow network: built, limited, crossed with right numbers, removed. Skipped where a machine cannot have one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import slow_network
from autoseq.runtime.groups import group_from_mesh
from measuring import through_link
from rank_processes import RankFailed, Seat, run_ranks
from slow_network import NetworkError, SlowNetwork, remove_abandoned, why_not
from work import Work, relative_error, rows_of

WHY_NOT = why_not()
needs_network = pytest.mark.skipif(WHY_NOT is not None, reason=f"no slow network can be emulated here: {WHY_NOT}")
SCRIPT = Path(slow_network.__file__)
WORK = Work(64, heads=4, kv_heads=2, head_dim=8, dtype="float64")


def cross(seat: Seat) -> tuple[float, float, int, float]:
    """Seconds to exchange 4 MB with the other node and within this one, the bytes on the link meanwhile, and a strategy's error."""
    other_node, same_node = (seat.rank + 2) % 4, seat.rank ^ 1
    before = through_link()[0]
    across = exchange_s(other_node, 4_000_000 if seat.rank % 2 == 0 else 0)
    dist.barrier()
    sent = through_link()[0] - before
    # A busy machine may hold up one exchange within the node, hardly three of them.
    within = min(exchange_s(same_node, 4_000_000) for _ in range(3))
    return across, within, sent, error_of("ring", seat)


def exchange_s(peer: int, size: int) -> float:
    """Seconds until `size` bytes went each way."""
    leaving, arriving = torch.zeros(2, size // 4)
    dist.barrier()
    start = time.perf_counter()
    for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, arriving, peer), dist.P2POp(dist.isend, leaving, peer)]) if size else ():
        work.wait()
    return time.perf_counter() - start


def error_of(strategy: str, seat: Seat) -> float:
    from contenders import strategy_call

    q, k, v, grad = (rows_of(x, seat.rank, seat.world_size, "zigzag") for x in WORK.tensors())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = strategy_call(strategy, WORK, group_from_mesh(None).name, "zigzag")(*leaves)
    results = (out, *torch.autograd.grad(out, leaves, grad))
    expected = (rows_of(x, seat.rank, seat.world_size, "zigzag") for x in WORK.answer())
    return max(relative_error(x, y) for x, y in zip(results, expected, strict=True))


@needs_network
def test_links_are_slow_loopback_is_not_and_numbers_are_right() -> None:
    with SlowNetwork(2, "80mbit") as network:
        found = run_ranks(cross, 4, network=network, ranks_per_node=2, timeout_s=120)
    assert not standing(network.name)
    for rank, (across, within, sent, error) in enumerate(found):
        assert error < 1e-12, f"rank {rank}"
        assert across < 0.01 or rank % 2 == 0
        # 4 MB at 10 MB/s. TCP's headers take 4%, the full bucket gives 24 kB back; a busy machine may be later, never earlier.
        assert rank % 2 or 0.38 <= across <= 1.2, f"rank {rank}: {across:.2f} s"
        assert within < across / 2 or rank % 2, f"rank {rank}: {within:.2f} s within its node, {across:.2f} across"
        # The bytes of that exchange, and none of the one within the node.
        assert 4_000_000 <= sent <= 4_400_000, f"rank {rank}: {sent:,}"


@needs_network
def test_building_again_replaces_and_two_networks_stand_side_by_side() -> None:
    with SlowNetwork(1, "1mbit", "test.a") as one, SlowNetwork(2, "1mbit", "test.b") as two:
        one.up()
        assert len(standing("test.a")) == 2 and len(standing("test.b")) == 3
        assert "tbf" in inside(two, 1, "tc", "qdisc", "show", "dev", "eth0")
        one.down()
        one.down()
        assert not standing("test.a") and len(standing("test.b")) == 3
    assert not standing("test.b")


@needs_network
def test_what_a_killed_process_left_is_removed() -> None:
    code = "from slow_network import SlowNetwork; import os; SlowNetwork(1, '1mbit').up(); os.kill(os.getpid(), 9)"
    killed = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(SCRIPT.parent)})
    killed.wait()
    assert len(standing(f"p{killed.pid}.0")) == 2
    with SlowNetwork(1, "1mbit") as own:
        assert not standing(f"p{killed.pid}.0")
        assert remove_abandoned() == []
        assert len(standing(own.name)) == 2


@needs_network
def test_the_command_builds_and_removes() -> None:
    built = command("up", "--name", "test.cli", "--nodes", "1", "--rate", "5mbit")
    assert built.stdout.startswith("ip netns exec autoseq-test.cli-node0 ...   # 10.77.0.1, 5mbit each way")
    assert len(standing("test.cli")) == 2
    assert command("down", "--name", "test.cli").returncode == 0
    assert not standing("test.cli")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, "fast"), "a rate is written as in 200mbit or 1.5gbit, not 'fast'"),
        ((0, "1mbit"), "a network has 1 to 200 nodes, not 0"),
        ((1, "1mbit", "a-b"), "a network's name is made of small letters, digits and dots, not 'a-b'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: tuple[int, str], message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        SlowNetwork(*arguments)


def test_elsewhere_the_message_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_network.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(slow_network.shutil, "which", lambda tool: f"/sbin/{tool}")
    assert why_not() == "only root may make network namespaces: run this with sudo"
    monkeypatch.setattr(slow_network.shutil, "which", lambda tool: None)
    with pytest.raises(NetworkError, match=r"no slow network can be emulated here: iproute2 is not installed \(ip and tc not found\)"):
        SlowNetwork(1, "1mbit").up()


def fail(seat: Seat) -> None:
    raise ValueError(f"rank {seat.rank} has had enough")


def test_a_rank_that_fails_ends_the_job_with_its_own_words() -> None:
    with pytest.raises(RankFailed, match=r"rank 0 ended with exit code 1:\n[^$]*ValueError: rank 0 has had enough"):
        run_ranks(fail, 1, timeout_s=60)


def standing(name: str) -> list[str]:
    """The namespaces of a network."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in listed if line.startswith(f"autoseq-{name}-")]


def inside(network: SlowNetwork, node: int, *words: str) -> str:
    return subprocess.run([*network.inside(node), *words], capture_output=True, text=True, check=True).stdout


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
