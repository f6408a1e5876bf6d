"""What a part of a model gets of the parts before it: values that were gathered already, and strided views of them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autoseq.inspection import inspect_model
from autoseq.program import READS_BETWEEN
from inspected_models import OneAttention, break_graph
from ranks import run_ranks
from test_broken_models import LENGTH, make, train
from training_job import GRADIENT_TOLERANCE, relative


class ReadTwice(nn.Module):
    """Two later parts read what the first makes; the last one reads it as two of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = OneAttention(), OneAttention(), OneAttention()

    def forward(self, x: Tensor) -> Tensor:
        y = break_graph(self.a(x))
        z = break_graph(self.b(y))
        return (self.c(y + z) * y).square().mean()


def test_a_value_that_several_parts_read_is_sent_and_warned_of_once() -> None:
    found = inspect_model(lambda: make(ReadTwice), seq_len=LENGTH, world_size=2, strategy="ring")
    sent, warned = run_ranks(train, 2, ReadTwice, backend="autoseq_counted")[0]
    assert {op: (count.messages, count.bytes) for op, count in found.collectives.items()} == sent
    # y and z: to one other rank goes a shard of each.
    gathered = [each.shard_bytes for program in found.programs for each in program.gathered]
    assert gathered == [LENGTH // 2 * 8 * 4] * 2
    assert [fallback.bytes_per_rank for fallback in found.fallbacks] == gathered
    assert len(warned) == 2 and all(f"; {sent:,} bytes a rank" in line for sent, line in zip(gathered, warned, strict=True))


# Views that Python takes between the parts ----------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "fewer rows": lambda y: y[:, 1:],
    "every second row": lambda y: y[:, ::2],
}


@torch.compiler.disable
def viewed(view: str, y: Tensor) -> Tensor:
    return VIEWS[view](y)


class Viewed(nn.Module):
    """Each layer has fewer rows than the one before it, so that their shared code is compiled for any number of rows."""

    def __init__(self, view: str) -> None:
        super().__init__()
        self.layers, self.name = nn.ModuleList(OneAttention() for _ in range(3)), view

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = viewed(self.name, layer(x))
            torch._dynamo.graph_break()
        return x.square().mean()


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_an_earlier_parts_output_has_symbolic_sizes_of_its_own(view: str) -> None:
    found = inspect_model(lambda: make(lambda: Viewed(view)), seq_len=LENGTH, world_size=2, strategy="ring")
    assert len(found.sites) == 3
    assert [fallback.op for fallback in found.fallbacks] == [READS_BETWEEN] * 3  # the views are taken by Python, of each layer's output
    _, second, third = found.programs
    assert second.before is third.before


def train_viewed(rank: int, world_size: int, view: str) -> float:
    model, kwargs = make(lambda: Viewed(view), batch=2)
    alone = copy.deepcopy(model)
    compiled = torch.compile(model, backend="autoseq", options={"inner": "eager", "strategy": "ring"})
    for each in (compiled, alone):
        each(**kwargs).backward()
    return max(relative(mine.grad, its.grad) for mine, its in zip(model.parameters(), alone.parameters(), strict=True))


def test_views_of_an_earlier_parts_output_give_one_devices_gradients() -> None:
    assert max(run_ranks(train_viewed, 2, "every second row")) <= GRADIENT_TOLERANCE
