"""`autoseq demo` ends with OK when, and only when, the two trainings agree; the example scripts run as their comments say."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from autoseq.cli import app
from autoseq.demo import Step, complaints, read_text
from autoseq.inspection import Inspection, inspect_model
from autoseq.saved_memory import saved_bytes
from inspected_models import make_one


def test_the_demo_trains_and_ends_with_ok() -> None:
    result = CliRunner().invoke(app, ["demo", "--steps", "2", "--world-size", "2"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("A Llama of 988,544 parameters learns Python")
    assert lines[-1].startswith("autoseq demo: OK, 2 ranks trained as one device does: losses within ")
    for expected in ("Attention: 5 sites", "Activation memory", "one device, compiled alike", "difference over 2 steps"):
        assert expected in result.stdout
    first, last = (next(line for line in lines if line.strip().startswith(f"{n} ")).split() for n in (1, 2))
    assert float(last[1]) < float(first[1])  # it learns


@lru_cache
def inspected() -> Inspection:
    """The verdict is the same for any model."""
    return inspect_model(make_one, seq_len=16, world_size=2)


def good_step(rank: int = 0) -> Step:
    sent = {op: (count.messages, count.bytes) for op, count in inspected().collectives.items()}
    return Step(1, 3.0, "abc", sent, *((3.0, 3.0, 1e-7) if rank == 0 else ()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        pytest.param({}, None, id="nothing is wrong"),
        pytest.param({"loss": 3.1}, "FAILED at step 2: the loss differs by 3.3e-02, allowed is 1e-06", id="the loss"),
        pytest.param({"loss": float("nan")}, "the loss differs by nan", id="a loss that is no number"),
        pytest.param({"gradient_difference": 1e-2}, "FAILED at step 2: gradients differ by 1.0e-02, allowed is 1e-05", id="gradients"),
        pytest.param({"alone_loss": 3.1}, "step 2: the loss of the training on one device differs", id="trainings that part early"),
        pytest.param({"digest": "xyz"}, "FAILED at step 2: ranks 0 and 1 have different losses or gradients", id="one bit between ranks"),
        pytest.param({"sent": {"all_reduce": (1, 1)}}, "FAILED: rank 0 sent .* by the formulas it sends", id="bytes"),
    ],
)
def test_the_verdict_names_what_differs(wrong: dict[str, Any], message: str | None) -> None:
    steps = {0: [replace(good_step(), **wrong)], 1: [good_step(1)]}
    found = complaints(steps, inspected())
    assert bool(found) == (message is not None)
    assert message is None or re.search(message, "\n".join(found))


def test_the_text_is_real_and_the_same_every_time() -> None:
    text = read_text()
    assert len(text) > 1_000_000
    assert torch.equal(text, read_text())
    assert b"import " in bytes(text[:100_000].tolist())


def test_saved_bytes_counts_each_storage_once_and_no_parameters() -> None:
    layer = torch.nn.Linear(3, 3, bias=False)
    x = torch.ones(5, 3)

    def forward() -> torch.Tensor:
        y = layer(x)  # saves x and the weight
        return (y * y).sum() + (y[:2] * 2).sum()  # saves y twice, and a view of it not at all

    assert saved_bytes(forward, layer) == (5 * 3 + 5 * 3) * 4


def test_train_llama_runs_under_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ["examples/train_llama.py", "--steps", "2", "--seq-len", "64", "--inner", "eager"]
    done = subprocess.run([*command, *script], capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 2
    assert losses[1] < losses[0]
