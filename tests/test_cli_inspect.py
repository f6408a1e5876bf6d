"""The files that `autoseq inspect` writes beside what it prints."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from autoseq.cli import app
from inspected_models import EXAMPLE


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["inspect", EXAMPLE, "--seq-len", "64", "--world-size", "4", *arguments])


def test_inspect_writes_a_page_and_a_trace_and_says_so(tmp_path: Path) -> None:
    page, trace = tmp_path / "out.html", tmp_path / "out.json"
    result = run("--html", str(page), "--trace", str(trace), "--topology", "8xH100")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith(f"Wrote {page}\nWrote {trace}\n")
    assert "Graph" not in result.stdout  # the page has it
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert json.loads(trace.read_text("utf-8"))["otherData"]["ranks"] == 4
    assert "8xH100" in page.read_text("utf-8")


def test_an_unknown_topology_is_a_message() -> None:
    result = run("--topology", "8xH1000")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "8xH1000" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_summary_stands_last_or_alone_with_repeated_layers_folded() -> None:
    both, alone = run("--topology", "8xH100").stdout, run("--topology", "8xH100", "--graph", "none").stdout
    assert both.lstrip().startswith("Graph after")
    assert both.endswith(alone)
    assert "lines above once more, with other numbers in their names" in both
    assert "Graph" not in alone
    assert "A step beside one device" in alone
    assert alone.splitlines()[-1].startswith("On 8xH100, ")


def test_json_stays_one_object_beside_a_page(tmp_path: Path) -> None:
    result = run("--html", str(tmp_path / "out.html"), "--json")
    assert json.loads(result.stdout)["world_size"] == 4


@pytest.mark.parametrize("option", ["--html", "--trace"])
def test_a_place_that_cannot_be_written_is_a_message(option: str, tmp_path: Path) -> None:
    for path, message in ((tmp_path, "this is a folder"), (tmp_path / "no" / "out", "there is no folder")):
        result = run(option, str(path))
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
