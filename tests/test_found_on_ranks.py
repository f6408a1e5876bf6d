"""What running ranks take for their hardware when no topology is given: of a part of them where these lie, and rank 0's for all."""

import os
from unittest import mock

import torch.distributed as dist

from autoseq.options import Options
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
