"""Two copies of the data, each on two ranks of a sequence: the numbers are those of two processes of DDP, or of one that accumulates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hf_job
from ranks import run_ranks
from test_hf_accelerate import loop
from test_hf_trainer import Stream, arguments


def trainer_and_loop(folder: Path, attach: Callable[..., None]) -> Any:
    """Everything that is counted: batches, targets, metrics, schedules, files."""
    from accelerate import Accelerator
    from transformers import Trainer

    def metrics(seen: Any) -> dict[str, float]:
        return {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean()), "rows": float(len(seen.label_ids))}

    args = arguments(
        folder, gradient_accumulation_steps=2, max_grad_norm=0.5, lr_scheduler_type="linear", eval_strategy="steps", eval_steps=2,
        include_num_input_tokens_seen="all", max_steps=3, save_strategy="steps", save_steps=2, remove_unused_columns=False,
    )  # fmt: skip
    data, evaluation = hf_job.rows(14), hf_job.rows(5, seed=2)
    found: dict[str, Any] = {}
    for resumed in (False, True):
        trainer = Trainer(model=hf_job.llama(), args=args, train_dataset=data, eval_dataset=evaluation, compute_metrics=metrics)
        attach(trainer)
        trainer.train(resume_from_checkpoint=resumed)
        found |= {f"log {resumed}": hf_job.logged(trainer), f"weights {resumed}": hf_job.weights(trainer.model)}
    predicted = trainer.predict(hf_job.rows(5, seed=3))
    found |= {"predictions": predicted.predictions, "labels": predicted.label_ids}
    found["files"] = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    hf_job.forget_accelerator()
    trainer = Trainer(model=hf_job.llama(), args=arguments(folder), train_dataset=Stream(), eval_dataset=Stream())
    attach(trainer)
    trainer.train()
    found |= {"stream": hf_job.logged(trainer), "stream evaluated": trainer.evaluate()["eval_loss"]}
    hf_job.forget_accelerator()
    found["loop"] = loop(Accelerator(cpu=True, gradient_accumulation_steps=2), attach, hf_job.llama(), 3)
    return found


def two_processes(rank: int, world_size: int, folder: str) -> None:
    with hf_job.processes(rank, world_size):
        found = trainer_and_loop(Path(folder) / "plain", lambda *target: None)
    if rank == 0:
        torch.save(found, Path(folder) / "plain.pt")


def two_by_two(rank: int, world_size: int, folder: str) -> None:
    import autoseq

    expected = torch.load(Path(folder) / "plain.pt", weights_only=False)
    with hf_job.processes(rank, world_size):
        found = trainer_and_loop(Path(folder) / "split", lambda *target: autoseq.hf.attach(*target, sequence=2, inner="eager"))
    hf_job.check_alike(found, expected, hf_job.SGD_TOLERANCE)


def test_two_by_two_is_two_processes(tmp_path: Path) -> None:
    run_ranks(two_processes, 2, str(tmp_path), timeout_s=240)
    run_ranks(two_by_two, 4, str(tmp_path), timeout_s=240)


def in_float64(folder: Path, attach: Callable[..., None], accumulated: int) -> Any:
    from transformers import Trainer

    args = arguments(folder, gradient_accumulation_steps=accumulated, max_grad_norm=0.5, train_sampling_strategy="sequential")
    trainer = Trainer(model=hf_job.llama().double(), args=args, train_dataset=hf_job.rows(12))
    attach(trainer)
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"norms": norms, "weights": hf_job.weights(trainer.model)}


def copies_beside_accumulation(rank: int, world_size: int, folder: str) -> None:
    hf_job.compare_accumulated(rank, world_size, in_float64, folder)
    assert torch._dynamo.config.optimize_ddp is True


def test_two_copies_are_two_accumulated_batches(tmp_path: Path) -> None:
    run_ranks(copies_beside_accumulation, 4, str(tmp_path), timeout_s=240)
