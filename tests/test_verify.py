"""`autoseq verify`: right models pass on every rank, differences are named, failures have messages."""

import json
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from autoseq import verify
from autoseq.cli import app
from autoseq.launch import Rank
from autoseq.model_report import Report
from autoseq.returned_names import named_tensors
from autoseq.verify import Case, Difference, Verification, _relative

EXAMPLE = "examples/plain_gpt.py:tiny"

FACTORIES = """
    import os
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Model(nn.Module):
        '''Returns a dict without a loss, has a parameter that gets no gradient, and drops out.'''

        def __init__(self):
            super().__init__()
            self.qkv, self.unused, self.dropout = nn.Linear(8, 24), nn.Linear(2, 2), nn.Dropout(0.5)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return {"hidden": self.dropout(y.transpose(1, 2).flatten(2)), "length": x.shape[1]}

    class WithKeyBias(nn.Module):
        '''The gradient of the keys' bias is zero but for rounding.'''

        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            return self.out(y).square().mean()

    def with_key_bias(batch, seq_len):
        return WithKeyBias(), {"x": torch.randn(batch, seq_len, 8)}

    def right(batch, seq_len):
        return Model(), {"x": torch.randn(batch, seq_len, 8)}

    def another_on_each_rank(batch, seq_len):
        return Model(), {"x": torch.randn(batch, seq_len, 8) + torch.distributed.get_rank()}
"""


@pytest.fixture
def factories(tmp_path: Path) -> str:
    (tmp_path / "factories.py").write_text(textwrap.dedent(FACTORIES))
    return str(tmp_path / "factories.py")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["verify", *arguments])


def test_an_example_is_the_same_on_three_ranks_and_one() -> None:
    result = run(EXAMPLE, "--seq-len", "37", "--world-size", "3", "--strategy", "ring", "--batch", "2")
    assert result.exit_code == 0, result.output
    assert "Relative L2 error of 2 outputs" in result.stdout
    assert "Relative L2 error of 29 gradients, the worst 5" in result.stdout
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"GPT on 3 ranks: ring, \w+ rows, no fallbacks, 1 program", lines[0])
    assert [line.split()[-1] for line in lines[2:6]] == ["exact", "predicted", "predicted", "predicted"]
    assert "Verified: the outputs logits, loss, and the gradients of all parameters that have one" in lines
    assert result.stdout.splitlines()[-1].startswith("autoseq verify: OK, 31 values on 3 ranks, largest error ")


def verified(differences: list[Difference]) -> Callable[[Case, int], Verification]:
    """Stands in for `verify_target`, with nothing run."""
    return lambda case, world_size: Verification(differences, Report("GPT", 2, "zigzag", (("ring", 2),), 1, 0, "found", 16, (), None))


def test_scripts_get_every_value_and_the_report_by_names() -> None:
    result = run(EXAMPLE, "--seq-len", "16", "--world-size", "2", "--strategy", "ulysses", "--inner", "eager", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["ok"], found["tolerance"], len(found["gradients"])) == (True, 1e-5, 29)
    assert sorted(each["name"] for each in found["outputs"]) == ["logits", "loss"]
    assert found["report"]["strategies"] == {"ulysses": 2}
    assert set(found["report"]["figures"]) == {"rows_of_a_sequence", "kept_for_the_backward", "sent", "seconds"}


def test_scripts_see_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Difference("gradient", "head.weight", math.inf), Difference("output", "loss", 2e-7)]
    monkeypatch.setattr("autoseq.verify.verify_target", verified(found))
    result = run(EXAMPLE, "--seq-len", "16", "--world-size", "2", "--json")
    shown = json.loads(result.stdout)
    assert (result.exit_code, shown["ok"]) == (1, False)
    assert shown["gradients"] == [{"name": "head.weight", "error": None, "ok": False}]
    assert shown["outputs"] == [{"name": "loss", "error": 2e-7, "ok": True}]


class Returns(nn.Module):
    def forward(self, way: str) -> Any:
        x, y = torch.zeros(1), torch.ones(1)
        if way == "a dict":
            return {"x": x, "y": [y]}
        if way == "one tensor":
            return x
        return x, y


class ReturnsOneTuple(nn.Module):
    def forward(self, way: str) -> Any:
        def nested() -> int:
            return 1

        logits, loss = torch.zeros(1), torch.ones(1) if nested() else None
        if way == "early":
            return logits, loss
        return logits, loss


@pytest.mark.parametrize(
    ("model", "way", "names"),
    [
        pytest.param(Returns(), "a dict", ["x", "['y'][0]"], id="paths of what is not a tuple"),
        pytest.param(Returns(), "one tensor", ["result"], id="a tensor alone"),
        pytest.param(Returns(), "a tuple", ["0", "1"], id="numbers where returns differ"),
        pytest.param(ReturnsOneTuple(), "", ["logits", "loss"], id="variables of a tuple"),
        pytest.param(ReturnsOneTuple(), "early", ["logits", "loss"], id="variables of two alike returns"),
    ],
)
def test_outputs_are_named_as_they_are_returned_or_numbered(model: nn.Module, way: str, names: list[str]) -> None:
    assert [name for name, _ in named_tensors(model(way), model)] == names


def test_what_differs_by_more_than_the_tolerance_is_named_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Difference("gradient", "head.weight", math.nan), Difference("output", "loss", 2e-3), Difference("gradient", "norm.bias", 1e-7)]
    monkeypatch.setattr("autoseq.verify.verify_target", verified(found))
    result = run(EXAMPLE, "--seq-len", "16", "--world-size", "2", "--tolerance", "1e-4")
    assert result.exit_code == 1
    assert result.stdout.count("above the tolerance") == 2
    assert result.stdout.splitlines()[-1] == (
        "autoseq verify: FAILED, 2 of 3 differ by more than 0.0001; the worst is the gradient head.weight, by nan"
    )


@pytest.mark.parametrize(("arguments", "shown"), [((), 5), (("--all",), 9)])
def test_only_the_worst_gradients_are_shown_unless_all_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], shown: int
) -> None:
    found = [Difference("gradient", f"weight{i}", 1e-7 / (i + 1)) for i in range(9)]
    monkeypatch.setattr("autoseq.verify.verify_target", verified(found))
    result = run(EXAMPLE, "--seq-len", "16", "--world-size", "2", *arguments)
    assert (result.exit_code, result.stdout.count("weight")) == (0, shown)


def test_a_model_without_loss_is_compared_through_a_projection_and_without_dropout(factories: str) -> None:
    result = run(f"{factories}:right", "--seq-len", "10", "--world-size", "2", "--inner", "eager")
    assert result.exit_code == 0, result.output
    assert "hidden" in result.stdout
    assert "qkv.weight" in result.stdout


def test_gradients_that_are_nothing_but_rounding_are_compared_beside_all_others(factories: str) -> None:
    result = run(f"{factories}:with_key_bias", "--seq-len", "64", "--world-size", "2", "--inner", "eager", "--all")
    assert result.exit_code == 0, result.output
    assert "k.bias" in result.stdout


def test_a_gradient_that_should_be_zero_and_is_not_fails(factories: str) -> None:
    """Zero but for rounding on one device, and far more than rounding on ranks."""
    rank, case = Rank(0, 1, torch.device("cpu"), None), Case(f"{factories}:with_key_bias", 1, 64, {})  # type: ignore[arg-type]
    model, kwargs = verify._make(rank, case)
    gradients = verify._step(model, model, kwargs)["gradient"]
    rounding = verify._rounding(rank, case, gradients)
    assert list(rounding) == ["k.bias"]
    bias = gradients["k.bias"]
    assert bias is not None

    def error(ours: torch.Tensor) -> float:
        actual, expected = ({"output": {}, "gradient": each} for each in ({**gradients, "k.bias": ours}, gradients))
        return verify._errors(actual, expected, rounding)["gradient", "k.bias"]

    assert error(bias) == 0
    assert error(bias + 1e-4) > 1
    assert error(bias.double()) == math.inf


def test_a_transformers_configuration_is_verified(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run(f"hf:{tmp_path}", "--seq-len", "24", "--world-size", "2", "--inner", "eager")
    assert result.exit_code == 0, result.output
    assert "logits" in result.stdout


def test_fewer_tokens_than_ranks_are_verified_too(factories: str) -> None:
    result = run(f"{factories}:right", "--seq-len", "1", "--world-size", "2")
    assert result.exit_code == 0 and "autoseq verify: OK" in result.stdout


@pytest.mark.parametrize(
    ("factory", "seq_len", "message"),
    [
        pytest.param("another_on_each_rank", "8", "called the model with different values of", id="ranks with different inputs"),
    ],
)
def test_what_the_ranks_raise_is_a_message_and_no_traceback(factories: str, factory: str, seq_len: str, message: str) -> None:
    result = run(f"{factories}:{factory}", "--seq-len", seq_len, "--world-size", "2")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        pytest.param(ONES, ONES, 0.0, id="equal"),
        pytest.param(ONES * 1.5, ONES, 0.5, id="relative to what is expected"),
        pytest.param(ONES, ONES * 0, 2.0, id="the error itself where zeros are expected"),
        pytest.param(None, None, 0.0, id="no gradient on either"),
        pytest.param(ONES, None, math.inf, id="a gradient where there is none"),
        pytest.param(None, ONES, math.inf, id="a missing gradient"),
        pytest.param(torch.ones(5), ONES, math.inf, id="another shape"),
        pytest.param(ONES.double(), ONES, math.inf, id="another dtype"),
        pytest.param(ONES.long(), ONES.long(), 0.0, id="equal integers"),
        pytest.param(ONES.long(), ONES.long() * 2, math.inf, id="other integers"),
        pytest.param(ONES * math.nan, ONES, math.nan, id="NaN stays NaN, which is within no tolerance"),
    ],
)
def test_relative_error(actual: torch.Tensor | None, expected: torch.Tensor | None, error: float) -> None:
    assert _relative(actual, expected) == pytest.approx(error, nan_ok=True)
