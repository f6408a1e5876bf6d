"""DDP reduces gradients over the copies of the data; autoseq has reduced them over the ranks of a sequence."""

from __future__ import annotations

from typing import Any

import torch._dynamo.config

from autoseq.hf.replicas import Replicas


def reduce_over_copies(accelerator: Any, replicas: Replicas) -> None:
    """The DDP that `accelerator.prepare` makes has the copies' process group.

    DDP may have several buckets, at which Dynamo would split the program, so its DDPOptimizer is switched off.
    """
    if replicas.num_copies == 1:
        return
    from accelerate.utils import DistributedDataParallelKwargs

    torch._dynamo.config.optimize_ddp = False
    handler = accelerator.ddp_handler or DistributedDataParallelKwargs()
    plain = handler.to_kwargs
    handler.to_kwargs = lambda: plain() | {"process_group": replicas.mesh["data"].get_group()}
    accelerator.ddp_handler = handler
