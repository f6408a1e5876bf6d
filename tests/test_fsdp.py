"""Parameters sharded by FSDP over the ranks of the sequence itself: the gradients are one device's, each rank holds its share of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import models
from autoseq.plan_model import look_at
from autoseq.planning.degrees import Split, candidates
from autoseq.planning.presets import load_topology
from autoseq.runtime.counting import counters, reset_counters
from ranks import run_ranks
from training_job import GRADIENT_TOLERANCE, LOSS_TOLERANCE

# The logits are a transposed view, and FSDP warns of writing into it, which nothing here does.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")


BATCH, LENGTH = 1, 32


def sharded_model(world_size: int, by_block: bool, summed_by_fsdp: bool) -> tuple[nn.Module, Callable[..., tuple[Tensor, Tensor]]]:
    """A model whose parameters are shards, and the same compiled."""
    model = models.make("plain")
    mesh = init_device_mesh("cpu", (world_size,))
    for part in (*model.blocks, model) if by_block else (model,):  # type: ignore[misc]
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        if summed_by_fsdp:
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other with a factor of one's own
    options = {"inner": "aot_eager", "strategy": "ring", "layout": "contiguous", "grad_sync": "none" if summed_by_fsdp else "sequence"}
    return model, torch.compile(model, backend="autoseq", options=options)


def train(rank: int, world_size: int, by_block: bool, summed_by_fsdp: bool) -> tuple[float, float, list[bool]]:
    """The errors of the loss and of the worst gradient beside one device, and which gradients are shards."""
    alone = models.make("plain")
    model, compiled = sharded_model(world_size, by_block, summed_by_fsdp)
    batch = dict(models.batch("plain", batch_size=BATCH, length=LENGTH))
    ours, theirs = (models.loss_and_logits(each(**batch))[0] for each in (compiled, alone))
    ours.backward()
    theirs.backward()
    errors, sharded = [], []
    for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
        sharded.append(isinstance(mine.grad, DTensor) and mine.grad.to_local().numel() < mine.numel())
        whole = mine.grad.full_tensor() if isinstance(mine.grad, DTensor) else mine.grad
        assert whole is not None and other.grad is not None
        errors.append(float((whole - other.grad).norm() / other.grad.norm()))
    return float((ours - theirs).detach().abs() / theirs.detach()), max(errors), sharded


CASES = [
    pytest.param(False, False, id="the model at once"),
    pytest.param(True, False, id="block by block"),
    pytest.param(False, True, id="the model at once, gradients that only FSDP sums"),
]


@pytest.mark.parametrize(("by_block", "summed_by_fsdp"), CASES)
def test_gradients_of_sharded_parameters_are_those_of_one_device(by_block: bool, summed_by_fsdp: bool) -> None:
    for loss, gradient, sharded in run_ranks(train, 2, by_block, summed_by_fsdp):
        assert loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE
        assert all(sharded)


def count_a_step(rank: int, world_size: int) -> list[int]:
    """The bytes of a step in which autoseq sums gradients and FSDP again, and of one in which only FSDP does."""
    sent = []
    for summed_by_fsdp in (False, True):
        torch._dynamo.reset()
        _, compiled = sharded_model(world_size, False, summed_by_fsdp)
        batch = dict(models.batch("plain", batch_size=BATCH, length=LENGTH))
        for _ in range(2):  # the first compiles
            reset_counters()
            models.loss_and_logits(compiled(**batch))[0].backward()
        sent.append(sum(size for _, size in counters().values()))
    return sent


def test_a_plan_for_sharded_parameters_has_the_bytes_that_ranks_send() -> None:
    def make() -> tuple[nn.Module, dict[str, object]]:
        return models.make("plain"), dict(models.batch("plain", batch_size=BATCH, length=LENGTH))

    asked = look_at(make, batch=BATCH, seq_len=LENGTH, world_size=2, shard_parameters=True)
    found = candidates(asked, 2, load_topology("8xH100"), strategy="ring", layout="contiguous")
    planned = next(each for each in found if each.split == Split(1, 2))
    twice, once = (max(sent) for sent in zip(*run_ranks(count_a_step, 2, backend="autoseq_counted"), strict=True))
    assert planned.sent_bytes == twice
    # Learned positions come to each rank as whole gradients: of all others it is the sum over two ranks that is spared.
    positions = 128 * 32 * 4
    assert twice - once == asked.cost.gradient_bytes - positions
