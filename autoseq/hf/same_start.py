"""Ranks of one sequence start alike: the generators of random numbers and the weights are those of the first of them.

On one device there is one generator and one set of weights. Plain data parallelism copies the weights of its first process too.
"""

from __future__ import annotations

import functools
import pickle
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.utils import _sync_module_states

from autoseq.hf.replicas import Replicas
from autoseq.runtime.groups import group_from_mesh
from autoseq.runtime.rendezvous import exchange, timeout_s

_BUCKET_BYTES = 64 << 20
_TIMEOUT_VARIABLE, _TIMEOUT_S = "AUTOSEQ_COMPILE_TIMEOUT_S", 600.0


def share_generators(sequence: DeviceMesh, *, first: int = 0) -> None:
    """Python's, NumPy's and torch's generators continue from where those of the `first` rank of the sequence are."""
    import numpy as np

    states: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    sent = exchange(group_from_mesh(sequence), "hf: generators", pickle.dumps(states), timeout_s=timeout_s(_TIMEOUT_VARIABLE, _TIMEOUT_S))
    shared = pickle.loads(sent[first])
    random.setstate(shared["python"])
    np.random.set_state(shared["numpy"])
    torch.set_rng_state(shared["torch"])
    if "cuda" in shared:
        torch.cuda.set_rng_state(shared["cuda"])


def share_generators_after(load: Callable[..., Any], replicas: Replicas) -> Callable[..., Any]:
    """A checkpoint has the generators of a sequence's first process, whose list of GPUs' generators is right for its own GPU alone."""

    @functools.wraps(load)
    def load_and_share(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        share_generators(replicas.mesh["sequence"])
        return result

    return load_and_share


def share_weights(model: nn.Module, sequence: DeviceMesh) -> None:
    """Copy the first rank's parameters and buffers, where they are on the device that the sequence's messages leave from.

    Weights that are not there yet are compared by the first call of the model.
    """
    elsewhere = {name for name, x in (*model.named_parameters(), *model.named_buffers()) if x.device.type != sequence.device_type}
    first_rank_of_group = 0
    _sync_module_states(model, sequence.get_group(), _BUCKET_BYTES, first_rank_of_group, elsewhere)
