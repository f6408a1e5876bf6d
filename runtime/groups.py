"""The ranks that share one sequence, by name.

Collectives and strategies take a group's *name*: a plain string survives FX graphs, AOTAutograd and compile caches, and a
model that uses another group simply carries another name. Nothing is cached here, so a group that was destroyed and made
again under the same name is found as it is now.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

from autoseq.runtime.errors import MeshError


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """A group's c10d name ("" when there is none), its size and this process's rank in it.

    On a 2-D mesh `axes` are the names of this rank's groups across nodes and inside its node, and the group is of all its ranks,
    row by row. The names along an axis may differ between ranks, so nothing that ranks compare holds them.
    """

    name: str
    size: int
    rank: int
    axes: tuple[str, ...] = ()

    @property
    def mesh(self) -> tuple[int, ...]:
        """The sizes of the mesh's dims, if it has two: nodes, ranks in a node."""
        return tuple(group_of(name).size for name in self.axes)


ALONE = SequenceGroup(name="", size=1, rank=0)


def process_group(name: str) -> dist.ProcessGroup:
    """The c10d process group called `name`. Raises MeshError when there is none."""
    try:
        return _resolve_process_group(name)  # pyright: ignore[reportArgumentType] (a NewType of str)
    except (RuntimeError, LookupError, ValueError) as error:
        raise MeshError(
            f"No process group is called {name!r} in this process. It was destroyed, or the program was compiled in another "
            "process: compile the model again after torch.distributed is initialized."
        ) from error


def group_of(name: str) -> SequenceGroup:
    """The sequence group called `name`; the empty name means one rank without a process group."""
    if not name:
        return ALONE
    group = process_group(name)
    return SequenceGroup(name=name, size=group.size(), rank=group.rank())


def group_from_mesh(mesh: DeviceMesh | None) -> SequenceGroup:
    """The sequence group of a mesh of one or two dims; without a mesh, all ranks there are.

    Raises MeshError for a mesh of more dims, for a rank outside the mesh, and for one whose ranks c10d would put in another order.
    """
    if mesh is None:
        return _world() if dist.is_available() and dist.is_initialized() else _alone()
    if mesh.ndim > 2:
        raise MeshError(
            f"The sequence needs a mesh of one dimension, or of two: nodes, and ranks inside a node. This one has {mesh.ndim}, of shape "
            f"{tuple(mesh.shape)}. Pass the dimensions that split the sequence: {_example_of_dims(mesh, 1)} or {_example_of_dims(mesh, 2)}."
        )
    if mesh.get_coordinate() is None:
        raise MeshError(
            f"Rank {dist.get_rank()} is not part of the mesh {mesh.mesh.tolist()}. "
            "Call the model only on the mesh's ranks, or give each group of ranks a mesh of its own."
        )
    if mesh.ndim == 1:
        return group_of(mesh.get_group().group_name)
    if 1 in mesh.shape:  # one node, or nodes of one rank: the other dim has all ranks
        return group_of(mesh.get_group(0 if mesh.shape[1] == 1 else 1).group_name)
    return replace(_flat_group(mesh), axes=tuple(mesh.get_group(dim).group_name for dim in range(2)))


def speaks_for_all(group: SequenceGroup, mesh: DeviceMesh | None) -> bool:
    """Whether this rank says what holds for every rank: the first of all that the mesh's dims were taken from, or of the group."""
    if mesh is None or not group.name:
        return group.rank == 0
    return int(mesh._get_root_mesh().mesh.flatten()[0]) == dist.get_rank()


def _example_of_dims(mesh: DeviceMesh, count: int) -> str:
    if not mesh.mesh_dim_names:
        return f"{count} of its names, after naming them with mesh_dim_names" if count > 1 else "mesh[name]"
    return f"mesh[{', '.join(map(repr, mesh.mesh_dim_names[-count:]))}]"


def _flat_group(mesh: DeviceMesh) -> SequenceGroup:
    """The group of all ranks of a 2-D mesh, which the mesh owns: made once, by all ranks of the program, and found again."""
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise MeshError(
            f"The ranks of a mesh of two dimensions must ascend row by row, because torch.distributed orders a group by rank; this one is "
            f"{mesh.mesh.tolist()}. Build it from torch.arange, with the ranks of a node beside each other."
        )
    if len(ranks) == dist.get_world_size():
        return _world()
    if not mesh.mesh_dim_names or mesh._get_root_mesh().size() < dist.get_world_size():
        # Its group would be made by some of the ranks only, under a name that others may give to theirs.
        raise MeshError(
            f"The mesh {mesh.mesh.tolist()} has some of the {dist.get_world_size()} ranks. Take it from one mesh of all of them, such as "
            "init_device_mesh(device, (replicas, nodes, ranks), mesh_dim_names=('replicas', 'nodes', 'ranks'))['nodes', 'ranks']."
        )
    return group_of(mesh._flatten().get_group().group_name)


def _alone() -> SequenceGroup:
    """One rank, unless a launcher says that there are more: then the program would run unsplit on each without a word."""
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched not in ("", "1"):
        raise MeshError(
            f"This process was launched as one of {launched} ranks (WORLD_SIZE), but torch.distributed is not initialized, so the sequence "
            "could not be split. Call torch.distributed.init_process_group() before the model is called; "
            "to run each rank by itself, unset WORLD_SIZE."
        )
    return ALONE


def _world() -> SequenceGroup:
    world = dist.group.WORLD
    assert world is not None
    return SequenceGroup(name=world.group_name, size=world.size(), rank=world.rank())
