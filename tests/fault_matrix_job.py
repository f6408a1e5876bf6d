"""What ranks do in the matrix of faults: train, until VICTIM does something else at the first, the tenth or a resumed step."""

from __future__ import annotations

import datetime
import io
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from autoseq.agreement import COMPILE_TIMEOUT_VARIABLE
from autoseq.runtime.errors import AutoSeqError
from step_job import Trainer, batch

VICTIM = 1
TIMEOUT_S = 6.0
"""Of the groups, and of meetings: ranks that wait for one that is gone give up after it."""

STALLED_S = 60.0

When = Literal["first", "tenth", "resumed"]
BEFORE: dict[When, int] = {"first": 0, "tenth": 9, "resumed": 3}
"""Steps before the fault."""


@dataclass(frozen=True)
class Outcome:
    """What a rank saw of the fault: the error, the seconds until it came, and whether the weights are as before the step."""

    error: str
    seconds: float
    kept_weights: bool


def skip(rank: int, trainer: Trainer, number: int) -> None:
    trainer.step(number + (rank == VICTIM))


def repeat(rank: int, trainer: Trainer, number: int) -> None:
    trainer.inside(batch(number), batch(number))  # a step by itself, which VICTIM takes twice
    trainer.step(number + 1 - (rank == VICTIM))


def other_batch(rank: int, trainer: Trainer, number: int) -> None:
    trainer.inside(batch(number + 100 * rank), batch(number))
    trainer.optimizer.step()


def other_labels(rank: int, trainer: Trainer, number: int) -> None:
    trainer.inside(batch(number), batch(number + 100 * rank))
    trainer.optimizer.step()


def other_labels_outside(rank: int, trainer: Trainer, number: int) -> None:
    trainer.outside(batch(number), batch(number + 100 * rank))
    trainer.optimizer.step()


def other_weights(rank: int, trainer: Trainer, number: int) -> None:
    if rank == VICTIM:
        with torch.no_grad():
            trainer.model.head.weight.mul_(1.01)
    trainer.step(number)


MISMATCHES: dict[str, Callable[[int, Trainer, int], None]] = {
    "skipped step": skip, "repeated step": repeat, "other batch": other_batch, "other labels, loss inside": other_labels,
    "other labels, loss outside": other_labels_outside, "other weights": other_weights,
}  # fmt: skip


def new_trainer() -> Trainer:
    """On a group of its own, with a compiled program of its own."""
    torch._dynamo.reset()
    group = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT_S), backend="gloo")
    return Trainer(mesh=DeviceMesh.from_group(group, "cpu"))


def trained_until(when: When) -> Trainer:
    """Right steps until the fault; a resumed training has its weights and optimizer from a file."""
    trainer = new_trainer()
    if when == "resumed":
        for number in range(BEFORE[when]):
            torch.manual_seed(number)
            trainer.optimizer.zero_grad()
            torch.stack([p.square().sum() for p in trainer.model.parameters()]).sum().backward()
            trainer.optimizer.step()
        saved = io.BytesIO()
        torch.save((trainer.model.state_dict(), trainer.optimizer.state_dict()), saved)
        saved.seek(0)
        trainer = new_trainer()
        model, optimizer = torch.load(saved)
        trainer.model.load_state_dict(model)
        trainer.optimizer.load_state_dict(optimizer)
        return trainer
    for number in range(BEFORE[when]):
        trainer.step(number)
    return trainer


def outcome_of(trainer: Trainer, step: Callable[[], Any]) -> Outcome:
    before, start = trainer.model.tokens.weight.detach().clone(), time.monotonic()
    error = "no error"
    try:
        step()
    except (AutoSeqError, InterruptedError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    return Outcome(error, time.monotonic() - start, torch.equal(before, trainer.model.tokens.weight))


def mismatch_each(rank: int, P: int, when: When) -> dict[str, Outcome]:
    """Every mistake that ranks survive, on one program where the step may be a later one."""
    outcomes, trainer = {}, None
    for name, mistake in MISMATCHES.items():
        if trainer is None or when != "tenth":
            trainer = trained_until(when)
        else:
            for number in range(BEFORE[when]):
                trainer.step(number)
        kept = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        outcomes[name] = outcome_of(trainer, lambda: mistake(rank, trainer, BEFORE[when]))  # noqa: B023 (called here)
        dist.barrier()
        trainer.model.load_state_dict(kept)
    return outcomes


def leave_each(rank: int, P: int, when: When) -> dict[str, Outcome]:
    """VICTIM raises and takes its group down, and stalls until the others gave up."""
    outcomes = {}
    for name in ("exception", "stall"):
        trainer = trained_until(when)
        dist.barrier()

        def leave(name: str = name) -> None:
            if name == "stall":
                keys = [f"{when} {name} is over on {other}" for other in range(P) if other != VICTIM]
                dist.distributed_c10d._get_default_store().wait(keys, datetime.timedelta(seconds=STALLED_S))
            else:
                dist.destroy_process_group(trainer.mesh.get_group())  # noqa: B023 (called here)
            raise InterruptedError(name)

        with mock.patch.dict(os.environ, {COMPILE_TIMEOUT_VARIABLE: str(TIMEOUT_S)}):
            outcomes[name] = outcome_of(trainer, leave if rank == VICTIM else lambda: trainer.step(BEFORE[when]))  # noqa: B023 (called here)
        dist.distributed_c10d._get_default_store().set(f"{when} {name} is over on {rank}", "")
        dist.barrier()
    return outcomes


def die(rank: int, P: int, when: When, number: int) -> Outcome:
    """VICTIM is ended by a signal in the middle of the training."""
    trainer = trained_until(when)
    dist.barrier()
    if rank == VICTIM:
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        os.kill(os.getpid(), number)
    with mock.patch.dict(os.environ, {COMPILE_TIMEOUT_VARIABLE: str(TIMEOUT_S)}):
        return outcome_of(trainer, lambda: trainer.step(BEFORE[when]))
