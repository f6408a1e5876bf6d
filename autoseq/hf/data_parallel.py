"""DDP reduces gradients over the copies of the data; autoseq has reduced them over the ranks of a sequence."""

from __future__ import annotations

import copy
from typing import Any

from autoseq.hf.replicas import Replicas


def reduce_over_copies(accelerator: Any, replicas: Replicas) -> None:
    """The DDP that `accelerator.prepare` makes has the copies' process group. The user's own handler stays as it is."""
    if replicas.num_copies == 1:
        return
    from accelerate.utils import DistributedDataParallelKwargs

    handler: Any = copy.copy(accelerator.ddp_handler) or DistributedDataParallelKwargs()
    kind: Any = type(handler)

    def to_kwargs(self: Any) -> dict[str, Any]:
        return kind.to_kwargs(self) | {"process_group": replicas.mesh["data"].get_group()}

    handler.__class__ = type(kind.__name__, (kind,), {"to_kwargs": to_kwargs})
    accelerator.ddp_handler = handler


def expect_all_gradients(trainer: Any) -> None:
    """Where the user has not asked DDP to look for parameters without gradient, a Trainer does.

    DDP then copies every output of the model, for which the logits would be gathered at each step. Without looking, DDP raises an error
    at the next step where a parameter had no gradient, and names this argument.
    """
    if trainer.args.ddp_find_unused_parameters is None:
        trainer.accelerator.ddp_handler.find_unused_parameters = False
