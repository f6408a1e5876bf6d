"""Copies of the data beside the sequence: each has batches of its own, and FSDP, DDP and ZeRO-1 bring them together, as on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import models
from autoseq.plan_model import look_at
from autoseq.planning.degrees import Split, candidates
from autoseq.planning.presets import load_topology
from autoseq.runtime.counting import counters, reset_counters
from ranks import run_ranks
from training_job import GRADIENT_TOLERANCE, LOSS_TOLERANCE, relative

# The logits are a transposed view, and FSDP warns of writing into it, which nothing here does.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")

COPIES, STEPS = 2, 2


def copies_and_sequence() -> DeviceMesh:
    return init_device_mesh("cpu", (COPIES, 2), mesh_dim_names=("data", "sequence"))


def batches() -> Tensor:
    """Ids of each step and copy: [steps, copies, 2, 23]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, models.VOCABULARY, (STEPS, COPIES, 2, 23), generator=generator)


def adam(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **ADAM)


# A large eps, or the sign of a gradient near zero, which is rounding, would decide on a whole step.
ADAM = {"lr": 1e-2, "eps": 1e-2}


def errors_of_training(
    compiled: Callable[..., tuple[Tensor, Tensor]], model: nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh
) -> tuple[float, float, float]:
    """The largest errors of losses, gradients and parameters over the steps, beside one device that has the batches of all copies."""
    alone = models.make("plain")
    theirs = adam(alone.parameters())
    losses, gradients = [], []
    for ids in batches():
        optimizer.zero_grad()
        theirs.zero_grad()
        mine = ids[mesh.get_local_rank("data")]
        ours = compiled(mine, mine)[0]
        ours.backward()
        whole = ids.flatten(0, 1)
        expected = alone(whole, whole)[0]
        expected.backward()
        mean = ours.detach().clone()
        dist.all_reduce(mean, group=mesh.get_group("data"))
        losses.append(relative(mean / COPIES, expected.detach()))
        gradients += differences([p.grad for p in model.parameters()], [p.grad for p in alone.parameters()])
        optimizer.step()
        theirs.step()
    return max(losses), max(gradients), max(differences([*model.parameters()], [*alone.parameters()]))


def differences(ours: list[Tensor], theirs: list[Tensor]) -> list[float]:
    whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in ours]
    return [relative(x.detach(), y.detach()) for x, y in zip(whole, theirs, strict=True)]


def check(errors: list[tuple[float, float, float]]) -> None:
    for loss, gradient, parameter in errors:
        assert loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE and parameter <= GRADIENT_TOLERANCE


SHARDED_OVER: dict[str, Callable[[DeviceMesh], DeviceMesh]] = {
    "the copies of the data": lambda mesh: mesh["data"],
    "all ranks": lambda mesh: init_device_mesh("cpu", (mesh.size(),)),
    "the sequence, and kept by each copy": lambda mesh: mesh,
}


def train_sharded(rank: int, world_size: int, over: str, by_block: bool) -> tuple[float, float, float]:
    mesh, model = copies_and_sequence(), models.make("plain")
    for part in (*model.blocks, model) if by_block else (model,):  # type: ignore[misc]
        fully_shard(part, mesh=SHARDED_OVER[over](mesh))
    compiled = torch.compile(model, backend="autoseq", options={"inner": "aot_eager", "mesh": mesh["sequence"]})
    return errors_of_training(compiled, model, adam(model.parameters()), mesh)


CASES = [
    pytest.param("the copies of the data", False, id="the model at once, over the copies of the data"),
    *(pytest.param(over, True, id=f"block by block, over {over}") for over in SHARDED_OVER),
]


@pytest.mark.parametrize(("over", "by_block"), CASES)
def test_fsdp_with_copies_of_the_data_trains_as_one_device(over: str, by_block: bool) -> None:
    check(run_ranks(train_sharded, 4, over, by_block))


def train_with_zero(rank: int, world_size: int) -> tuple[float, float, float]:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # torch warns when it is imported, which is an error in the tests

    mesh, model = copies_and_sequence(), models.make("plain")
    compiled = torch.compile(model, backend="autoseq", options={"inner": "aot_eager", "mesh": mesh["sequence"]})
    copies = mesh.get_group("data")
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, process_group=copies, **ADAM)
    return errors_of_training(DistributedDataParallel(compiled, process_group=copies), model, optimizer, mesh)


def test_zero_1_and_ddp_with_copies_of_the_data_train_as_one_device() -> None:
    check(run_ranks(train_with_zero, 4))


def train_with_buckets(rank: int, world_size: int, megabytes: float) -> tuple[int, tuple[float, float, float]]:
    """The number of buckets that DDP sends in the last step, and the errors of training."""
    mesh, model = copies_and_sequence(), models.make("plain")
    compiled = torch.compile(model, backend="autoseq", options={"inner": "aot_eager", "mesh": mesh["sequence"]})
    sent: list[int] = []

    def note(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sent.append(bucket.index())
        return allreduce_hook(group, bucket)

    note.__annotations__ |= {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # DDP compares them, and here they are text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)  # it may be no larger than the others
        replicated = DistributedDataParallel(compiled, process_group=mesh.get_group("data"), bucket_cap_mb=megabytes)
        replicated.register_comm_hook(mesh.get_group("data"), note)
        errors = errors_of_training(replicated, model, adam(model.parameters()), mesh)
    return max(sent) + 1, errors


@pytest.mark.parametrize(("count", "megabytes"), [(2, 0.12), (4, 0.02)])
def test_ddp_with_several_buckets_trains_as_one_device(count: int, megabytes: float) -> None:
    """Dynamo would split the program where a bucket is full; no setting of Dynamo's is needed, and none is changed for other models."""
    counts, errors = zip(*run_ranks(train_with_buckets, 4, megabytes), strict=True)
    assert min(counts) == max(counts) >= count and torch._dynamo.config.optimize_ddp is True
    check(list(errors))


LENGTH = 32


def count_a_step(rank: int, world_size: int) -> int:
    """The bytes of a step with two ranks a sequence and DDP over the copies."""
    mesh, model = copies_and_sequence(), models.make("llama")
    options = {"inner": "aot_eager", "mesh": mesh["sequence"], "strategy": "ring", "layout": "contiguous"}
    compiled = torch.compile(model, backend="autoseq", options=options)
    # Tables of rotary angles are alike everywhere; no plan counts that they are sent.
    replicated = DistributedDataParallel(compiled, process_group=mesh.get_group("data"), broadcast_buffers=False)
    batch = dict(models.batch("llama", batch_size=1, length=LENGTH))
    for _ in range(3):  # the first compiles, and after it DDP arranges its buckets anew
        reset_counters()
        models.loss_and_logits(replicated(**batch))[0].backward()
    return sum(size for _, size in counters().values())


def test_a_plan_with_copies_of_the_data_has_the_bytes_that_ranks_send() -> None:
    """Gradients are summed over the sequence, and then over the copies."""

    def make() -> tuple[nn.Module, dict[str, object]]:
        return models.make("llama"), dict(models.batch("llama", batch_size=COPIES, length=LENGTH))

    asked = look_at(make, batch=COPIES, seq_len=LENGTH, world_size=4)
    found = candidates(asked, 4, load_topology("8xH100"), strategy="ring", layout="contiguous")
    planned = next(each for each in found if each.split == Split(COPIES, 2))
    assert planned.sent_bytes == max(run_ranks(count_a_step, 4, backend="autoseq_counted"))
