"""transformers' Trainer with its sequence split over two ranks: every logged number, prediction and weight is one device's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hf_job
from ranks import run_ranks


def arguments(folder: Path, kind: str = "TrainingArguments", **changes: Any) -> Any:
    import transformers

    usual = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 3, "learning_rate": 0.1, "optim": "sgd",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return getattr(transformers, kind)(**usual | changes)


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
    predicted: Any = trainer.predict(hf_job.rows(5, seed=3))
    unlabelled = trainer.predict(hf_job.rows(3, seed=4, labels=False))
    return {
        "log": hf_job.logged(trainer), "weights": hf_job.weights(trainer.model), "predictions": predicted.predictions,
        "labels": predicted.label_ids, "test loss": predicted.metrics["test_loss"], "unlabelled": unlabelled.predictions,
    }  # fmt: skip


def job(rank: int, world_size: int, folder: str) -> None:
    hf_job.compare(rank, world_size, train_evaluate_predict, folder, hf_job.SGD_TOLERANCE)


def test_training_evaluation_and_prediction_are_those_of_one_device(tmp_path: Path) -> None:
    run_ranks(job, 2, str(tmp_path), timeout_s=240)


def padded(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of several lengths, with the mask of its padding."""
    longest = max(len(row["input_ids"]) for row in examples)
    batch = {"input_ids": torch.zeros(len(examples), longest, dtype=torch.int64), "labels": torch.full((len(examples), longest), -100)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for index, row in enumerate(examples):
        length = len(row["input_ids"])
        batch["input_ids"][index, :length], batch["labels"][index, :length] = row["input_ids"], row["labels"]
        batch["attention_mask"][index, :length] = 1
    return batch


def checkpoint_best_and_resume(folder: Path, attach: Callable[[Any], None]) -> Any:
    """Stop after two of four steps, go on in another trainer; then take the best of its checkpoints."""
    from transformers import Trainer

    found: dict[str, Any] = {}
    data = [*hf_job.rows(4, length=32), *hf_job.rows(4, length=27, seed=5)]
    for steps in (2, 4):
        args = arguments(
            folder, optim="adamw_torch", learning_rate=1e-3, lr_scheduler_type="cosine", max_steps=steps, save_strategy="steps",
            save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
            train_sampling_strategy="group_by_length", save_total_limit=3, include_num_input_tokens_seen="non_padding",
        )  # fmt: skip
        trainer = Trainer(model=hf_job.llama(), args=args, train_dataset=data, eval_dataset=hf_job.rows(3, seed=2), data_collator=padded)
        attach(trainer)
        trainer.train(resume_from_checkpoint=steps > 2)
        found |= {f"log {steps}": hf_job.logged(trainer), f"weights {steps}": hf_job.weights(trainer.model)}
    found["files"] = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return found


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length."""

    def __iter__(self) -> Any:
        yield from hf_job.rows(12)


def stream_with_smoothed_labels(folder: Path, attach: Callable[[Any], None]) -> Any:
    """A loss outside the model, of an iterable dataset, in a model that is made by train(), under activation checkpointing."""
    from transformers import Trainer

    found: dict[str, Any] = {}
    for reentrant in (False, True):
        args = arguments(
            folder, label_smoothing_factor=0.1, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": reentrant},
            average_tokens_across_devices=False, accelerator_config={"split_batches": reentrant, "dispatch_batches": reentrant},
        )  # fmt: skip
        trainer = Trainer(model_init=lambda: hf_job.llama(), args=args, train_dataset=Stream(), eval_dataset=Stream())
        attach(trainer)
        trainer.train()
        found |= {f"log {reentrant}": hf_job.logged(trainer), f"weights {reentrant}": hf_job.weights(trainer.model)}
    return found


def predicted_by_generation(folder: Path, attach: Callable[[Any], None]) -> Any:
    """Evaluated by what the model generates, with drawn tokens."""
    from transformers import GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments

    drawn = GenerationConfig(max_new_tokens=6, do_sample=True, pad_token_id=0, eos_token_id=2)
    args = Seq2SeqTrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", per_device_train_batch_size=2,
        per_device_eval_batch_size=2, dataloader_pin_memory=False, predict_with_generate=True, generation_config=drawn, learning_rate=0.1,
        max_steps=2, gradient_accumulation_steps=2, optim="sgd", logging_steps=1,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model=hf_job.llama(), args=args, train_dataset=hf_job.rows(8))
    attach(trainer)
    trainer.train()
    predicted: Any = trainer.predict(hf_job.rows(3, seed=3))
    return {"log": hf_job.logged(trainer), "weights": hf_job.weights(trainer.model), "predictions": predicted.predictions.tolist()}


def encoder_and_decoder(folder: Path, attach: Callable[[Any], None]) -> Any:
    """T5, whose encoder and decoder have sequences of two lengths."""
    from transformers import Seq2SeqTrainer

    pairs = [{"input_ids": row["input_ids"][:16], "labels": row["labels"][16:28]} for row in hf_job.rows(4)]
    trainer = Seq2SeqTrainer(hf_job.t5(), arguments(folder, "Seq2SeqTrainingArguments", max_steps=2), train_dataset=pairs)
    attach(trainer)
    trainer.train()
    return {"log": hf_job.logged(trainer), "weights": hf_job.weights(trainer.model)}


def encoder_and_decoder_evaluated(folder: Path, attach: Callable[[Any], None]) -> Any:
    """By loss and by what T5 generates, with a short last batch."""
    from transformers import Seq2SeqTrainer

    pairs = [{"input_ids": row["input_ids"][:16], "labels": row["labels"][16:28]} for row in hf_job.rows(3)]
    args = arguments(folder, "Seq2SeqTrainingArguments", predict_with_generate=True, generation_max_length=8)
    trainer = Seq2SeqTrainer(hf_job.t5(), args, eval_dataset=pairs)
    attach(trainer)
    predicted: Any = trainer.predict(pairs)
    return {"evaluated": trainer.evaluate()["eval_loss"], "predictions": predicted.predictions, "loss": predicted.metrics["test_loss"]}


# Of T5 torch 2.11 traces two parts, because its Dynamo stops at the copy.deepcopy of the decoder's configuration.
IS_ONE_PROGRAM = not torch.__version__.startswith("2.11.")

SCENARIOS = {
    "encoder and decoder": (encoder_and_decoder, hf_job.SGD_TOLERANCE, {"strict": IS_ONE_PROGRAM}),
    "encoder and decoder evaluated": (encoder_and_decoder_evaluated, hf_job.SGD_TOLERANCE, {}),
    "generation": (predicted_by_generation, hf_job.SGD_TOLERANCE, {}),
    "checkpoints": (checkpoint_best_and_resume, hf_job.ADAMW_TOLERANCE, {}),
    "stream": (stream_with_smoothed_labels, hf_job.SGD_TOLERANCE, {"inner": "aot_eager"}),
}


def scenario_job(rank: int, world_size: int, name: str, folder: str) -> None:
    scenario, tolerance, options = SCENARIOS[name]
    hf_job.compare(rank, world_size, scenario, folder, tolerance, **options)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str, tmp_path: Path) -> None:
    run_ranks(scenario_job, 2, name, str(tmp_path), timeout_s=240)


def reported(rank: int, world_size: int, folder: str) -> None:
    """What is sent is logged, and compared first steps leave every number as it is."""
    from transformers import Trainer, TrainerCallback

    import autoseq

    seen: list[dict[str, float]] = []

    class Reports(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    def run(attach: Callable[[Any], None], **args: Any) -> Any:
        torch._dynamo.reset()  # programs of the mesh before, which is equal, would be used again
        with hf_job.processes(rank, world_size):
            made = arguments(Path(folder), gradient_accumulation_steps=2, **args)
            trainer = Trainer(model=hf_job.llama(), args=made, train_dataset=hf_job.rows(12), callbacks=[Reports()])
            trainer.args.report_to = ["a tracker of the test"] if args and rank == 0 else []
            attach(trainer)
            with pytest.raises(autoseq.UnsupportedError, match=r"hyperparameter_search with autoseq\.hf\.attach"):
                trainer.hyperparameter_search()
            if args:  # resets accelerate's state, as any later arguments and trainer do
                Trainer(model=hf_job.llama(), args=arguments(Path(folder)))
                assert trainer.args.world_size == 2
            trainer.train()
            assert trainer.args.world_size == 1
            if trainer.is_world_process_zero():
                trainer.save_model(str(Path(folder) / "last"))
                assert (Path(folder) / "last" / "model.safetensors").exists()
        return {"log": hf_job.logged(trainer), "weights": hf_job.weights(trainer.model)}

    options: dict[str, Any] = {"sequence": 2, "inner": "eager", "strategy": "ring"}
    plain = run(lambda trainer: autoseq.hf.attach(trainer, **options))
    assert not any("autoseq/bytes_sent" in logs for logs in seen)
    hf_job.check_alike(run(lambda trainer: autoseq.hf.attach(trainer, verify=2, **options), max_steps=3), plain, 1e-7)
    sent = [(logs["autoseq/bytes_sent"], logs["autoseq/gathers"]) for logs in seen if "autoseq/bytes_sent" in logs]
    gradients = sum(p.numel() for p in hf_job.llama().parameters()) * 4  # all-reduced over two ranks: a rank sends each once
    if rank == 0:
        assert len(sent) == 3 and sent[1] == sent[2] and sent[1][0] > 2 * gradients, (sent, gradients)
    else:
        assert not sent  # it does not report, and all make the mesh that counts

    def broken(trainer: Any) -> None:
        autoseq.hf.attach(trainer, verify=1, **options)
        plain_loss = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: plain_loss(*a, **k) * (1 if torch.compiler.is_compiling() or _is_eager() else 1.01)

    with pytest.raises(autoseq.VerificationError, match=r"training step 1 differs .*on rank 0 .*the loss by 1.0e-02"):
        run(broken)


def _is_eager() -> bool:
    return torch._dynamo.eval_frame._stance.stance == "force_eager"


def test_reports_and_comparison(tmp_path: Path) -> None:
    run_ranks(reported, 2, str(tmp_path), timeout_s=240)


def test_a_compared_step_leaves_buffers_and_generators_as_they_were() -> None:
    from types import SimpleNamespace

    from autoseq.hf.comparison import _taken_back

    model, trainer = torch.nn.BatchNorm1d(3), SimpleNamespace(state=SimpleNamespace(num_input_tokens_seen=0))
    mean, kept = model.running_mean, hf_job.weights(model)
    drawn = []
    for context in (_taken_back(trainer, model), contextlib.nullcontext()):
        with context:
            model(torch.arange(12.0).view(4, 3)).sum().backward()
            drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
        if len(drawn) == 1:
            assert model.running_mean is mean and model.weight.grad is None
            hf_job.check_alike(hf_job.weights(model), kept, 0.0)
    assert drawn[0] == drawn[1] and int(model.num_batches_tracked) == 1  # type: ignore[arg-type]


def test_verify_refuses_dropout(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from autoseq import UnsupportedError
    from autoseq.hf.comparison import compare_first_steps

    trainer: Any = SimpleNamespace(model=hf_job.llama(attention_dropout=0.1))
    with pytest.raises(UnsupportedError, match=r"drops out at random \(model.layers.0.self_attn.attention_dropout = 0.1\)"):
        compare_first_steps(trainer, None, 2)  # type: ignore[arg-type]
