"""Loops with accelerate whose model's sequence is split over two ranks: numbers, learning rates and states are one device's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hf_job
from ranks import run_ranks

Attach = Callable[..., None]


def loop(
    accelerator: Any, attach: Attach, model: nn.Module, steps: int, restored: Path | None = None, prepare_schedule: bool = True
) -> Any:  # fmt: skip
    """Steps of two batches each, clipped, then an evaluation with a short last batch."""
    attach(accelerator, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = torch.utils.data.DataLoader(hf_job.rows(40), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3))
    evaluation = torch.utils.data.DataLoader(hf_job.rows(5, seed=2), batch_size=2)
    model, optimizer, loader, evaluation = accelerator.prepare(model, optimizer, loader, evaluation)
    if prepare_schedule:
        schedule = accelerator.prepare(schedule)
    if restored is not None:
        accelerator.load_state(str(restored))
    seen: dict[str, Any] = {"loss": [], "norm": [], "rate": []}
    batches = iter(loader)
    for _ in range(2 * steps):
        with accelerator.accumulate(model):
            loss = model(**next(batches)).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                seen["norm"].append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seen["loss"].append(float(accelerator.gather(loss.detach()).mean()))
        seen["rate"].append(schedule.get_last_lr()[0])
    batches.close()
    model.eval()
    with torch.no_grad():
        logits = [accelerator.gather_for_metrics(model(input_ids=batch["input_ids"]).logits).clone() for batch in evaluation]
    return seen | {"logits": torch.cat(logits), "reduced": float(accelerator.reduce(torch.ones(()), "sum"))}


def two_loops(folder: Path, attach: Attach) -> Any:
    """One that saves its state, and one that goes on from there."""
    from accelerate import Accelerator

    from autoseq.hf.replicas import shown

    found: dict[str, Any] = {}
    for name in ("first", "second"):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = hf_job.llama()
        found[name] = loop(accelerator, attach, model, 3, restored=folder if name == "second" else None)
        if name == "first":
            replicas = shown()
            if replicas is None or not replicas.is_first:
                accelerator.set_trigger()  # on one rank of a sequence
            assert accelerator.check_trigger() and not accelerator.check_trigger()
            accelerator.save_state(str(folder))
            accelerator.wait_for_everyone()
        found[f"{name} weights"] = hf_job.weights(model)
        hf_job.forget_accelerator()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    found["schedule by hand"] = loop(accelerator, attach, hf_job.llama(), 2, prepare_schedule=False)
    return found


def mixed_precision(folder: Path, attach: Attach) -> Any:
    from accelerate import Accelerator

    return loop(Accelerator(cpu=True, mixed_precision="bf16"), attach, hf_job.llama(), 2)


def job(rank: int, world_size: int, folder: str) -> None:
    hf_job.compare(rank, world_size, two_loops, folder, hf_job.SGD_TOLERANCE)
    hf_job.compare(rank, world_size, mixed_precision, folder, hf_job.BFLOAT16_TOLERANCE, inner="aot_eager")


def test_loops_are_those_of_one_device(tmp_path: Path) -> None:
    run_ranks(job, 2, str(tmp_path), timeout_s=240)
