"""What a rank does where a model trains: one step through autoseq and one on one device. Their numbers are held to be the same."""

import copy
from typing import Any

import torch

import models
from ranks import run_ranks

LOSS_TOLERANCE = 1e-6  # relative; float32 sums in another order
GRADIENT_TOLERANCE = 1e-5  # relative L2 per parameter, for the same reason


def train_once(rank: int, world_size: int, case: dict[str, Any]) -> dict[str, Any]:
    """One forward and backward of a model through autoseq and on one device; the differences, as this rank sees them.

    The rewritten graph runs as it is unless the case asks for more: AOTAutograd takes two thirds of a compilation, and is torch's.
    """
    model = models.make(case["model"], **case.get("changes", {}))
    oracle = copy.deepcopy(model)
    kwargs = models.batch(case["model"], **case["batch"])
    kwargs.update(case.get("extra", {}))
    options = {"inner": "eager", **case.get("options", {})}
    loss, logits = models.loss_and_logits(torch.compile(model, backend="autoseq", options=options)(**kwargs))
    expected_loss, expected_logits = models.loss_and_logits(oracle(**kwargs))
    loss.backward()
    expected_loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {
        "loss": abs(loss.item() - expected_loss.item()) / abs(expected_loss.item()),
        "logits": relative(logits.detach() + 0, expected_logits.detach()),
        "gradients": {name: relative(gradients[name], p.grad) for name, p in oracle.named_parameters()},
        "sums": {name: g.double().sum().item() for name, g in gradients.items()},
        "type": type(logits).__name__,
    }


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def check_same_numbers(case: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    results = run_ranks(train_once, world_size, case)
    for result in results:
        assert result["loss"] <= LOSS_TOLERANCE
        assert result["logits"] <= GRADIENT_TOLERANCE
        worst = max(result["gradients"].items(), key=lambda item: item[1])
        assert worst[1] <= GRADIENT_TOLERANCE, worst
        assert result["sums"] == results[0]["sums"], "gradients differ between ranks"
    return results
