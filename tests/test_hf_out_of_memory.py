"""`auto_find_batch_size`: one rank runs out of memory, all try again with the smaller batch, and the numbers are one device's."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hf_job
from ranks import run_ranks
from test_hf_trainer import arguments

TEXT = "CUDA out of memory. Tried to allocate 1.00 GiB."
PLACES = "in the backward", "in the optimizer"


class Failure:
    """Raises once, at one place of one step: on one device, or on the second rank of those that share the sequence."""

    def __init__(self, place: str, step: int) -> None:
        self.place, self._left = place, step if os.environ.get("RANK", "1") == "1" else -1

    def at(self, place: str) -> None:
        if place == self.place:
            self._left -= 1
            if self._left == 0:
                raise torch.OutOfMemoryError(TEXT)


class Momentum(torch.optim.Optimizer):
    """SGD with momentum, which may fail when it has stepped half of the parameters."""

    def __init__(self, model: nn.Module, failure: Failure) -> None:
        super().__init__(model.parameters(), {"lr": 0.1})
        self.failure = failure

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for index, p in enumerate(parameters):
            if index == len(parameters) // 2:
                self.failure.at("in the optimizer")
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            p.sub_(momentum.mul_(0.9).add_(p.grad), alpha=self.param_groups[0]["lr"])


def failing_in_backward(model: nn.Module, failure: Failure) -> nn.Module:
    """In its middle: the gradient of an MLP comes before that of the attention beside it."""
    model.get_parameter("model.layers.0.mlp.up_proj.weight").register_hook(lambda _: failure.at("in the backward"))
    return model


def trained(folder: Path, attach: Callable[..., None], failure: Failure) -> Any:
    from transformers import Trainer

    class Drawing(Trainer):
        """Its loss in training is scaled by a drawn number."""

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("return_outputs"):
                return super().compute_loss(*args, **kwargs)
            failure.at("before the forward")
            drawn = 1 + torch.rand(()) + random.random() + float(np.random.rand())
            return super().compute_loss(*args, **kwargs) * drawn

    model = failing_in_backward(hf_job.llama(), failure)
    args = arguments(folder, auto_find_batch_size=True, gradient_accumulation_steps=2, include_num_input_tokens_seen="all")
    trainer = Drawing(model=model, args=args, train_dataset=hf_job.rows(9), optimizers=(Momentum(model, failure), None))
    attach(trainer)
    torch.manual_seed(3)
    trainer.train()
    drawn = [torch.rand(()), Tensor([random.random()]), Tensor([np.random.rand()])]
    assert trainer._train_batch_size == 1
    return {"log": hf_job.logged(trainer), "weights": hf_job.weights(model), "drawn": drawn}


def everywhere(folder: Path, attach: Callable[..., None]) -> Any:
    found = {}
    for place in PLACES:
        hf_job.forget_accelerator()
        random.seed(5)
        np.random.seed(5)
        found[place] = trained(folder, attach, Failure(place, 2 if place == "in the optimizer" else 4))
    return found


def job(rank: int, world_size: int, folder: str) -> None:
    hf_job.compare(rank, world_size, everywhere, folder, hf_job.SGD_TOLERANCE)


def test_all_ranks_try_again_where_one_runs_out(tmp_path: Path) -> None:
    run_ranks(job, 2, str(tmp_path), timeout_s=240)


def in_float64(folder: Path, attach: Callable[..., None], accumulated: int) -> Any:
    """The second optimizer step fails in the backward of its first batch."""
    from transformers import Trainer

    args = arguments(
        folder, gradient_accumulation_steps=accumulated, train_sampling_strategy="sequential", auto_find_batch_size=True, max_steps=2
    )
    model = failing_in_backward(hf_job.llama().double(), Failure("in the backward", accumulated + 1))
    trainer = Trainer(model=model, args=args, train_dataset=hf_job.rows(8))
    attach(trainer)
    trainer.train()
    assert trainer._train_batch_size == 1
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"norms": norms, "weights": hf_job.weights(model)}


def two_by_two(rank: int, world_size: int, folder: str) -> None:
    hf_job.compare_accumulated(rank, world_size, in_float64, folder)


def test_copies_of_the_data_try_again_too(tmp_path: Path) -> None:
    run_ranks(two_by_two, 4, str(tmp_path), timeout_s=240)


def ended_meeting(rank: int, world_size: int) -> None:
    from torch.distributed.distributed_c10d import _get_default_store

    from autoseq.runtime.groups import group_from_mesh
    from autoseq.runtime.rendezvous import RendezvousError, ended_by, exchange

    if rank == 1:
        _get_default_store().set("over", "")
    else:
        with ended_by("over"), pytest.raises(RendezvousError, match="given up by rank 0, as another rank ended what it was for"):
            exchange(group_from_mesh(None), "test", b"", timeout_s=60)
    dist.barrier()


def test_a_rank_that_waits_in_a_meeting_is_woken() -> None:
    run_ranks(ended_meeting, 2, timeout_s=30)


def other_failure(rank: int, world_size: int, folder: str) -> None:
    """An error that is none of memory is raised as it is, and its rank comes to no meeting."""
    from transformers import Trainer

    import autoseq

    with hf_job.processes(rank, world_size):
        args = arguments(Path(folder), auto_find_batch_size=True)
        trainer = Trainer(model=hf_job.llama(), args=args, train_dataset=hf_job.rows(4))
        autoseq.hf.attach(trainer, sequence=2, inner="eager")
        trainer.training_step = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer.train()


def test_another_error_is_raised_at_once(tmp_path: Path) -> None:
    run_ranks(other_failure, 2, str(tmp_path), timeout_s=60)
