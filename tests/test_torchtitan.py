"""examples/torchtitan_parallelize.py against a stand-in of torchtitan 0.3's interface; what torchtitan needs is not installed here.

The stand-in does what its Trainer does (trainer.py of 0.3.0): the model on the meta device, `parallelize_fn` by keywords, `to_empty` and
weights afterwards, a loss outside the model that is summed and divided by the tokens of all copies, and the same batch along "tp".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import autoseq
from autoseq.target import load_target
from ranks import run_ranks

EXAMPLES = Path(__file__).parent.parent / "examples"
TOLERANCE = 1e-6  # relative L2 of a weight after SGD in float32, whose sums run in another order
STEPS, ROWS, LENGTH = 2, 4, 24


class ParallelDims:
    """As much of torchtitan's as a `parallelize_fn` asks: meshes by name, None where a dim has one rank."""

    dp_replicate = cp = pp = 1

    def __init__(self, mesh: DeviceMesh) -> None:
        self._meshes = {"fsdp": mesh["data"], "tp": mesh["sequence"]}

    def get_optional_mesh(self, dim: str) -> DeviceMesh | None:
        return self._meshes[dim] if self._meshes[dim].size() > 1 else None

    def get_mesh(self, dim: str) -> DeviceMesh:
        return self._meshes[dim]


class Logits(nn.Module):
    """A model that returns logits alone, as torchtitan's do."""

    def __init__(self) -> None:
        super().__init__()
        self.model, _ = load_target("examples/plain_gpt.py:tiny").make(batch=1, seq_len=LENGTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)[0]

    def init_weights(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            local = parameter.data
            whole = torch.randn(parameter.shape, generator=generator) * 0.05
            if isinstance(local, DTensor):
                rows = local.to_local()
                start = local.device_mesh.get_local_rank() * -(-whole.shape[0] // local.device_mesh.size())
                rows.copy_(whole[start : start + rows.shape[0]])
            else:
                local.copy_(whole)


def train(model: nn.Module, copy: int, copies: int, group: dist.ProcessGroup | None) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(STEPS):
        tokens = torch.randint(0, 256, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        labels = tokens[:, 1:].masked_fill(tokens[:, 1:] % 3 == 0, -100)
        valid = (labels != -100).sum()
        mine = slice(copy * ROWS // copies, (copy + 1) * ROWS // copies)
        logits = model(tokens[mine, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), labels[mine].flatten(), ignore_index=-100, reduction="sum") / valid
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if group is not None:
            dist.all_reduce(total, group=group)
        losses.append(total.item())
    return losses


def example() -> Callable[..., nn.Module]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        from torchtitan_parallelize import parallelize  # type: ignore[import-not-found]

        sys.modules.pop("torchtitan_parallelize")
    return parallelize


@pytest.mark.parametrize("dim", ["dp_replicate", "cp", "pp"])
def test_the_parallelize_fn_refuses_other_dims(dim: str) -> None:
    dims = SimpleNamespace(**{"dp_replicate": 1, "cp": 1, "pp": 1, dim: 2})
    with pytest.raises(ValueError, match=f"{dim} is 2: beside autoseq the ranks are dp_shard × tp"):
        example()(nn.Linear(1, 1), parallel_dims=dims)


def train_on_ranks(rank: int, world_size: int, sequence: int) -> tuple[list[float], dict[str, Tensor]]:
    parallelize, mesh = example(), autoseq.sequence_mesh(sequence)
    with torch.device("meta"):
        model = Logits()
    model = parallelize(model, parallel_dims=ParallelDims(mesh), training=None, parallelism=None, compile_config=None, ac_config=None,
                        dump_folder="", inner="eager")  # fmt: skip
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights()
    losses = train(model.train(), mesh["data"].get_local_rank(), mesh["data"].size(), mesh["data"].get_group())
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return losses, {name: p.detach().clone() for name, p in whole.items()}


def train_alone(rank: int, world_size: int) -> tuple[list[float], dict[str, Tensor]]:
    model = Logits()
    with torch.no_grad():
        model.init_weights()
    return train(model, 0, 1, None), dict(model.named_parameters())


@pytest.mark.parametrize(("ranks", "sequence"), [(2, 2), (4, 2)], ids=["two ranks of a sequence", "2 × 2, with FSDP over the copies"])
def test_the_parallelize_fn_trains_as_one_device(ranks: int, sequence: int) -> None:
    ((losses, weights),) = run_ranks(train_alone, 1)
    for ours, split in run_ranks(train_on_ranks, ranks, sequence):
        assert ours == pytest.approx(losses, rel=1e-5)
        for name, weight in weights.items():
            assert (split[name] - weight).norm() <= TOLERANCE * weight.norm(), name
