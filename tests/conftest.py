"""Ends the rank processes when the tests are done."""

from collections.abc import Iterator

import pytest

from ranks import close_pool


@pytest.fixture(scope="session", autouse=True)
def rank_processes() -> Iterator[None]:
    """Nothing starts here: the first test that needs ranks starts them."""
    yield
    close_pool()
