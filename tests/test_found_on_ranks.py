"""What running ranks take for their hardware: where the ranks of a group lie, what rank 0 finds, and what happens if they disagree."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import autoseq
import models
from autoseq import program
from autoseq.agreement import agree_on_topology
from autoseq.options import Options
from autoseq.planning.found import found_topology
from autoseq.planning.presets import load_topology
from autoseq.planning.topology import Topology
from autoseq.planning.topology_file import dump
from autoseq.program import topology_of
from autoseq.runtime.groups import group_from_mesh
from ranks import run_ranks


def found_by_groups(rank: int, P: int) -> list[tuple[int, int]]:
    """Nodes, and ranks in a node, of a group across nodes of two, of one inside, and of all."""
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="2"):
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("nodes", "ranks"))
        groups = [group_from_mesh(each) for each in (mesh["nodes"], mesh["ranks"], None)]
        found = [topology_of(Options(), group) for group in groups]
    return [(topology.nodes, topology.ranks_per_node) for topology in found]


def test_a_group_lies_where_its_ranks_lie() -> None:
    assert run_ranks(found_by_groups, 4) == [[(2, 1), (1, 2), (2, 2)]] * 4


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def attend_split(length: int = 8, **options: Any) -> None:
    torch._dynamo.reset()
    torch.compile(attend, backend="autoseq", options={"inner": "eager", **options})(torch.ones(1, 2, length, 4))


def on_unlike_machines(rank: int, P: int) -> tuple[Topology | None, int]:
    """What a rank plans for whose launcher says something else than the others', and how often it looked for it in two programs."""
    with (
        mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(1 + rank)),
        mock.patch.object(program, "found_topology", side_effect=found_topology) as found,
    ):
        for length in (8, 12):
            attend_split(length)
        group = group_from_mesh(None)
        return agree_on_topology(group, lambda: topology_of(Options(), group)), found.call_count


def test_all_ranks_plan_for_what_rank_0_finds_once() -> None:
    (first, looked), (second, not_looked) = run_ranks(on_unlike_machines, 2)
    assert first is not None
    assert (first.ranks_per_node, first) == (1, second)
    assert (looked, not_looked) == (1, 0)


def refuse(rank: int, P: int, kind: str, folder: Path) -> str:
    """Do one thing wrong on the ranks; the message that this rank gets."""
    try:
        MISTAKES[kind][0](rank, folder)
    except autoseq.AutoSeqError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def no_file_on_rank_1(rank: int, folder: Path) -> None:
    if rank == 0:
        (folder / "0.json").write_text(dump(load_topology("8xH100")))
    attend_split(topology=folder / f"{rank}.json")


def no_file_for_parallelize_on_rank_1(rank: int, folder: Path) -> None:
    """Which reads it at once, where the other rank reads it and goes on to its first call."""
    if rank == 0:
        (folder / "0.json").write_text(dump(load_topology("8xH100")))
    torch._dynamo.reset()
    model = autoseq.parallelize(models.make("plain", layers=1), inner="aot_eager", topology=folder / f"{rank}.json")
    model(**models.batch("plain", batch_size=1, length=8))


def no_option_on_rank_1(rank: int, folder: Path) -> None:
    attend_split(**({"topology": "8xH100"} if rank == 0 else {}))


def nothing_found_on_rank_0(rank: int, folder: Path) -> None:
    with mock.patch.object(program, "found_topology", side_effect=RuntimeError("no driver") if rank == 0 else found_topology):
        attend_split()


MISTAKES: dict[str, tuple[Callable[[int, Path], None], list[str]]] = {
    "a file is missing on one rank": (
        no_file_on_rank_1,
        ["RankMismatchError: rank 1 of group .* could not compile the program: TopologyError: .*1.json", "TopologyError: .*1.json"],
    ),
    "a file is missing for parallelize on one rank": (
        no_file_for_parallelize_on_rank_1,
        ["RankMismatchError: rank 1 of group .* could not compile the program: TopologyError: .*1.json", "TopologyError: .*1.json"],
    ),
    "one rank names a topology": (
        no_option_on_rank_1,
        ["RankMismatchError: rank 0 .* compiles a program, and rank 1 compiles its first program without the option 'topology'"] * 2,
    ),
    "rank 0 finds nothing": (
        nothing_found_on_rank_0,
        ["AutoSeqError: internal error .*RuntimeError: no driver", "RankMismatchError: rank 0 .*RuntimeError: no driver"],
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_an_error_on_every_rank_and_never_a_hang(kind: str, tmp_path: Path) -> None:
    for message, said in zip(MISTAKES[kind][1], run_ranks(refuse, 2, kind, tmp_path, timeout_s=60), strict=True):
        assert re.search(message, said, re.DOTALL), said


def test_without_others_to_tell_a_mistake_is_an_error_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(autoseq.TopologyError, match="nothing is known of H10"):
        attend_split(topology="8xH10")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(autoseq.TopologyError, match="nothing is known of H10"):
        attend_split(topology="8xH10")
