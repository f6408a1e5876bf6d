"""Ranks meet through the store: all come, or whoever came gets an error that names who did not."""

import time

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store

from autoseq.runtime.errors import MeshError, RendezvousError
from autoseq.runtime.groups import ALONE, SequenceGroup, group_from_mesh, group_of
from autoseq.runtime.rendezvous import exchange
from ranks import RankError, run_ranks

SOON_S = 0.5


def meet(rank: int, P: int, rounds: int) -> list[list[bytes]]:
    group = group_from_mesh(None)
    return [exchange(group, "plan", f"{number}:{rank}".encode(), timeout_s=30) for number in range(rounds)]


@pytest.mark.parametrize("P", [1, 2, 4])
def test_every_rank_gets_all_payloads_in_rank_order(P: int) -> None:
    expected = [[f"{number}:{rank}".encode() for rank in range(P)] for number in range(3)]
    assert run_ranks(meet, P, 3) == [expected] * P


def meet_on_two_topics(rank: int, P: int) -> list[bytes]:
    group = group_from_mesh(None)
    # A topic's rounds are its own: rank 0 is one round ahead on the first when rank 1 comes to the second.
    plan = exchange(group, "plan", b"p%d" % rank, timeout_s=30)
    return plan + exchange(group, "graph", b"g%d" % rank, timeout_s=30)


def test_topics_do_not_mix() -> None:
    assert run_ranks(meet_on_two_topics, 2) == [[b"p0", b"p1", b"g0", b"g1"]] * 2


def meet_in_both_directions(rank: int, P: int) -> list[list[bytes]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    groups = [group_from_mesh(mesh["sequence"]), group_from_mesh(mesh["data"]), group_from_mesh(None)]
    return [exchange(group, "plan", b"%d" % rank, timeout_s=30) for group in groups]


def test_groups_of_one_world_do_not_mix() -> None:
    world = [b"0", b"1", b"2", b"3"]
    assert run_ranks(meet_in_both_directions, 4) == [
        [[b"0", b"1"], [b"0", b"2"], world],
        [[b"0", b"1"], [b"1", b"3"], world],
        [[b"2", b"3"], [b"0", b"2"], world],
        [[b"2", b"3"], [b"1", b"3"], world],
    ]


def leave_nothing_behind(rank: int, P: int) -> int:
    group, store = group_from_mesh(None), _get_default_store()
    exchange(group, "plan", b"first", timeout_s=30)
    dist.barrier()
    before = store.num_keys()
    dist.barrier()
    for _ in range(5):
        exchange(group, "plan", b"again", timeout_s=30)
    dist.barrier()
    return store.num_keys() - before


def test_a_finished_round_deletes_its_keys() -> None:
    assert run_ranks(leave_nothing_behind, 2) == [0, 0]


def one_stays_away(rank: int, P: int) -> tuple[str, float]:
    if rank == 1:
        return "", 0.0
    start = time.monotonic()
    with pytest.raises(RendezvousError) as caught:
        exchange(group_from_mesh(None), "gather of 'logits'", b"", timeout_s=SOON_S)
    return str(caught.value), time.monotonic() - start


def test_a_rank_that_never_comes_is_named_in_time() -> None:
    for rank, (message, seconds) in enumerate(run_ranks(one_stays_away, 3)):
        if rank == 1:
            continue
        assert "Ranks [1] did not come within 0.5 s" in message
        assert "for \"gather of 'logits'\"" in message
        assert "the group '0' of 3 ranks" in message
        assert "under `if rank == 0:`" in message
        assert seconds < 10


def one_comes_late(rank: int, P: int) -> tuple[str, list[bytes]]:
    group, store = group_from_mesh(None), _get_default_store()
    if rank == 1:
        store.get("rank 0 gave up")
    with pytest.raises(RendezvousError) as caught:
        exchange(group, "plan", b"stale", timeout_s=SOON_S if rank == 0 else 30)
    if rank == 0:
        store.set("rank 0 gave up", "")
    return str(caught.value), exchange(group, "plan", b"%d" % rank, timeout_s=30)


def test_a_late_rank_gets_an_error_too_and_the_next_round_works() -> None:
    (early, early_next), (late, late_next) = run_ranks(one_comes_late, 2)
    assert "Ranks [1] did not come within 0.5 s" in early
    assert "Rank 1 came too late" in late
    assert "given up by rank 0 after 0.5 s" in late
    assert early_next == late_next == [b"0", b"1"]


def come_after_the_end(rank: int, P: int) -> None:
    group = group_from_mesh(None)
    dist.destroy_process_group()
    exchange(group, "plan", b"", timeout_s=SOON_S)


def test_a_group_that_ended_is_an_error() -> None:
    with pytest.raises(RankError, match=r"RendezvousError: torch\.distributed was shut down"):
        run_ranks(come_after_the_end, 2)


def test_one_rank_meets_itself_without_a_process_group() -> None:
    assert exchange(ALONE, "plan", b"mine", timeout_s=SOON_S) == [b"mine"]


def find_groups(rank: int, P: int) -> None:
    world = group_from_mesh(None)
    assert (world.size, world.rank) == (P, rank)
    assert group_of(world.name) == world
    assert group_of("") == ALONE == SequenceGroup("", 1, 0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    assert group_from_mesh(mesh["sequence"]).rank == rank % 2
    both = group_from_mesh(mesh)
    assert (both.size, both.rank, both.mesh) == (P, rank, (2, 2))
    with pytest.raises(MeshError, match="No process group is called 'nowhere'"):
        group_of("nowhere")


def test_groups_are_found_by_name_and_mesh() -> None:
    run_ranks(find_groups, 4)


def test_without_torch_distributed_the_group_is_alone() -> None:
    assert group_from_mesh(None) == ALONE
