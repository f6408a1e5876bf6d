"""FSDP2 through accelerate: parameters are sharded over all ranks, those of a sequence and the copies of the data.

accelerate shards without a mesh, which is over all ranks, and FSDP takes the mean of all ranks' gradients. autoseq has summed them over
each sequence, on whose ranks they are alike, so the mean is that over the copies. Checkpoints are of all ranks too: accelerate's functions
that write and read them see ranks and not copies.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from autoseq.hf.replicas import shown
from autoseq.runtime.errors import UnsupportedError

_CHECKPOINTS = "save_fsdp_model", "load_fsdp_model", "save_fsdp_optimizer", "load_fsdp_optimizer"


def is_sharded(accelerator: Any) -> bool:
    """Whether FSDP2 shards what this accelerator prepares."""
    return bool(getattr(accelerator, "is_fsdp2", False))


def refuse_comparison(accelerator: Any, steps: int) -> None:
    """Raises UnsupportedError: a rank by itself has no whole gradients to compare."""
    if steps and is_sharded(accelerator):
        raise UnsupportedError(
            f"verify={steps} compares whole gradients, and FSDP leaves a rank its share of them. Compare without FSDP, then train with it."
        )


@functools.cache
def save_over_all_ranks(module: str) -> None:
    """Once a process: checkpoints of sharded parameters that `module` writes and reads are of all ranks, where copies are shown."""
    owner = importlib.import_module(module)
    for name in _CHECKPOINTS:
        if hasattr(owner, name):
            setattr(owner, name, _over_all_ranks(getattr(owner, name)))


def _over_all_ranks(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def run(plugin: Any, accelerator: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(plugin, accelerator if shown() is None else _Ranks(accelerator), *args, **kwargs)

    return run


class _Ranks:
    """An accelerator that counts ranks."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.process_index, self.num_processes = dist.get_rank(), dist.get_world_size()
        self.is_main_process = self.process_index == 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)
