"""Generation runs whole on each rank: its steps have one token each, and the ranks of a sequence draw alike from equal generators."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from autoseq.hf.replicas import Replicas, shown
from autoseq.runtime.errors import OptionError

log = logging.getLogger("autoseq")


@functools.cache
def generate_unsplit() -> None:
    """Once a process: transformers' `generate` runs without compiled programs, in a process whose trainer or accelerator was attached.

    The class has it and not one model, so that a copy of a model and an adapter around one do alike.
    """
    import transformers

    mixin: Any = transformers.GenerationMixin
    plain = mixin.generate

    @functools.wraps(plain)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if shown() is None:
            return plain(self, *args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            return plain(self, *args, **kwargs)

    mixin.generate = generate


def draw_by_copy(trainer: Any, replicas: Replicas) -> None:
    """TRL's trainers that generate as they train counted every rank when they and their arguments were made; the copies count.

    A generation batch is that of all copies, and each copy draws completions of its own.
    """
    args = trainer.args
    if getattr(args, "generation_batch_size", None) is None:
        return
    counted, args.generation_batch_size = (
        args.generation_batch_size,
        args.per_device_train_batch_size * replicas.num_copies * args.steps_per_generation,
    )
    if args.steps_per_generation != args.gradient_accumulation_steps:
        log.warning(
            "generation_batch_size is %d (per_device_train_batch_size × copies of the data × steps_per_generation=%d), no longer %d; where "
            "generation_batch_size was set, set steps_per_generation instead",
            args.generation_batch_size, args.steps_per_generation, counted,
        )  # fmt: skip
    if args.generation_batch_size % args.num_generations:
        raise OptionError(
            f"the generation batch of {replicas.num_copies} copies of the data has {args.generation_batch_size} completions, which cannot "
            f"be divided by num_generations={args.num_generations}: ranks of one sequence count once. Raise per_device_train_batch_size, "
            "gradient_accumulation_steps or steps_per_generation."
        )
    _check_evaluation(args, replicas)
    if replicas.copy > 0:
        from accelerate.utils import set_seed

        set_seed(args.seed, device_specific=True)


def _check_evaluation(args: Any, replicas: Replicas) -> None:
    """TRL's own check, which counted every rank."""
    if getattr(args, "eval_strategy", "no") == "no":
        return
    rows, generations = args.per_device_eval_batch_size * replicas.num_copies, args.num_generations_eval or args.num_generations
    if rows % generations:
        raise OptionError(
            f"the evaluation batch of {replicas.num_copies} copies of the data has {rows} rows, which cannot be divided by {generations} "
            "generations (num_generations_eval, else num_generations): ranks of one sequence count once. Raise "
            "per_device_eval_batch_size or set num_generations_eval."
        )
