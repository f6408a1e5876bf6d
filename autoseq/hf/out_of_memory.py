"""`auto_find_batch_size`: where one rank runs out of memory, all ranks try again, with the same smaller batch and from that rank's state.

A trainer runs its loop again with nine tenths of the batch after such an error. The other ranks wait for it inside a message.

1. the failed rank says so in the store and drops its process groups, which closes their connections;
2. the others' messages fail at once, and a loop that fails looks into the store for the reason;
3. all ranks meet, make new groups, compile the models again, copy what the failed rank has, and raise the same error.

No rank leaves a step of the optimizer before all have made it, so nothing else that a trainer counts is ahead of the failed rank.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from autoseq.hf.replicas import Replicas
from autoseq.hf.same_start import share_generators
from autoseq.mesh import DIMS
from autoseq.optimizer_steps import is_nested
from autoseq.runtime.groups import group_from_mesh
from autoseq.runtime.rendezvous import ended_by, exchange
from autoseq.step_check import checks_of

MEETING_S = 600.0
"""Seconds that ranks wait for each other after an attempt; those that end it well wait for the slowest."""

_COUNTED = "current_flos", "_metrics", "_total_train_tokens"
"""What a trainer counts within a step, and keeps from one attempt to the next."""


def try_again_together(trainer: Any, replicas: Replicas, split_again: Callable[[], None]) -> None:
    """Wrap the training loop of one trainer. `split_again` gives the replicas a new mesh, and the models programs for it."""
    plain, attempts, world = trainer._inner_training_loop, itertools.count(), group_from_mesh(None)
    trainer_id = exchange(world, "hf: auto_find_batch_size", os.urandom(8).hex().encode(), timeout_s=MEETING_S)[0].decode()
    _step_together(trainer, replicas)

    @functools.wraps(plain)
    def inner_training_loop(*args: Any, **kwargs: Any) -> Any:
        attempt = f"{trainer_id}/{next(attempts)}"
        result, word = _attempted(lambda: plain(*args, **kwargs), f"autoseq/hf/out of memory/{attempt}")
        if word:
            _drop_groups(trainer, replicas)
        words = exchange(world, f"hf: attempt {attempt}", word.encode(), timeout_s=MEETING_S)
        failed = [rank for rank, theirs in enumerate(words) if theirs.startswith(_OUT)]
        if not failed:
            return result
        if not word:
            _drop_groups(trainer, replicas)
        split_again()
        _copy_state(trainer, replicas, failed[0])
        text = words[failed[0]].removeprefix(_OUT).decode()
        raise torch.OutOfMemoryError(f"rank {failed[0]} ran out of memory. All ranks try again with a smaller batch. The error was: {text}")

    trainer._inner_training_loop = inner_training_loop


_OUT, _WOKEN = b"out of memory: ", "woken"


def _attempted(run: Callable[[], Any], key: str) -> tuple[Any, str]:
    """The result, and how it ended: well (""), out of memory, or woken by a rank that ran out. Raises any other error.

    The error itself is not kept: its frames have references to process groups.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    store = _get_default_store()
    try:
        with ended_by(key):
            return run(), ""
    except Exception as error:
        if should_reduce_batch_size(error):
            store.set(key, "")
            return None, _OUT.decode() + str(error)
        if not store.check([key]):
            raise
        return None, _WOKEN


def _drop_groups(trainer: Any, replicas: Replicas) -> None:
    """The last reference to a group of gloo closes its connections: those of the mesh, of DDP and of compiled programs."""
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    torch._dynamo.reset()
    root = replicas.mesh._get_root_mesh()
    for dim in DIMS:
        group = replicas.mesh[dim].get_group()
        for check in checks_of(group):
            check.drop()
        dist.destroy_process_group(group)
    del group
    root._pg_registry.clear()
    gc.collect()


def _copy_state(trainer: Any, replicas: Replicas, rank: int) -> None:
    """All ranks have the weights and the optimizer's state of one, and those of its sequence its generators and counts too."""
    copy, place = (int(where) for where in (replicas.mesh.mesh == rank).nonzero()[0])
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    weights = {name: x.data for name, x in (*trainer.model.named_parameters(), *trainer.model.named_buffers())}
    state = None if optimizer is None else optimizer.state_dict()
    sent = _from_rank((weights, state), replicas, copy, place)
    if rank != dist.get_rank():
        for name, value in sent[0].items():
            weights[name].copy_(value)
        if optimizer is not None and sent[1] is not None:
            optimizer.load_state_dict(sent[1])
    counts = [{name: vars(trainer)[name] for name in _COUNTED if name in vars(trainer)}]
    dist.broadcast_object_list(counts, group=replicas.mesh["sequence"].get_group(), group_src=place)
    if replicas.copy == copy:
        vars(trainer).update(counts[0])
    share_generators(replicas.mesh["sequence"], first=place)


def _from_rank(value: Any, replicas: Replicas, copy: int, place: int) -> Any:
    """What the rank at a place of a copy has: along its sequence, then over the copies."""
    for dim, source in ("sequence", place), ("data", copy):
        sent = [value]
        dist.broadcast_object_list(sent, group=replicas.mesh[dim].get_group(), group_src=source)
        value = sent[0]
    return value


def _step_together(trainer: Any, replicas: Replicas) -> None:
    plain = trainer.create_optimizer

    @functools.wraps(plain)
    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        is_new = not isinstance(trainer.optimizer, _accelerated())
        optimizer = plain(*args, **kwargs)
        if is_new:
            optimizer.register_step_post_hook(lambda *_: None if is_nested() else replicas.meet())
        return optimizer

    trainer.create_optimizer = create_optimizer


def _accelerated() -> type:
    from accelerate.optimizer import AcceleratedOptimizer

    return AcceleratedOptimizer
