"""The mesh of a training run: copies of the data × ranks that share a sequence.

    mesh = autoseq.sequence_mesh(8)                        # of 32 ranks: 4 copies × 8 ranks
    mesh["sequence"]   the option `mesh` of the backend
    mesh["data"]       the mesh of DDP, FSDP2 and of the sampler
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autoseq.runtime.errors import MeshError
from autoseq.runtime.groups import group_from_mesh
from autoseq.runtime.rendezvous import exchange, timeout_s

TIMEOUT_VARIABLE = "AUTOSEQ_MESH_TIMEOUT_S"
TIMEOUT_S = 60.0
DIMS = "data", "sequence"

# The meshes that were made on torch's default group, which is compared as an object: a group that is made again starts anew.
_made: dict[tuple[int, str], tuple[weakref.ref[dist.ProcessGroup], DeviceMesh]] = {}


def sequence_mesh(ranks: int, *, device_type: str | None = None) -> DeviceMesh:
    """The mesh of all ranks, of shape (copies of the data, `ranks` that share a sequence), its dims named "data" and "sequence".

        mesh = autoseq.sequence_mesh(8)
        sampler = DistributedSampler(dataset, num_replicas=mesh["data"].size(), rank=mesh["data"].get_local_rank())
        model = DistributedDataParallel(autoseq.parallelize(model, mesh=mesh["sequence"]), process_group=mesh["data"].get_group())

    The ranks of one sequence are neighbours: 0…7, 8…15, and so on, so torchrun places them in one node where they fit. All ranks call it,
    after `init_process_group`; a second call with the same numbers returns the same mesh and makes no groups. `device_type` is found: that
    of the accelerator whose backend the default group has, "cpu" with gloo alone.

    Raises MeshError where torch.distributed is not initialized, the number of ranks cannot be divided by `ranks`, or ranks ask for
    different numbers; RendezvousError where a rank does not come within AUTOSEQ_MESH_TIMEOUT_S (60) seconds.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise MeshError(
            "sequence_mesh divides the ranks of torch.distributed, which is not initialized. Call torch.distributed.init_process_group() "
            "first, in a program that torchrun starts."
        )
    world = dist.group.WORLD
    assert world is not None
    if type(ranks) is not int or ranks < 1 or world.size() % ranks:
        fitting = ", ".join(str(n) for n in range(1, world.size() + 1) if world.size() % n == 0)
        raise MeshError(
            f"sequence_mesh({ranks!r}): {world.size()} ranks cannot be divided into sequences of {ranks!r} ranks each. It is one of "
            f"{fitting}, or start another number of ranks."
        )
    asked = ranks, device_type or _device_type(world)
    owner, mesh = _made.get(asked, (None, None))
    if mesh is None or owner is None or owner() is not world:
        _agree(asked)
        mesh = make_mesh(ranks, asked[1])
        _made[asked] = weakref.ref(world), mesh
    return mesh


def make_mesh(ranks: int, device_type: str, backends: dict[str, str] | None = None) -> DeviceMesh:
    """The mesh of `sequence_mesh`, with new groups: all ranks call it alike. `backends` are those of dims that have not torch's default."""
    copies = dist.get_world_size() // ranks
    return init_device_mesh(device_type, (copies, ranks), mesh_dim_names=DIMS, backend_override=backends)  # type: ignore[arg-type]


def _device_type(world: dist.ProcessGroup) -> str:
    """Where tensors live that this group's own backend sends; gloo serves accelerators too, but only beside the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if world.bound_device_id is not None:
        return world.bound_device_id.type
    backends = dist.BackendConfig(dist.Backend(dist.get_backend_config(world))).get_device_backend_map()
    if accelerator is not None and backends.get(accelerator.type, "gloo") != "gloo":
        return accelerator.type
    return "cpu"


def _agree(asked: tuple[int, str]) -> None:
    """Ranks that made other groups than each other would wait for ever."""
    group = group_from_mesh(None)
    mine = f"sequence_mesh({asked[0]}, device_type={asked[1]!r})"
    replies = exchange(group, "sequence_mesh", mine.encode(), timeout_s=timeout_s(TIMEOUT_VARIABLE, TIMEOUT_S))
    for rank, reply in enumerate(replies):
        if reply != replies[0]:
            raise MeshError(
                f"rank 0 calls {replies[0].decode()}, and rank {rank} {reply.decode()}. All ranks make one mesh together: call it with the "
                "same numbers on each."
            )
