"""The ranks that share one sequence, by name.

Collectives and strategies take a group's *name*: a plain string survives FX graphs, AOTAutograd and compile caches, and a
model that uses another group simply carries another name. Nothing is cached here, so a group that was destroyed and made
again under the same name is found as it is now.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

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
    """The sequence group of a one-dimensional mesh; without a mesh, all ranks there are.

    Raises MeshError for a mesh of several dimensions and for a rank outside the mesh.
    """
    if mesh is None:
        return _world() if dist.is_available() and dist.is_initialized() else _alone()
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        example = f"mesh[{names[-1]!r}]" if names else "mesh[name], after naming its dimensions with mesh_dim_names"
        raise MeshError(
            f"The sequence needs a mesh of one dimension; this one has {mesh.ndim}, of shape {tuple(mesh.shape)}. "
            f"Pass the dimension that splits the sequence: {example}."
        )
    if mesh.get_coordinate() is None:
        raise MeshError(
            f"Rank {dist.get_rank()} is not part of the mesh {mesh.mesh.tolist()}. "
            "Call the model only on the mesh's ranks, or give each group of ranks a mesh of its own."
        )
    group = mesh.get_group()
    return SequenceGroup(name=group.group_name, size=group.size(), rank=group.rank())


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
