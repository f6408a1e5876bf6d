"""Models that Dynamo traces in several parts: what passes between the parts is counted, planned for and told, as on real ranks."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import models
from autoseq.cli import app
from autoseq.inspection import inspect_model, with_programs
from autoseq.node_traffic import node_traffic
from autoseq.options import Options
from autoseq.plan_model import look_at
from autoseq.planning.gathered import gathers
from autoseq.planning.model_cost import model_cost
from autoseq.planning.training import Training, memory_besides_attention
from autoseq.runtime.counting import counters, reset_counters
from inspected_models import OneAttention, break_graph
from ranks import run_ranks

LENGTH, WIDE = 24, 64


class Broken(nn.Module):
    """Two parts with attention, and a head and a loss in a third without."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = OneAttention(), OneAttention(), nn.Linear(8, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        y = break_graph(self.a(x))
        y = break_graph(self.b(y))
        return F.gelu(self.head(y)).square().mean()


class EagerBetween(nn.Module):
    """Python between two parts reads values; the second part has them then."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = OneAttention(), OneAttention()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = _scaled(y)
        return self.b(y).square().mean()


@torch.compiler.disable
def _scaled(y: Tensor) -> Tensor:
    return y * 2


def make(model: type[nn.Module] = Broken, batch: int = 1, seq_len: int = LENGTH) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return model(), {"x": torch.randn(batch, seq_len, 8)}


def train(rank: int, world_size: int, model: type[nn.Module]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """What a step sends, and what compiling warns of."""
    warned: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warned.append(record.getMessage())

    handler = Keep(level=logging.WARNING)
    logging.getLogger("autoseq").addHandler(handler)
    module, kwargs = make(model)
    compiled = torch.compile(module, backend="autoseq", options={"inner": "aot_eager", "strategy": "ring"})
    compiled(**kwargs).backward()
    reset_counters()
    compiled(**kwargs).backward()
    logging.getLogger("autoseq").removeHandler(handler)
    return counters(), warned


@pytest.mark.parametrize("model", [Broken, EagerBetween], ids=["a part without attention", "Python between the parts"])
def test_inspect_counts_and_tells_what_ranks_send_and_warn_of(model: type[nn.Module]) -> None:
    found = inspect_model(lambda: make(model), seq_len=LENGTH, world_size=2, strategy="ring")
    sent, warned = run_ranks(train, 2, model, backend="autoseq_counted")[0]
    assert {op: (count.messages, count.bytes) for op, count in found.collectives.items()} == sent
    assert len(warned) == len(found.fallbacks)
    for line, fallback in zip(warned, found.fallbacks, strict=True):
        assert f"{fallback.bytes_per_rank:,} bytes a rank" in line
        assert "the program was traced in several parts" in line and "the program was traced in several parts" in fallback.reason


def test_what_is_gathered_between_parts_stands_at_the_node_that_made_it() -> None:
    def look(programs: Any) -> list[list[str]]:
        return [[op for sent in node_traffic(program, 2).values() for op in sent.forward] for program in programs]

    a, b, head = with_programs(make, look, world_size=2, options=Options(strategy="ring"))
    assert "all_gather" in a and "all_gather" in b
    assert head == []  # it runs whole


@pytest.fixture(scope="module")
def training() -> Training:
    return look_at(make, batch=1, seq_len=LENGTH, world_size=8)


def test_a_plan_has_the_parameters_products_and_gathers_of_every_part(training: Training) -> None:
    assert training.cost.parameters == sum(p.numel() for p in Broken().parameters())
    assert gathers(training.cost)
    of_head = 2 * LENGTH * 8 * WIDE
    of_attentions = 2 * (LENGTH // 8) * 2 * (8 * 24 + 8 * 8)
    products = dict(training.cost_on(8).forward.flops)["float32"]
    assert products * (LENGTH // 8) // training.cost.tokens == of_head + of_attentions  # the head's are the same on each of 8 ranks
    (gathered,) = training.cost_on(8).exchanged
    # What a and b make, and in the backward the gradient of what b got.
    assert gathered.full_bytes * (LENGTH // 8) // training.cost.tokens == 3 * LENGTH * 8 * 4


def test_a_plan_calculates_for_eight_ranks_what_a_look_at_eight_finds(training: Training) -> None:
    seen = with_programs(make, lambda programs: model_cost(programs, world_size=8), world_size=8, options=Options(layout="contiguous"))
    calculated = training.cost_on(8)
    times = calculated.tokens // seen.tokens
    assert (calculated.kept_bytes, calculated.largest_bytes) == (times * seen.kept_bytes, times * seen.largest_bytes)
    assert calculated.gathered_bytes == times * seen.gathered_bytes == times * LENGTH * 8 * 4
    assert memory_besides_attention(training, LENGTH // 8, 8, 8).gathered == LENGTH * 8 * 4


def test_the_plan_command_says_once_what_a_run_warns_of() -> None:
    shown = CliRunner().invoke(app, ["plan", f"{__file__}:make", "--seq-len", "64", "--world-size", "8", "--topology", "8xH100"])
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.count("a part without attention runs whole on every rank") == 1
    assert shown.stdout.count("the part that reads what is made at") == 1
    assert "; 1.79 kB sent a rank" in shown.stdout  # 7 of 8 shards of 64 rows of 8 float32


# Rows that lie elsewhere ----------------------------------------------------------------------------------------------


def test_labels_that_are_the_inputs_themselves_need_no_gather() -> None:
    """Padded by one and cut again they are no sequence of another length that the logits would have to follow."""

    def language_model() -> tuple[nn.Module, dict[str, Any]]:
        ids = torch.zeros(1, LENGTH, dtype=torch.long)
        return models.make("llama").train(), {"input_ids": ids, "labels": ids}

    found = inspect_model(language_model, seq_len=LENGTH, world_size=2)
    assert "all_gather" not in found.collectives
    assert found.fallbacks == []


class Pairs(nn.Module):
    """Attention over rows, then over pairs of them: both halves of a pair have to be on the same rank."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.join, self.b = OneAttention(), nn.Linear(16, 8), OneAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.join(self.a(x).unflatten(1, (-1, 2)).flatten(2)))


def test_rows_that_are_gathered_to_be_cut_up_otherwise_are_a_fallback() -> None:
    found = inspect_model(lambda: (Pairs(), {"x": torch.randn(1, 18, 8)}), seq_len=18, world_size=2, layout="contiguous")
    (fallback,) = found.fallbacks
    assert "cut up as those of another sequence" in fallback.reason
    assert fallback.bytes_per_rank == 9 * 8 * 4
