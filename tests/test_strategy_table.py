"""The page on strategies says what the code answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from autoseq.cli import app
from autoseq.runtime.strategies import STRATEGIES
from autoseq.strategy_table import KINDS, markdown, served

PAGE = Path(__file__).parents[1] / "docs" / "strategies.md"


def test_the_page_is_what_the_code_answers() -> None:
    assert PAGE.read_text().endswith(markdown()), "make docs/strategies.md's tables anew: autoseq strategies --markdown"


def test_every_kind_is_served_by_some_strategy_that_splits() -> None:
    for row in served():
        assert any(reason is None for name, reason in row.reasons.items() if name != "local"), row.kind


@pytest.mark.parametrize("options", [[], ["--markdown"]], ids=["for people", "for the page"])
def test_the_command_names_every_strategy_and_kind(options: list[str]) -> None:
    result = CliRunner().invoke(app, ["strategies", *options])
    assert result.exit_code == 0
    words = "".join(result.stdout.split())
    assert all(name in result.stdout for name in STRATEGIES)
    assert all("".join(kind.split()) in words for kind in KINDS) or not options
