"""What an `accelerate.Accelerator` does by rank in a loop of the user's own, done by sequence: loading a state, and triggers."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

from autoseq.hf.replicas import Replicas
from autoseq.hf.same_start import share_generators_after


def adapt_accelerator(accelerator: Any, replicas: Replicas) -> None:
    """Change two methods of one accelerator, on the object itself."""
    accelerator.load_state = share_generators_after(accelerator.load_state, replicas)
    plain = accelerator.check_trigger

    @functools.wraps(plain)
    def check_trigger() -> bool:
        """A trigger that one rank of a sequence has set is set on all of them; `plain` looks at the copies."""
        if accelerator.flag_tensor is None:
            accelerator.flag_tensor = torch.tensor(0, device=accelerator.device)
        dist.all_reduce(accelerator.flag_tensor, op=dist.ReduceOp.MAX, group=replicas.mesh["sequence"].get_group())
        return plain()

    accelerator.check_trigger = check_trigger
