"""The command line's manners: TARGETs, exit statuses, one-line messages, help that teaches."""

import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from autoseq.cli import app
from autoseq.runtime.errors import TargetError
from autoseq.target import brief, load_target

EXAMPLE = "examples/plain_gpt.py:tiny"

FACTORIES = """
    import torch
    from torch import nn

    def right(batch, seq_len):
        return nn.Linear(4, 4), {"input": torch.zeros(batch, seq_len, 4)}

    def no_tuple(batch, seq_len):
        return nn.Linear(4, 4)

    def no_model(batch, seq_len):
        return "model", {}

    def raises(batch, seq_len):
        raise RuntimeError("first line\\nsecond line")

    def wrong_shape(batch, seq_len):
        return nn.Linear(5, 4), {"input": torch.zeros(batch, seq_len, 4)}

    def no_arguments():
        return right(1, 1)

    number = 4
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with targets, good and bad."""
    (tmp_path / "factories.py").write_text(textwrap.dedent(FACTORIES))
    (tmp_path / "syntax.py").write_text("def (:\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "needs.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{not json")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("factories.py", "names nothing to run; it is path/file.py:factory, package.module:factory, or hf:", id="no colon"),
        pytest.param("factories.py:", "names nothing to run", id="nothing behind the colon"),
        pytest.param("nowhere.py:tiny", "there is no file nowhere.py", id="no such file"),
        pytest.param("no.such.module:tiny", "importing no.such.module failed: ModuleNotFoundError", id="no such module"),
        pytest.param("syntax.py:tiny", "importing syntax.py failed: SyntaxError", id="a file with a syntax error"),
        pytest.param("leaves.py:tiny", "importing leaves.py failed: SystemExit", id="a file that exits"),
        pytest.param("needs.py:tiny", "No module named 'no_such_module_anywhere'", id="a file whose own import fails"),
        pytest.param("factories.py:tiny", r"there is no 'tiny' there; its functions are right, no_tuple", id="no such function"),
        pytest.param("factories.py:number", "'number' is a int, not a function", id="not a function"),
        pytest.param("factories.py:no_arguments", "must take batch and seq_len", id="a function without the two arguments"),
        pytest.param("hf:nowhere", "there is no nowhere; hf: takes a local config.json or its folder", id="no such configuration"),
        pytest.param("hf:broken", "is no transformers configuration", id="a configuration that is no JSON"),
        pytest.param("hf:unknown", "is no transformers configuration", id="a model that transformers does not know"),
    ],
)
def test_a_target_that_cannot_be_found_says_why_in_one_line(folder: Path, text: str, message: str) -> None:
    with pytest.raises(TargetError, match=message) as error:
        load_target(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("factories.py:no_tuple", r"must return \(model, kwargs\), .* it returned Linear", id="only a model"),
        pytest.param("factories.py:no_model", r"it returned tuple \(str, dict\)", id="no nn.Module"),
        pytest.param("factories.py:raises", "failed when called with batch=2, seq_len=8: RuntimeError: first line$", id="raises"),
    ],
)
def test_a_target_that_makes_the_wrong_thing_says_so(folder: Path, text: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        load_target(text).make(batch=2, seq_len=8)


@pytest.mark.parametrize("text", ["factories.py:right", "factories:right"])
def test_files_and_modules_give_model_and_arguments(folder: Path, text: str) -> None:
    model, kwargs = load_target(text).make(batch=2, seq_len=8)
    assert isinstance(model, torch.nn.Linear)
    assert kwargs["input"].shape == (2, 8, 4)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        pytest.param(["inspect", "nowhere.py:tiny"], 2, "there is no file nowhere.py", id="inspect: no such file"),
        pytest.param(["verify", "nowhere.py:tiny"], 2, "there is no file nowhere.py", id="verify: no such file"),
        pytest.param(["inspect", "factories.py:raises"], 2, "RuntimeError: first line", id="the factory raises"),
        pytest.param(["inspect", "factories.py:wrong_shape"], 2, "traced: TorchRuntimeError: RuntimeError('", id="the model raises"),
        pytest.param(
            ["plan", "factories.py:right", "--topology", "8xH100"], 1, "there is nothing to plan: every rank runs the whole model, because "
            "no attention was found", id="plan: a model without attention",
        ),
        pytest.param(
            ["inspect", "factories.py:right", "--html", "page.html"], 1, "there is nothing to draw: every rank runs the whole model",
            id="a page of a model without attention",
        ),
        pytest.param(["inspect", "factories.py:right", "--strategy", "x"], 2, "'strategy' cannot be 'x'; it is one of", id="strategy"),
        pytest.param(["inspect", "factories.py:right", "--layout", "odd"], 2, "option 'layout' cannot be 'odd'", id="layout"),
    ],
)
def test_a_mistake_is_a_message_and_a_status_and_no_traceback(folder: Path, arguments: list[str], status: int, message: str) -> None:
    result = run(*arguments, "--seq-len", "8", "--world-size", "2")
    assert (result.exit_code, result.stdout) == (status, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("target", "length", "why"),
    [
        pytest.param("factories.py:right", 8, "no attention was found in the program", id="no attention"),
        pytest.param(str(Path(EXAMPLE).resolve()), 1, "it has only 1 query for 2 ranks", id="fewer tokens than ranks"),
    ],
)
def test_a_model_that_is_not_split_is_shown_as_such(folder: Path, target: str, length: int, why: str) -> None:
    shown = run("inspect", target, "--seq-len", str(length), "--world-size", "2")
    assert shown.exit_code == 0, shown.stderr
    assert f"{length} tokens on 2 ranks: nothing is split, every rank runs the whole model." in shown.stdout and why in shown.stdout
    told = run("inspect", target, "--seq-len", str(length), "--world-size", "2", "--json")
    assert why in json.loads(told.stdout)["whole"]


def test_a_plan_without_a_topology_lists_those_there_are_and_names_this_machine() -> None:
    result = run("plan", EXAMPLE, "--seq-len", "64")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.search(r"which hardware to plan for\? --topology is here for this machine, one of .*8xH100.*, or ", result.stderr)


def test_a_plan_for_this_machine() -> None:
    result = run("plan", EXAMPLE, "--seq-len", "64", "--world-size", "2", "--topology", "here")
    assert result.exit_code == 0, result.stderr
    assert "2 ranks of found" in result.stdout


def test_an_error_that_dynamo_wraps_is_told_with_its_cause_and_the_models_line() -> None:
    class TooFewTargets(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(x, x.new_zeros(3, dtype=torch.long))

    with pytest.raises(Exception) as raised:
        torch.compile(TooFewTargets(), backend="eager")(torch.zeros(4, 8))
    told = brief(raised.value)
    assert re.fullmatch(r"TorchRuntimeError at .*test_cli\.py:\d+: ValueError\('Expected input batch_size \(4\) .*'\)", told), told


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["inspect", EXAMPLE], id="a missing option"),
        pytest.param(["inspect", EXAMPLE, "--seq-len", "many", "--world-size", "2"], id="no number"),
        pytest.param(["frob"], id="no such command"),
    ],
)
def test_misuse_exits_with_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("command", ["inspect", "verify", "demo"])
def test_help_teaches_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: autoseq {command}" in result.stdout
