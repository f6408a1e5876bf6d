"""examples/train_data_and_sequence.py on 2 × 2 ranks beside the same script under DDP alone, and what docs/port_a_script.md says of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

import autoseq
from ranks import run_ranks

SCRIPT = Path(__file__).parent.parent / "examples" / "train_data_and_sequence.py"
# Relative; float32 sums run in another order.
TOLERANCES = {"SGD": 1e-6, "AdamW": 1e-5}


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_data_and_sequence", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(rank: int, world_size: int, options: list[str]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """All numbers that are logged, and the final weights."""
    log, valid, model = script().train(options)
    assert not any(key.startswith("_orig_mod") for key in model.state_dict()), "a checkpoint's names are one device's"
    return [*(number for step in log for number in step), valid], model.state_dict()


def check(ours: list[Any], theirs: list[Any], tolerance: float) -> None:
    for rank in ours:
        assert rank[0] == pytest.approx(theirs[0][0], rel=1e-5), "logged losses and norms"
        for name, weight in theirs[0][1].items():
            assert (rank[1][name] - weight).norm() <= tolerance * weight.norm(), name


@pytest.mark.parametrize("optimizer", TOLERANCES)
def test_two_by_two_ranks_train_as_two_processes_of_ddp(optimizer: str) -> None:
    """Without dropout, whose draws depend on the compiler."""
    options = ["--optimizer", optimizer, "--inner", "eager", "--steps", "3", "--dropout", "0"]
    expected = run_ranks(train, 2, [*options, "--sequence", "0"])
    check(run_ranks(train, 4, [*options, "--sequence", "2"]), expected, TOLERANCES[optimizer])


def test_two_by_two_ranks_are_one_process_that_accumulates_twice_as_often() -> None:
    """Copies take the rows in turns, so two steps of single rows are those of one process with as many rows a step."""
    options = ["--optimizer", "SGD", "--inner", "eager", "--steps", "2", "--dropout", "0", "--batch", "1", "--accumulation"]
    expected = run_ranks(train, 1, [*options, "4", "--sequence", "0"])
    check(run_ranks(train, 4, [*options, "2", "--sequence", "2"]), expected, TOLERANCES["SGD"])


def test_a_resumed_run_is_the_one_that_went_on_with_its_dropout_too(tmp_path: Path) -> None:
    options, written = ["--inner", "eager", "--sequence", "2", "--steps"], ["--checkpoint", str(tmp_path / "split.pt")]
    whole = run_ranks(train, 4, [*options, "3"])
    first = run_ranks(train, 4, [*options, "2", *written])
    second = run_ranks(train, 4, [*options, "3", *written])
    both = [([*before[:-1], *after], weights) for (before, _), (after, weights) in zip(first, second, strict=True)]
    check(both, whole, 0.0)


def draw_dropout(rank: int, world_size: int) -> float:
    """The loss of a rank's first batch, which is the same for all copies."""
    module = script()
    mesh = autoseq.sequence_mesh(2)
    torch.manual_seed(0)
    model = autoseq.parallelize(module.PackedGPT(32), mesh=mesh["sequence"], inner="eager")
    torch.manual_seed(1 + mesh["data"].get_local_rank())
    return model(*module.packed(2, 32, seed=1).tensors).item()


def test_dropout_agrees_in_a_sequence_and_differs_between_copies() -> None:
    first, second, third, fourth = run_ranks(draw_dropout, 4)
    assert first == second != third == fourth


def test_a_sampler_that_pads_counts_rows_twice_and_a_range_does_not() -> None:
    rows = range(7)
    padded = [row for copy in range(2) for row in DistributedSampler(rows, num_replicas=2, rank=copy, shuffle=False)]
    assert sorted(padded) == [0, *rows]
    batches = [DataLoader(rows, batch_size=2, sampler=range(copy, 7, 2)) for copy in range(2)]
    assert sorted(int(row) for loader in batches for batch in loader for row in batch) == [*rows]


class Augmented(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(())


def draws_of_workers(copy: int) -> list[float]:
    """What a random augmentation draws in a loader's own process, seeded as the page says."""
    torch.manual_seed(1 + copy)
    return [float(x) for x in DataLoader(Augmented(), batch_size=None, num_workers=1)]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_random_augmentation_agrees_in_a_sequence_and_differs_between_copies() -> None:
    assert draws_of_workers(0) == draws_of_workers(0) != draws_of_workers(1)
