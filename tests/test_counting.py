"""The counting backend gives gloo's results and counts what each call sends."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from autoseq.runtime.counting import counters, reset_counters
from autoseq.runtime.groups import group_from_mesh
from autoseq.runtime.traffic import (
    SILENT,
    Traffic,
    all_gather_traffic,
    all_reduce_traffic,
    all_to_all_traffic,
    reduce_scatter_traffic,
    send_traffic,
)
from ranks import run_ranks

_ops = torch.ops._c10d_functional


@pytest.mark.parametrize(
    ("traffic", "expected"),
    [
        pytest.param(all_gather_traffic(100, 4), Traffic(1, 300), id="all_gather: own shard to the three others"),
        pytest.param(reduce_scatter_traffic(400, 4), Traffic(1, 300), id="reduce_scatter: all but the own quarter"),
        pytest.param(all_reduce_traffic(400, 4), Traffic(1, 600), id="all_reduce: both of these, one message"),
        pytest.param(all_to_all_traffic([10, 20, 30], 1), Traffic(1, 40), id="all_to_all: the own piece stays"),
        pytest.param(send_traffic(8), Traffic(1, 8), id="send: the message"),
        pytest.param(all_gather_traffic(100, 1), SILENT, id="one rank sends nothing"),
        pytest.param(all_reduce_traffic(100, 1), SILENT, id="one rank reduces nothing"),
        pytest.param(send_traffic(8) + send_traffic(2), Traffic(2, 10), id="traffic adds up"),
    ],
)
def test_conventions(traffic: Traffic, expected: Traffic) -> None:
    assert traffic == expected


def functional_all_reduce(rank: int, P: int, name: str) -> None:
    total = _ops.wait_tensor(_ops.all_reduce(torch.full((6,), float(rank)), "sum", name))
    assert torch.equal(total, torch.full((6,), float(sum(range(P)))))


def functional_all_gather(rank: int, P: int, name: str) -> None:
    gathered = _ops.wait_tensor(_ops.all_gather_into_tensor(torch.full((5,), float(rank)), P, name))
    assert torch.equal(gathered, torch.arange(P).repeat_interleave(5).float())


def functional_reduce_scatter(rank: int, P: int, name: str) -> None:
    piece = _ops.wait_tensor(_ops.reduce_scatter_tensor(torch.arange(3.0 * P), "sum", P, name))
    assert torch.equal(piece, P * torch.arange(3.0 * rank, 3.0 * rank + 3))


def functional_all_to_all(rank: int, P: int, name: str) -> None:
    send, recv = [rank + 1] * P, [a + 1 for a in range(P)]
    received = _ops.wait_tensor(_ops.all_to_all_single(torch.full((sum(send), 2), float(rank)), recv, send, name))
    assert torch.equal(received[:, 0], torch.cat([torch.full((n,), float(a)) for a, n in enumerate(recv)]))


def ring_hop(rank: int, P: int, name: str) -> None:
    mine, theirs = torch.full((7,), float(rank)), torch.empty(7)
    hop = [dist.P2POp(dist.isend, mine, (rank + 1) % P), dist.P2POp(dist.irecv, theirs, (rank - 1) % P)]
    for work in dist.batch_isend_irecv(hop):
        work.wait()
    assert torch.equal(theirs, torch.full((7,), float((rank - 1) % P)))


def plain_all_reduce(rank: int, P: int, name: str) -> None:
    x = torch.ones(4, dtype=torch.float64)
    dist.all_reduce(x)
    assert torch.equal(x, torch.full((4,), float(P), dtype=torch.float64))


def plain_all_to_all(rank: int, P: int, name: str) -> None:
    received = torch.empty(2 * P)
    dist.all_to_all_single(received, torch.full((2 * P,), float(rank)))
    assert torch.equal(received, torch.arange(P).repeat_interleave(2).float())


def plain_broadcast(rank: int, P: int, name: str) -> None:
    x = torch.full((3,), float(rank))
    dist.broadcast(x, src=0)
    assert torch.equal(x, torch.zeros(3))


def sub_group(rank: int, P: int, name: str) -> None:
    group = dist.new_group([0, 1])
    if rank < 2:
        x = torch.ones(8)
        dist.all_reduce(x, group=group)
        assert torch.equal(x, torch.full((8,), 2.0))


def check_op(rank: int, P: int, op: Callable[[int, int, str], None]) -> dict[str, tuple[int, int]]:
    reset_counters()
    assert counters() == {}
    op(rank, P, group_from_mesh(None).name)
    return counters()


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        pytest.param(functional_all_reduce, {"all_reduce": (1, 2 * 2 * 24 // 3)}, id="functional all_reduce"),
        pytest.param(functional_all_gather, {"all_gather": (1, 2 * 20)}, id="functional all_gather"),
        pytest.param(functional_reduce_scatter, {"reduce_scatter": (1, 2 * 12)}, id="functional reduce_scatter"),
        pytest.param(ring_hop, {"send": (1, 28)}, id="a ring hop: what is received is counted by its sender"),
        pytest.param(plain_all_reduce, {"all_reduce": (1, 2 * 2 * 32 // 3)}, id="torch.distributed.all_reduce"),
        pytest.param(plain_all_to_all, {"all_to_all": (1, 2 * 8)}, id="torch.distributed.all_to_all_single, equal pieces"),
    ],
)
def test_each_rank_counts_what_it_sends(op: Any, expected: dict[str, tuple[int, int]]) -> None:
    assert run_ranks(check_op, 3, op, backend="autoseq_counted") == [expected] * 3


def test_uneven_all_to_all_counts_by_rank() -> None:
    # Rank r sends r+1 rows of 8 bytes to each of the two others.
    counted = run_ranks(check_op, 3, functional_all_to_all, backend="autoseq_counted")
    assert counted == [{"all_to_all": (1, 2 * 8 * (rank + 1))} for rank in range(3)]


def test_broadcast_counts_at_its_source() -> None:
    counted = run_ranks(check_op, 2, plain_broadcast, backend="autoseq_counted")
    assert counted == [{"broadcast": (1, 12)}, {"broadcast": (1, 0)}]


def test_sub_groups_count_by_their_own_size() -> None:
    counted = run_ranks(check_op, 3, sub_group, backend="autoseq_counted")
    assert [counts.get("all_reduce") for counts in counted] == [(1, 32), (1, 32), None]
