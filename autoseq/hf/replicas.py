"""accelerate's view of the world: one process for each copy of the data, whatever number of ranks share its sequence.

    mesh (data 2 × sequence 4)      accelerate: num_processes 2, process_index 0 on ranks 0…3 and 1 on ranks 4…7

Data loaders, `num_items_in_batch`, prepared schedulers, gathered metrics, samplers of generations and counts of tokens are all derived
from these two numbers. With them each rank does, number by number, what a process of plain data parallelism does, and what one device
does where there is one copy. accelerate's gathers and reductions go over the copies; whatever writes files or logs stays with one rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

_KEY = "autoseq_replicas"


@dataclass(slots=True, eq=False)
class Replicas:
    """The mesh of copies × ranks of a sequence, as this rank sees it; another one after a rank ran out of memory (`out_of_memory`)."""

    mesh: DeviceMesh

    @property
    def num_copies(self) -> int:
        return self.mesh["data"].size()

    @property
    def copy(self) -> int:
        return self.mesh["data"].get_local_rank()

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of its sequence: of the ranks that do the same, the one that writes."""
        return self.mesh["sequence"].get_local_rank() == 0

    def meet(self) -> None:
        """All ranks wait for each other: those of a sequence, and then their copies."""
        device_ids = [torch.cuda.current_device()] if self.mesh.device_type == "cuda" else None
        for dim in ("sequence", "data"):
            dist.barrier(group=self.mesh[dim].get_group(), device_ids=device_ids)

    def send_from_copy(self, function: Callable[..., None], sent: Any, src: int = 0) -> None:
        """A broadcast from the rank that stands for a copy of the data: to the other copies, and then along each sequence."""
        for dim, source in ("data", src), ("sequence", 0):
            function(sent, group=self.mesh[dim].get_group(), group_src=source)


def show_replicas(replicas: Replicas) -> None:
    """From now on accelerate counts the copies of the data, in this process and until its state is reset."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    _redirect()
    seen = {"num_processes": replicas.num_copies, "process_index": replicas.copy, _KEY: replicas}
    for state in (PartialState, AcceleratorState):
        is_alone = replicas.num_copies == 1 and state._shared_state.get("distributed_type") != DistributedType.FSDP
        state._shared_state.update(seen | ({"distributed_type": DistributedType.NO} if is_alone else {}))


def shown() -> Replicas | None:
    """What accelerate was shown in this process."""
    from accelerate.state import PartialState

    return PartialState._shared_state.get(_KEY)


@functools.cache
def _redirect() -> None:
    """Once a process: accelerate's state and operations look at the replicas where there are some, and do as before elsewhere."""
    from accelerate import accelerator, state
    from accelerate.utils import operations

    operations.torch = _Torch()  # type: ignore[assignment]
    accelerator.save_accelerator_state = _on_first_ranks(accelerator.save_accelerator_state)  # type: ignore[assignment]
    kind: Any = state.PartialState
    for name in ("is_main_process", "is_last_process"):
        setattr(kind, name, _of_first_rank(getattr(kind, name)))
    kind.wait_for_everyone = _meet_all(kind.wait_for_everyone)


def _of_first_rank(plain: property) -> property:
    """Ranks of one sequence share an index, and one of them is the main process."""

    def is_that_process(state: Any) -> bool:
        replicas = shown()
        return plain.fget(state) and (replicas is None or replicas.is_first)  # type: ignore[misc]

    return property(is_that_process, doc=plain.__doc__)


def _on_first_ranks(save: Callable[..., Any]) -> Callable[..., Any]:
    """Ranks of one sequence would write the same file of random states at the same time; no other file is written by them all."""

    @functools.wraps(save)
    def save_once(output_dir: str, *args: Any, **kwargs: Any) -> Any:
        replicas = shown()
        return save(output_dir, *args, **kwargs) if replicas is None or replicas.is_first else Path(output_dir)

    return save_once


def _meet_all(plain: Callable[[Any], None]) -> Callable[[Any], None]:
    """One copy is one process for accelerate, which then waits for nobody; the ranks of the sequence still have to."""

    @functools.wraps(plain)
    def wait_for_everyone(state: Any) -> None:
        replicas = shown()
        if replicas is None:
            plain(state)
        else:
            replicas.meet()

    return wait_for_everyone


@functools.cache
def count_copies_in_trainers() -> None:
    """Once a process: what transformers' trainers gather by torch.distributed itself, logged losses and FLOPs, is of the copies too."""
    from transformers import trainer_pt_utils

    trainer_pt_utils.dist = _COLLECTIVES  # type: ignore[attr-defined]


class _Torch:
    """`torch` for accelerate.utils.operations: its collectives are those of the copies."""

    def __getattr__(self, name: str) -> Any:
        return _COLLECTIVES if name == "distributed" else getattr(torch, name)


class _Collectives:
    """`torch.distributed`, over this rank's copies; a broadcast comes from the rank that stands for the copy it names."""

    _OVER_COPIES = "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "get_world_size", "get_rank"
    _FROM_A_COPY = "broadcast", "broadcast_object_list"

    def __getattr__(self, name: str) -> Any:
        function, replicas = getattr(dist, name), shown()
        if replicas is not None and name in self._OVER_COPIES:
            return functools.partial(function, group=replicas.mesh["data"].get_group())
        if replicas is not None and name in self._FROM_A_COPY:
            return functools.partial(replicas.send_from_copy, function)
        return function


_COLLECTIVES = _Collectives()
