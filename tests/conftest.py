"""What every test has: output as wide as a pipe's, and rank processes that end with the tests."""

import gc
import os
from collections.abc import Iterator

import pytest

from ranks import close_pool

# What these assert is explained as it is in the tests.
pytest.register_assert_rewrite("attention_checks", "training_job", "tracing_job")

os.environ.pop("COLUMNS", None)  # xdist sets 80 for its workers, and commands fold their tables to it


@pytest.fixture(scope="session", autouse=True)
def rank_processes() -> Iterator[None]:
    """Nothing starts here: the first test that needs ranks starts them."""
    gc.freeze()  # as in the ranks
    yield
    gc.unfreeze()  # what is never collected says so at exit
    close_pool()
