"""What a trainer's logs say of the sequence: `autoseq/bytes_sent` and `autoseq/gathers`, beside every logged training loss.

The sequence's process group counts what rank 0 sends, where the trainer reports to anything (`report_to`).
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autoseq.mesh import DIMS

_COUNTED = "autoseq.runtime.counting"


def counted_mesh(sequence: int, device_type: str) -> DeviceMesh:
    """As `autoseq.sequence_mesh`, of which the sequence's groups count their messages."""
    backend = importlib.import_module(_COUNTED).BACKEND
    shape = dist.get_world_size() // sequence, sequence
    return init_device_mesh(device_type, shape, mesh_dim_names=DIMS, backend_override={DIMS[1]: backend})


def report_traffic(trainer: Any) -> None:
    """Add the bytes that this rank sent since the last logged loss, and the number of all-gathers among its messages.

    An all-gather makes a split value whole: an output that is read, a step that runs on gathered values, or keys under `gather_kv`.
    """
    counting, plain = importlib.import_module(_COUNTED), trainer.log
    counting.reset_counters()

    @functools.wraps(plain)
    def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            sent = counting.counters()
            counting.reset_counters()
            gathers, _ = sent.get("all_gather", (0, 0))
            logs = {**logs, "autoseq/bytes_sent": sum(size for _, size in sent.values()), "autoseq/gathers": gathers}
        plain(logs, *args, **kwargs)

    trainer.log = log
