"""TRL's trainers with the sequence split over two ranks: every logged number and weight is one device's."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_job
from ranks import run_ranks
from test_hf_trainer import arguments

Attach = Callable[..., None]
_WORDS = [f"w{number}" for number in range(hf_job.VOCABULARY - 4)]


def tokenizer() -> Any:
    """Words of one number each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*special, *_WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def text(seed: int, words: int) -> str:
    picked = torch.randint(len(_WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(_WORDS[int(index)] for index in picked)


def usual(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
        "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 0.1, "optim": "sgd", "dataloader_pin_memory": False,
        "bf16": False, **changes,
    }  # fmt: skip


def run(trainer: Any, attach: Attach) -> dict[str, Any]:
    attach(trainer)
    trainer.train()
    return {"log": hf_job.logged(trainer), "weights": hf_job.weights(trainer.model)}


def texts() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"text": [text(seed, 14) for seed in range(24)]})


def fine_tuned(folder: Path, attach: Attach, data: Any, *, more: dict[str, Any] | None = None, **args: Any) -> dict[str, Any]:
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)  # an adapter's weights are drawn
    made = SFTConfig(**usual(folder, **args))
    return run(SFTTrainer(model=hf_job.llama(), args=made, train_dataset=data, processing_class=tokenizer(), **more or {}), attach)


def packed(folder: Path, attach: Attach) -> Any:
    """Several texts in a row, by their positions."""
    return fine_tuned(folder, attach, texts(), packing=True, max_length=32, gradient_accumulation_steps=2)


def without_padding(folder: Path, attach: Attach) -> Any:
    """Batches of several texts in one row, by their positions: TRL's collator, and transformers' in a plain Trainer."""
    from transformers import DataCollatorWithFlattening, Trainer

    found = {"trl": fine_tuned(folder, attach, texts(), padding_free=True, max_length=None)}
    rows = [{name: value.tolist() for name, value in row.items()} for length in (9, 14) for row in hf_job.rows(4, length=length)]
    args = arguments(folder, max_steps=2)
    collator: Any = DataCollatorWithFlattening()
    trainer = Trainer(model=hf_job.llama(), args=args, train_dataset=rows, data_collator=collator)
    return found | {"transformers": run(trainer, attach)}


def adapted(folder: Path, attach: Attach) -> Any:
    """An adapter alone is trained, on a stream."""
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return fine_tuned(folder, attach, texts().to_iterable_dataset(), more={"peft_config": lora}, max_length=32, learning_rate=1.0)


def preferences(folder: Path, attach: Attach) -> Any:
    """DPO with a reference model, and rewards. In float64: its rewards are small differences of large numbers."""
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    pairs = [{"prompt": text(3 * n, 8), "chosen": text(3 * n + 1, 12), "rejected": text(3 * n + 2, 12)} for n in range(6)]
    args = DPOConfig(**usual(folder, max_length=48, gradient_accumulation_steps=2))
    data = Dataset.from_list(pairs)
    trainer = DPOTrainer(
        model=hf_job.llama().double(), ref_model=hf_job.llama(seed=1).double(), args=args, train_dataset=data, processing_class=tokenizer()
    )  # fmt: skip
    found = {"dpo": run(trainer, attach)}
    torch.manual_seed(0)
    scores = LlamaForSequenceClassification(hf_job.llama(num_labels=1).config)
    args = RewardConfig(**usual(folder, max_length=48))
    trainer = RewardTrainer(model=scores, args=args, train_dataset=data, processing_class=tokenizer())
    return found | {"reward": run(trainer, attach)}


def generated(folder: Path, attach: Attach) -> Any:
    """GRPO: completions are drawn in the loop, and rewarded by a function. In float64: advantages add up to nothing but rounding."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(int(word[1:]) % 7 for word in each.split() if word[1:].isdigit())) / 30 for each in completions]

    model = str(folder.parent / "model")
    if folder.name == "alone":
        hf_job.llama().save_pretrained(model)
    drawn = {"num_generations": 2, "max_completion_length": 12, "beta": 0.1, "model_init_kwargs": {"dtype": torch.float64}}
    args = GRPOConfig(**usual(folder, gradient_accumulation_steps=2, **drawn))
    data = Dataset.from_list([{"prompt": text(n, 10)} for n in range(8)])
    trainer = GRPOTrainer(model=model, reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer())
    return run(trainer, attach)


SCENARIOS = {"packed": packed, "without padding": without_padding, "adapted": adapted, "preferences": preferences, "generated": generated}


def job(rank: int, world_size: int, name: str, folder: str) -> None:
    """TRL's own head, in chunks, runs whole: a warning says so, with its source line, and what a rank sends for it."""
    with hf_job.warnings_of("autoseq") as warned:
        hf_job.compare(rank, world_size, SCENARIOS[name], folder, hf_job.SGD_TOLERANCE)
    told = [r"a part of the program at kernels/chunked_logprob\.py:\d+ in \w+: .* runs whole on every rank"]
    if name != "adapted":
        told.append(r"[\d,]+ bytes a rank$")
    if name != "generated":
        assert all(any(re.search(words, each) for each in warned) == (rank == 0) for words in told), warned


@pytest.mark.parametrize("name", SCENARIOS)
def test_numbers_are_those_of_one_device(name: str, tmp_path: Path) -> None:
    run_ranks(job, 2, name, str(tmp_path), timeout_s=300)
