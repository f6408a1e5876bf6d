"""`attach(trainer, verify=n)`: the first n training steps run on each rank by itself too, and their losses and gradients are compared.

A step is run unsplit, what it left behind is taken back, and it is run again split, from the same weights, batch and generators.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoseq import notices
from autoseq.hf.replicas import Replicas
from autoseq.runtime.errors import RankMismatchError, UnsupportedError, VerificationError
from autoseq.runtime.groups import group_from_mesh
from autoseq.runtime.rendezvous import exchange

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Relative L2 errors. Ranks add up in another order, which a gradient of many terms magnifies; what is wrong is wrong by far more."""
_SMALL = 1e-3
"""A gradient below this share of all gradients together is compared with that share: it may be nothing but rounding."""
_COUNTED_BY_STEPS = (
    "_metrics", "_logs", "_step", "_buffered_inputs", "_total_train_tokens", "_pending_extra_logs", "_pending_metrics",
)  # fmt: skip
"""What a step of TRL's trainers counts or keeps on the trainer."""
_TIMEOUT_S = 600.0


def compare_first_steps(trainer: Any, replicas: Replicas, steps: int) -> None:
    """Wrap the training step of one trainer. Raises UnsupportedError for a model that drops out, whose steps draw by rank."""
    rate = _dropout(trainer.model)
    if rate:
        raise UnsupportedError(
            f"verify={steps} compares numbers, and the model drops out at random ({rate}), by shard where the sequence is split. Compare "
            "with dropout 0, then train with it."
        )
    plain, start = trainer.training_step, []

    @functools.wraps(plain)
    def training_step(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        start.append(trainer.state.global_step)
        step = trainer.state.global_step - start[0]
        if step >= steps:
            trainer.training_step = plain
            return plain(model, inputs, *args, **kwargs)
        with _taken_back(trainer, model), torch.compiler.set_stance("force_eager"):
            loss = plain(model, dict(inputs), *args, **kwargs)
            alone = {"the loss": loss.detach().clone(), **_gradients(model)}
        loss = plain(model, inputs, *args, **kwargs)
        _compare(step + 1, {"the loss": loss.detach(), **_gradients(model)}, alone, _tolerance(trainer), replicas)
        return loss

    trainer.training_step = training_step


def _dropout(model: nn.Module) -> str:
    """The first rate above zero."""
    for path, module in model.named_modules():
        for name in ("p", "dropout", "attention_dropout", "dropout_p"):
            rate = getattr(module, name, 0)
            if isinstance(rate, float) and rate > 0:
                return f"{path}.{name} = {rate:g}"
    return ""


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def _taken_back(trainer: Any, model: nn.Module) -> Iterator[None]:
    """Gradients, buffers, generators of random numbers, and what the trainer counts, are afterwards what they were."""
    kept = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if name in _COUNTED_BY_STEPS}
    seen, before = trainer.state.num_input_tokens_seen, _gradients(model)
    buffers = [(module._buffers, name, x, x.clone()) for module in model.modules() for name, x in module._buffers.items() if x is not None]
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)
    with torch.no_grad():
        for owner, name, buffer, value in buffers:
            owner[name] = buffer.copy_(value)
    trainer.state.num_input_tokens_seen = seen
    vars(trainer).update(kept)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = before[name]


def _tolerance(trainer: Any) -> float:
    lowest = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    dtypes = {p.dtype for p in trainer.model.parameters() if p.dtype in _TOLERANCES} | ({lowest} if lowest else set())
    return max(_TOLERANCES[dtype] for dtype in dtypes)


def _compare(step: int, split: dict[str, Tensor | None], alone: dict[str, Tensor | None], tolerance: float, replicas: Replicas) -> None:
    """All ranks of the sequence raise where one finds a difference."""
    whole = _norm([x for name, x in alone.items() if name != "the loss"])
    errors = {name: _error(split[name], x, 0.0 if name == "the loss" else _SMALL * whole) for name, x in alone.items()}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    found = ", ".join(f"{name} by {error:.1e}" for name, error in sorted(wrong.items(), key=lambda each: -each[1])[:5])
    group = group_from_mesh(replicas.mesh["sequence"])
    for rank, told in enumerate(exchange(group, "hf: verify", found.encode(), timeout_s=_TIMEOUT_S)):
        if told:
            raise VerificationError(
                f"training step {step} differs from the same step on one device, on rank {rank} of the sequence, by more than "
                f"{tolerance:g}: {told.decode()}. `autoseq verify` with the model alone says whether the model or the trainer is the cause."
            )
    if dist.get_rank() == 0:
        notices.notice(f"training step {step} is one device's: no loss or gradient differs by more than {max(errors.values()):.1e}")


def _error(ours: Tensor | None, theirs: Tensor | None, least: float) -> float:
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else _norm([x for x in (ours, theirs) if x is not None])
    if ours.shape != theirs.shape:
        raise RankMismatchError(f"a gradient has shape {tuple(ours.shape)} where one device's has {tuple(theirs.shape)}")
    distance, size = _norm([ours.double() - theirs.double()]), max(_norm([theirs]), least)
    return distance / size if size > 0 else distance


def _norm(tensors: list[Tensor | None]) -> float:
    return sum(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in tensors if x is not None) ** 0.5
