"""What every test has: output as wide as a pipe's, and rank processes that end with the tests; and what several files ask for."""

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from autoseq.program import build_program
from ranks import close_pool

# What these assert is explained as it is in the tests.
pytest.register_assert_rewrite("attention_checks", "training_job", "tracing_job")

os.environ["AUTOSEQ_LOG"] = "quiet"  # rank processes write to the terminal; test_progress.py has what they say
os.environ.pop("COLUMNS", None)  # xdist sets 80 for its workers, and commands fold their tables to it


@pytest.fixture(scope="session", autouse=True)
def rank_processes() -> Iterator[None]:
    """Nothing starts here: the first test that needs ranks starts them."""
    gc.freeze()  # as in the ranks
    yield
    gc.unfreeze()  # what is never collected says so at exit
    close_pool()


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The programs that the backend makes."""
    made: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        made.append(build_program(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("autoseq.backend.build_program", record)
    torch._dynamo.reset()
    return made
