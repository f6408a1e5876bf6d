"""Parameters sharded by FSDP over the ranks of the sequence itself: the gradients are one device's, each rank holds its share of them."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import models
from ranks import run_ranks
from training_job import GRADIENT_TOLERANCE, LOSS_TOLERANCE

# The logits are a transposed view, and FSDP warns of writing into it, which nothing here does.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")


def train(rank: int, world_size: int, by_block: bool) -> tuple[float, float, list[bool]]:
    """The errors of the loss and of the worst gradient beside one device, and which gradients are shards."""
    alone, model = models.make("plain"), models.make("plain")
    model.load_state_dict(alone.state_dict())
    mesh = init_device_mesh("cpu", (world_size,))
    for block in model.blocks if by_block else ():  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    compiled = torch.compile(model, backend="autoseq", options={"inner": "aot_eager"})
    batch = dict(models.batch("plain", batch_size=1, length=32))
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


@pytest.mark.parametrize("by_block", [False, True], ids=["the model at once", "block by block"])
def test_gradients_of_sharded_parameters_are_those_of_one_device(by_block: bool) -> None:
    for loss, gradient, sharded in run_ranks(train, 2, by_block):
        assert loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE
        assert all(sharded)
