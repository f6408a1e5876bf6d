"""What plain training loops do beside forward and backward, on two ranks of a sequence and on one device: all in one job."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.parametrizations import weight_norm

import autoseq
import models
from ranks import run_ranks

TOLERANCE = 1e-5  # relative L2 of weights after steps in float32, whose sums run in another order
Loop = Callable[[nn.Module], list[float]]


def batch(step: int, rows: int = 2) -> Tensor:
    return torch.randint(0, models.VOCABULARY, (rows, 24), generator=torch.Generator().manual_seed(step))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def clipped(model: nn.Module) -> list[float]:
    optimizer, norms = sgd(model), []
    for step in range(2):
        model(batch(step), batch(step))[0].backward()
        norms.append(clip_grad_norm_(model.parameters(), 0.1).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def scaled_by_hand(model: nn.Module) -> list[float]:
    """Gradients of three batches, each loss by its own part of the tokens."""
    optimizer, losses = sgd(model), []
    for step, rows in enumerate((2, 1, 3)):
        loss = model(batch(step, rows), batch(step, rows))[0] * rows / 6
        loss.backward()
        losses.append(loss.item())
    optimizer.step()
    return losses


def with_a_grad_scaler(model: nn.Module) -> list[float]:
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for step in range(2):
        scaler.scale(model(batch(step), batch(step))[0]).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [scaler.get_scale()]


def scheduled(model: nn.Module) -> list[float]:
    """A schedule that reads the loss."""
    optimizer, rates = sgd(model), []
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for step in range(3):
        loss = model(batch(step), batch(step))[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step(loss.detach())
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def parametrized(model: nn.Module) -> list[float]:
    weight_norm(model.get_submodule("head"))
    return clipped(model)


def validated(model: nn.Module) -> list[float]:
    """Between training steps, with a short last batch."""
    losses = clipped(model)
    model.eval()
    with torch.no_grad():
        losses += [model(batch(step, rows), batch(step, rows))[0].item() for step, rows in enumerate((2, 2, 1))]
    model.train()
    return losses + clipped(model)


def saved_and_read(model: nn.Module) -> list[float]:
    clipped(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = models.make("plain", layers=1)
    fresh.load_state_dict(torch.load(file))
    return [sum(p.double().sum().item() for p in fresh.parameters())]


LOOPS: dict[str, Loop] = {
    "clip_grad_norm_": clipped, "a loss that is scaled by hand": scaled_by_hand, "GradScaler": with_a_grad_scaler,
    "a schedule that reads the loss": scheduled, "weight_norm as a parametrization": parametrized,
    "validation with a short last batch": validated, "torch.save of a model's state": saved_and_read,
}  # fmt: skip


def run_all(rank: int, world_size: int) -> dict[str, tuple[list[float], list[float], float, list[float]]]:
    """Of each loop: its numbers, those of one device, the largest error of a weight, and sums of the weights."""
    found = {}
    for name, loop in LOOPS.items():
        torch._dynamo.reset()
        alone = models.make("plain", layers=1)
        split = autoseq.parallelize(copy.deepcopy(alone), inner="eager")
        ours, theirs = loop(split), loop(alone)
        pairs = zip(split.parameters(), alone.parameters(), strict=True)
        errors = [((mine - other).norm() / other.norm()).item() for mine, other in pairs]
        found[name] = ours, theirs, max(errors), [p.double().sum().item() for p in split.parameters()]
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(run_all, 2, timeout_s=300)  # a compilation for each loop, some for several shapes


@pytest.mark.parametrize("name", LOOPS)
def test_a_plain_loop_has_one_devices_numbers(results: list[dict[str, Any]], name: str) -> None:
    for ours, theirs, error, _ in (each[name] for each in results):
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert error <= TOLERANCE
    assert results[0][name][0] == results[1][name][0] and results[0][name][3] == results[1][name][3], "ranks are equal to the bit"
