"""transformers' captured outputs, hidden states and router logits, in one program."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import autoseq
import models
from autoseq import backend
from ranks import run_ranks
from training_job import GRADIENT_TOLERANCE, LOSS_TOLERANCE, relative


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**models._DECODER, num_local_experts=4))  # type: ignore[arg-type]


CASES: dict[str, tuple[Any, str]] = {"llama": (models.llama, "hidden_states"), "mixtral": (mixtral, "router_logits")}


def capture(rank: int, world_size: int, name: str) -> tuple[int, list[str], list[float], float, list[float]]:
    """The number of programs, kinds of outputs, errors of captured outputs, of the loss and of gradients."""
    make, captured = CASES[name]
    torch.manual_seed(0)
    model = make()
    oracle = copy.deepcopy(model)
    programs: list[Any] = []
    build = backend.build_program
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "build_program", lambda *args, **kwargs: programs.append(build(*args, **kwargs)) or programs[-1])
        ids = torch.randint(0, models.VOCABULARY, (2, 21))
        kwargs = {"input_ids": ids, "labels": ids, "use_cache": False, f"output_{captured}": True}
        ours, theirs = autoseq.parallelize(model, inner="eager")(**kwargs), oracle(**kwargs)
    ours.loss.backward()
    theirs.loss.backward()
    pairs = list(zip(ours[captured], theirs[captured], strict=True))
    errors = [relative(x.detach() + 0, y.detach()) for x, y in pairs]
    gradients = [relative(x.grad, y.grad) for x, y in zip(model.parameters(), oracle.parameters(), strict=True)]
    return len(programs), [type(x).__name__ for x, _ in pairs], errors, relative(ours.loss.detach(), theirs.loss.detach()), gradients


@pytest.mark.parametrize("name", CASES)
def test_captured_outputs_are_one_devices_and_of_one_program(name: str) -> None:
    for programs, kinds, errors, loss, gradients in run_ranks(capture, 2, name):
        assert programs == 1 and kinds == ["DeferredTensor"] * len(kinds) and len(kinds) >= 2
        assert loss <= LOSS_TOLERANCE and max(errors) <= GRADIENT_TOLERANCE and max(gradients) <= GRADIENT_TOLERANCE


def test_hooks_that_are_there_already_are_not_installed_again() -> None:
    model = models.llama(num_hidden_layers=1)

    def hooks() -> list[int]:
        return [len(module._forward_hooks) for module in model.modules()]

    model(torch.zeros(1, 4, dtype=torch.long), output_hidden_states=True)
    before = hooks()
    autoseq.parallelize(model, inner="eager")
    assert hooks() == before and sum(before) > 0
    fresh = autoseq.parallelize(models.llama(num_hidden_layers=1), inner="eager")
    assert [len(module._forward_hooks) for module in fresh.modules()] == before
