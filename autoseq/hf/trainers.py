"""What a Trainer of transformers or TRL does once for each copy of the data, and not once a rank: files, logs, reports.

Everything that a trainer counts, it counts by accelerate's numbers (`replicas`). Left here are the decisions that it takes itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from autoseq.api import parallelize
from autoseq.hf.data_parallel import expect_all_gradients
from autoseq.hf.generation import draw_by_copy
from autoseq.hf.replicas import Replicas, count_copies_in_trainers, show_replicas
from autoseq.hf.same_start import share_generators_after, share_weights
from autoseq.hf.sharded import save_over_all_ranks
from autoseq.runtime.errors import UnsupportedError


def models_of(trainer: Any) -> list[nn.Module]:
    """The model that is trained, then the one that it is compared with, in trainers that have one."""
    others = (getattr(trainer, name, None) for name in ("ref_model",))
    return [trainer.model, *(model for model in others if isinstance(model, nn.Module) and model is not trainer.model)]


def adapt_trainer(trainer: Any, replicas: Replicas, options: dict[str, Any]) -> None:
    """Change the decisions of one trainer, on the object itself."""
    trainer._is_split_by_autoseq = True
    count_copies_in_trainers()
    save_over_all_ranks("transformers.trainer")
    _write_on_first_ranks(trainer, replicas)
    if replicas.num_copies > 1:
        expect_all_gradients(trainer)
    draw_by_copy(trainer, replicas)
    trainer._load_rng_state = share_generators_after(trainer._load_rng_state, replicas)
    trainer.hyperparameter_search = _no_search
    for name in ("train", "evaluate", "predict"):
        setattr(trainer, name, _after_showing(replicas, getattr(trainer, name)))
    _split_new_models(trainer, replicas, options)


def _no_search(*_: Any, **__: Any) -> Any:
    raise UnsupportedError(
        "hyperparameter_search with autoseq.hf.attach: every rank of a sequence would search by itself. Run one attached trainer a trial."
    )


def _write_on_first_ranks(trainer: Any, replicas: Replicas) -> None:
    """Ranks of one sequence would write the same file at the same time. All wait for a checkpoint, which training calls on every rank;
    `save_model` may be called on the main process alone."""
    trainer._save_checkpoint = _then_meet(trainer._save_checkpoint, trainer.accelerator)
    if replicas.is_first:
        return
    trainer.args.__class__ = _silent(type(trainer.args))
    trainer.is_world_process_zero = lambda: False
    trainer.state.is_world_process_zero = False
    trainer._save_rng_state = lambda output_dir: None


def _after_showing(replicas: Replicas, plain: Callable[..., Any]) -> Callable[..., Any]:
    """`TrainingArguments` that were made since `attach` have reset accelerate's state."""

    @functools.wraps(plain)
    def run(*args: Any, **kwargs: Any) -> Any:
        show_replicas(replicas)
        return plain(*args, **kwargs)

    return run


def _then_meet(save: Callable[..., Any], accelerator: Any) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_and_meet(*args: Any, **kwargs: Any) -> Any:
        result = save(*args, **kwargs)
        accelerator.wait_for_everyone()
        return result

    return save_and_meet


@functools.cache
def _silent(kind: type) -> type:
    """The class of the arguments of a rank that writes nothing but what is asked of each node."""

    def should_save(self: Any) -> bool:
        return self.save_on_each_node and kind.should_save.fget(self)  # type: ignore[attr-defined]

    def should_log(self: Any) -> bool:
        return self.log_on_each_node and kind.should_log.fget(self)  # type: ignore[attr-defined]

    members = {"should_save": property(should_save), "should_log": property(should_log), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)


def _split_new_models(trainer: Any, replicas: Replicas, options: dict[str, Any]) -> None:
    """`model_init` makes another model at each train()."""
    plain = trainer.call_model_init

    @functools.wraps(plain)
    def call_model_init(*args: Any, **kwargs: Any) -> nn.Module:
        model = parallelize(plain(*args, **kwargs), **options, mesh=replicas.mesh["sequence"])
        share_weights(model, replicas.mesh["sequence"])
        return model

    trainer.call_model_init = call_model_init
