"""accelerate's `find_executable_batch_size` around a user's own loop: refused by name wherever `attach` stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import autoseq
import hf_job
from ranks import run_ranks
from test_hf_trainer import arguments

NAMED = r"find_executable_batch_size around a loop of your own: .* Choose a batch size, or use a Trainer with auto_find_batch_size=True"


def accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def attached(made: Any, sequence: int = 2) -> Any:
    model = hf_job.llama()
    autoseq.hf.attach(made, model, sequence=sequence, inner="eager")
    return model


def attached_within(folder: Path) -> Callable[[int], Any]:
    made = accelerator()
    return lambda batch_size: attached(made)


def prepared_within(folder: Path) -> Callable[[int], Any]:
    made = accelerator()
    model = attached(made)
    return lambda batch_size: made.prepare(model)


def stepped_within(folder: Path) -> Callable[[int], Any]:
    made = accelerator()
    model = made.prepare(attached(made))
    loss = model(**{name: value[None] for name, value in hf_job.rows(1)[0].items()}).loss
    return lambda batch_size: made.backward(loss)


def trained_within(folder: Path) -> Callable[[int], Any]:
    from transformers import Trainer

    trainer = Trainer(model=hf_job.llama(), args=arguments(folder), train_dataset=hf_job.rows(4))
    autoseq.hf.attach(trainer, sequence=2, inner="eager")
    return lambda batch_size: trainer.train()


PLACES = attached_within, prepared_within, stepped_within, trained_within


def job(rank: int, world_size: int, folder: str) -> None:
    from accelerate.utils import find_executable_batch_size

    for place in PLACES:
        with hf_job.processes(rank, world_size):
            hf_job.forget_accelerator()
            loop = find_executable_batch_size(place(Path(folder)), starting_batch_size=4)
            with pytest.raises(autoseq.UnsupportedError, match=NAMED):
                loop()


def test_it_is_refused_on_ranks(tmp_path: Path) -> None:
    run_ranks(job, 2, str(tmp_path), timeout_s=120)


def alone(rank: int, world_size: int) -> None:
    from accelerate.utils import find_executable_batch_size

    with hf_job.processes(rank, world_size):
        hf_job.forget_accelerator()
        assert find_executable_batch_size(lambda batch_size: attached(accelerator(), sequence=1), starting_batch_size=4)() is not None


def test_a_single_rank_may_try_again() -> None:
    run_ranks(alone, 1, timeout_s=60)
