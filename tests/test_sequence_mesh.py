"""`sequence_mesh`: copies of the data × ranks of a sequence, made once, and errors for numbers that do not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

import autoseq
from autoseq import mesh as mesh_module
from autoseq.runtime.errors import MeshError, OptionError, RendezvousError
from ranks import run_ranks


def num_groups() -> int:
    """Process groups in this process."""
    return len(dist.distributed_c10d._world.pg_map)


def make_mesh(rank: int, world_size: int) -> dict[str, Any]:
    mesh = autoseq.sequence_mesh(2)
    groups = num_groups()
    again = autoseq.sequence_mesh(2)
    sampler = DistributedSampler(range(10), num_replicas=mesh["data"].size(), rank=mesh["data"].get_local_rank(), shuffle=False)
    return {
        "ranks": mesh.mesh.tolist(), "names": mesh.mesh_dim_names, "device": mesh.device_type, "rows": list(sampler),
        "sequence": dist.get_process_group_ranks(mesh["sequence"].get_group()),
        "same": [mesh[dim].get_group() is again[dim].get_group() for dim in ("data", "sequence")] + [num_groups() == groups],
    }  # fmt: skip


def test_ranks_of_a_sequence_are_neighbours_and_a_second_call_makes_no_groups() -> None:
    for rank, found in enumerate(run_ranks(make_mesh, 4)):
        copy = rank // 2
        assert found == {
            "ranks": [[0, 1], [2, 3]], "names": ("data", "sequence"), "device": "cpu", "rows": list(range(copy, 10, 2)),
            "sequence": [2 * copy, 2 * copy + 1], "same": [True, True, True],
        }  # fmt: skip


def all_sizes(rank: int, world_size: int) -> list[tuple[int, ...]]:
    return [tuple(autoseq.sequence_mesh(ranks).shape) for ranks in (1, 4, 2)]


def test_one_rank_a_sequence_and_all_ranks_are_meshes_too() -> None:
    """The pool's processes made a mesh for an earlier job: its groups ended with it, and are not found again."""
    assert run_ranks(all_sizes, 4) == [[(4, 1), (1, 4), (2, 2)]] * 4


def ask_for_three(rank: int, world_size: int) -> list[str]:
    said = []
    for wrong in (3, 0, "2", True):
        with pytest.raises(MeshError) as raised:
            autoseq.sequence_mesh(wrong)  # type: ignore[arg-type]
        said.append(str(raised.value))
    return said


def test_a_number_that_does_not_divide_the_ranks_is_an_error_that_lists_those_that_do() -> None:
    for three, zero, text, true in run_ranks(ask_for_three, 4):
        assert three.startswith("sequence_mesh(3): 4 ranks cannot be divided into sequences of 3 ranks each. It is one of 1, 2, 4,")
        assert zero.startswith("sequence_mesh(0)") and text.startswith("sequence_mesh('2')") and true.startswith("sequence_mesh(True)")


def ask_for_different_numbers(rank: int, world_size: int) -> str:
    with pytest.raises(MeshError) as raised:
        autoseq.sequence_mesh(1 + rank)
    return str(raised.value)


def test_ranks_that_ask_for_different_numbers_all_get_an_error() -> None:
    for said in run_ranks(ask_for_different_numbers, 2):
        assert "rank 0 calls sequence_mesh(1, device_type='cpu'), and rank 1 sequence_mesh(2, device_type='cpu')" in said


def leave_one_out(rank: int, world_size: int) -> str:
    if rank == 1:
        return ""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RendezvousError) as raised:
        patch.setenv("AUTOSEQ_MESH_TIMEOUT_S", "0.3")
        autoseq.sequence_mesh(2)
    return str(raised.value)


def test_a_rank_that_does_not_come_is_named() -> None:
    assert "Ranks [1] did not come within 0.3 s" in run_ranks(leave_one_out, 2)[0]


def test_without_torch_distributed_the_error_names_the_call_that_is_missing() -> None:
    with pytest.raises(MeshError, match=r"Call torch\.distributed\.init_process_group\(\) first"):
        autoseq.sequence_mesh(1)


def test_a_timeout_that_is_no_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOSEQ_MESH_TIMEOUT_S", "soon")
    with pytest.raises(OptionError, match="AUTOSEQ_MESH_TIMEOUT_S must be a number of seconds"):
        mesh_module.timeout_s(mesh_module.TIMEOUT_VARIABLE, mesh_module.TIMEOUT_S)


CONFIGS = [
    pytest.param("cpu:gloo,cuda:nccl", None, "cuda", id="init_process_group() on a machine with GPUs"),
    pytest.param("cuda:nccl", None, "cuda", id="nccl alone"),
    pytest.param("cpu:gloo,cuda:gloo", None, "cpu", id="gloo alone"),
    pytest.param("cpu:gloo,cuda:gloo", torch.device("cuda", 1), "cuda", id="gloo, bound to a GPU by device_id"),
]


@pytest.mark.parametrize(("config", "bound", "expected"), CONFIGS)
def test_the_device_type_is_that_of_the_accelerator_whose_backend_the_group_has(
    config: str, bound: torch.device | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    assert mesh_module._device_type(SimpleNamespace(bound_device_id=bound)) == expected  # type: ignore[arg-type]
