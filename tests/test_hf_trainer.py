"""transformers' Trainer with its sequence split over two ranks: every logged number, prediction and weight is one device's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_job
from ranks import run_ranks


def arguments(folder: Path, **changes: Any) -> Any:
    from transformers import TrainingArguments

    usual = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 3, "learning_rate": 0.1, "optim": "sgd",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**usual | changes)


def train_evaluate_predict(folder: Path, attach: Callable[[Any], None]) -> Any:
    from transformers import Trainer

    def metrics(seen: Any) -> dict[str, float]:
        return {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean()), "rows": float(len(seen.label_ids))}

    args = arguments(
        folder, gradient_accumulation_steps=3, max_grad_norm=0.5, lr_scheduler_type="linear", warmup_steps=1, eval_strategy="steps",
        eval_steps=2, include_num_input_tokens_seen="all", max_steps=4,
    )  # fmt: skip
    trainer = Trainer(
        model=hf_job.llama(), args=args, train_dataset=hf_job.rows(14), eval_dataset=hf_job.rows(5, seed=2), compute_metrics=metrics
    )
    attach(trainer)
    trainer.train()
    predicted = trainer.predict(hf_job.rows(5, seed=3))
    unlabelled = trainer.predict(hf_job.rows(3, seed=4, labels=False))
    return {
        "log": hf_job.logged(trainer), "weights": hf_job.weights(trainer.model), "predictions": predicted.predictions,
        "labels": predicted.label_ids, "test loss": predicted.metrics["test_loss"], "unlabelled": unlabelled.predictions,
    }  # fmt: skip


def job(rank: int, world_size: int, folder: str) -> None:
    hf_job.compare(rank, world_size, train_evaluate_predict, folder, hf_job.SGD_TOLERANCE)


def test_training_evaluation_and_prediction_are_those_of_one_device(tmp_path: Path) -> None:
    run_ranks(job, 2, str(tmp_path), timeout_s=240)
