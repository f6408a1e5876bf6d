"""The lines that `autoseq plan` prints, executed on ranks as they are copied: they train as one device does with the whole batch."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from autoseq import backend
from autoseq.plan_call import ALONE, lines_of
from autoseq.plan_model import Planned, look_at
from autoseq.plan_report import print_plan
from autoseq.planning.degrees import Split, candidates
from autoseq.planning.presets import load_topology
from autoseq.target import load_target
from ranks import run_ranks
from training_job import relative

TINY = load_target("examples/plain_gpt.py:tiny")
BATCH, LENGTH, STEPS = 4, 24, 2
TOPOLOGY = load_topology("4xA10")
# Of weights after two steps of SGD in float32, whose sums run in another order.
TOLERANCE = 1e-6


def printed_lines(split: Split, strategy: str, shard_parameters: bool = False) -> list[str]:
    """What is printed for this split, whatever would be fastest."""
    training = look_at(partial(TINY.make, batch=BATCH, seq_len=LENGTH), batch=BATCH, seq_len=LENGTH, world_size=split.ranks,
                       shard_parameters=shard_parameters)  # fmt: skip
    found = candidates(training, split.ranks, TOPOLOGY, strategy=strategy)
    chosen = next(each for each in found if each.split == split)
    out = Console(width=80, file=io.StringIO(), markup=False, highlight=False, soft_wrap=True)
    print_plan(out, Planned(training, split.ranks, TOPOLOGY, 0, (chosen,)), given="4xA10", formulas=False)
    _, _, after = out.file.getvalue().partition("To run the first, ")  # type: ignore[attr-defined]
    return [line.strip() for line in itertools.takewhile(lambda line: line.startswith("    "), after.splitlines()[1:])]


@contextlib.contextmanager
def without_inductor() -> Iterator[None]:
    """The printed options leave the inner compiler to its default, which takes minutes of a C++ compiler."""
    plain = backend._inner
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_inner", lambda gm, fake, options, *others: plain(gm, fake, replace(options, inner="aot_eager"), *others))
        yield


def train(model: nn.Module, loader: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for ids, targets in loader:
        model(ids, targets)[1].backward()
        optimizer.step()
        optimizer.zero_grad()


def errors_after_training(rank: int, world_size: int, lines: list[str]) -> list[float]:
    """Of each weight, beside one device that trains on the whole batches in the sampler's order."""
    model, _ = TINY.make(batch=1, seq_len=LENGTH)
    alone = copy.deepcopy(model)
    ids = torch.randint(0, 256, (BATCH * STEPS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    dataset = TensorDataset(ids[:, :-1], ids[:, 1:])
    names: dict[str, Any] = {"model": model, "dataset": dataset}
    with without_inductor():
        exec("\n".join(lines), names)
        train(names["model"], names["loader"])
    train(alone, DataLoader(dataset, batch_size=BATCH, sampler=DistributedSampler(dataset, num_replicas=1, rank=0)))
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [relative(mine.detach(), theirs.detach()) for mine, theirs in zip(whole, alone.parameters(), strict=True)]


CASES = [
    pytest.param(Split(2, 2), "ring", False, id="copies of the data, with DDP"),
    pytest.param(Split(1, 4, (2, 2)), "hybrid", False, id="one sequence on two levels"),
    pytest.param(Split(2, 2), "ulysses", True, id="copies of the data, with FSDP over all ranks"),
]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.parametrize(("split", "strategy", "shard_parameters"), CASES)
def test_the_printed_lines_train_as_one_device(split: Split, strategy: str, shard_parameters: bool) -> None:
    lines = printed_lines(split, strategy, shard_parameters)
    for errors in run_ranks(errors_after_training, split.ranks, lines):
        assert max(errors) <= TOLERANCE


def test_the_lines_name_the_mesh_the_sampler_ddp_and_the_compilation() -> None:
    assert printed_lines(Split(2, 2), "ring") == [
        "import autoseq, torch",
        "mesh = autoseq.sequence_mesh(2)",
        'sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=mesh["data"].size(), rank=mesh["data"].get_local_rank())',
        "loader = torch.utils.data.DataLoader(dataset, batch_size=2, sampler=sampler)",
        'model = torch.compile(model, backend="autoseq", options={"mesh": mesh["sequence"], "strategy": "ring", "layout": "contiguous"})',
        'model = torch.nn.parallel.DistributedDataParallel(model, process_group=mesh["data"].get_group(), gradient_as_bucket_view=True)',
    ]


def test_with_one_rank_a_sequence_the_lines_say_to_do_without_autoseq() -> None:
    training = look_at(partial(TINY.make, batch=BATCH, seq_len=LENGTH), batch=BATCH, seq_len=LENGTH, world_size=2)
    found = candidates(training, 2, TOPOLOGY)
    assert lines_of(next(each for each in found if each.split == Split(2, 1)), training, "4xA10") == [ALONE]
