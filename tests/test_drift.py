"""Copies of the data that nothing averages are warned of once they have drifted apart; every way to average them is left in peace."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import autoseq
import models
from autoseq import drift
from autoseq.runtime.errors import OptionError, RankMismatchError
from ranks import run_ranks

Call = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Training = Callable[[DeviceMesh], None]


def make(mesh: DeviceMesh, *, seed: int = 0, strict: bool = False) -> nn.Module:
    model = models.make("plain", layers=1)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return autoseq.parallelize(model, mesh=mesh["sequence"], inner="eager", strict=strict)


def train(
    model: Call, parameters: list[nn.Parameter], mesh: DeviceMesh, *, accumulation: int = 1, average: bool = False, same: bool = False,
    lr: float = 0.1,
) -> None:  # fmt: skip
    """Three steps on the copy's own batches."""
    copy = 0 if same else mesh["data"].get_local_rank()
    optimizer = torch.optim.SGD(parameters, lr=lr)
    generator = torch.Generator().manual_seed(copy)
    for _ in range(3):
        for _ in range(accumulation):
            ids = torch.randint(0, models.VOCABULARY, (1, 16), generator=generator)
            (model(ids, ids)[0] / accumulation).backward()
        for parameter in parameters if average else ():
            dist.all_reduce(parameter.grad, group=mesh["data"].get_group())
            parameter.grad /= mesh["data"].size()
        optimizer.step()
        optimizer.zero_grad()


def plain(mesh: DeviceMesh, *, seed: int = 0, strict: bool = False, **options: float) -> None:
    model = make(mesh, seed=seed, strict=strict)
    train(model, list(model.parameters()), mesh, **options)


def with_ddp(mesh: DeviceMesh) -> None:
    model = DistributedDataParallel(make(mesh), process_group=mesh["data"].get_group())
    train(model, list(model.parameters()), mesh)


def with_fsdp(mesh: DeviceMesh, over: DeviceMesh) -> None:
    model = make(mesh)
    fully_shard(model, mesh=over)
    train(model, list(model.parameters()), mesh)


def switched_off(mesh: DeviceMesh) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOSEQ_CHECK_COPIES", "0")
        plain(mesh)


WARNED: dict[str, Training] = {
    "nothing averages": plain,
    "nothing averages, and each step accumulates": lambda mesh: plain(mesh, accumulation=3),
    "small steps": lambda mesh: plain(mesh, lr=1e-5),
    "FSDP over the sequence alone": lambda mesh: with_fsdp(mesh, mesh["sequence"]),
}
SILENT: dict[str, Training] = {
    "DDP over the copies": with_ddp,
    "FSDP over the copies": lambda mesh: with_fsdp(mesh, mesh["data"]),
    "FSDP over the sequence, kept by each copy": lambda mesh: with_fsdp(mesh, mesh),
    "the loop's own all-reduce": lambda mesh: plain(mesh, average=True),
    "one with fewer batches a step on one copy": lambda mesh: plain(mesh, average=True, accumulation=2 + mesh["data"].get_local_rank()),
    "other models on the other ranks": lambda mesh: plain(mesh, seed=mesh["data"].get_local_rank()),
    "one batch for all": lambda mesh: plain(mesh, same=True),
    "switched off": switched_off,
}


def train_and_listen(rank: int, world_size: int) -> dict[str, list[str]]:
    """What this rank warns of drifting copies in each training."""
    mesh, said = autoseq.sequence_mesh(2), dict[str, list[str]]()
    handler, log = logging.Handler(), logging.getLogger("autoseq")
    log.addHandler(handler)
    for name, training in (WARNED | SILENT).items():
        heard = said[name] = []
        handler.emit = lambda record, heard=heard: heard.append(record.getMessage())  # type: ignore[method-assign]
        drift._warned.clear()
        torch._dynamo.reset()
        training(mesh)
        dist.barrier()
    log.removeHandler(handler)
    return {name: [each for each in heard if "drifted apart" in each] for name, heard in said.items()}


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    """Of all ranks."""
    everywhere = run_ranks(train_and_listen, 4)
    return {name: [each for ranks in everywhere for each in ranks[name]] for name in everywhere[0]}


@pytest.mark.parametrize("name", WARNED)
def test_copies_that_nothing_averages_are_warned_of(said: dict[str, list[str]], name: str) -> None:
    assert said[name] and len(said[name]) <= 2, "once by a copy"
    assert "on ranks 0 and 2 were equal" in said[name][0] or "on ranks 2 and 0 were equal" in said[name][0]
    assert 'process_group=mesh["data"].get_group()' in said[name][0] and "AUTOSEQ_CHECK_COPIES=0" in said[name][0]


@pytest.mark.parametrize("name", SILENT)
def test_no_way_to_average_copies_is_a_false_alarm(said: dict[str, list[str]], name: str) -> None:
    assert not said[name]


def train_strictly(rank: int, world_size: int) -> str:
    try:
        plain(autoseq.sequence_mesh(2), strict=True)
    except RankMismatchError as error:
        return str(error)
    return ""


def test_strict_ends_all_ranks_of_a_copy_that_has_drifted() -> None:
    """The copy that comes last finds out."""
    first, second = (set(pair) for pair in zip(*[iter(run_ranks(train_strictly, 4))] * 2, strict=True))
    assert len(first) == len(second) == 1, "the ranks of a sequence end alike"
    assert any("drifted apart: before call 2" in each for each in first | second)


def test_a_switch_that_is_neither_on_nor_off_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOSEQ_CHECK_COPIES", "no")
    with pytest.raises(OptionError, match="AUTOSEQ_CHECK_COPIES must be 0 or 1, got 'no'"):
        drift.is_enabled()
