"""Models with steps that see all rows: what is calculated for more ranks is what a look at them there finds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoseq.inspection import with_programs
from autoseq.options import Options
from autoseq.plan_model import look_at
from autoseq.planning.gathered import cost_on, gathers
from autoseq.planning.model_cost import ModelCost, model_cost
from autoseq.planning.training import Split, Training, memory_besides_attention
from joint_model import Joint

WIDTH, HEADS, LENGTH = 32, 2, 256


class Block(nn.Module):
    """Attention, and a step over all rows."""

    def __init__(self, *, sorts: bool) -> None:
        super().__init__()
        self.qkv, self.sorts = nn.Linear(WIDTH, 3 * WIDTH, bias=False), sorts

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.gelu(y) * torch.sort(y, dim=1).values if self.sorts else F.gelu(y)


class Model(nn.Module):
    def __init__(self, *, sorts: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(sorts=sorts), Block(sorts=sorts))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).sum()


def make(*, sorts: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    return Model(sorts=sorts), {"x": torch.randn(1, LENGTH, WIDTH)}


def looked_at_on(ranks: int) -> ModelCost:
    return with_programs(make, partial(model_cost, world_size=ranks), world_size=ranks, options=Options(layout="contiguous"))


@pytest.fixture(scope="module")
def training() -> Training:
    return look_at(make, batch=1, seq_len=LENGTH, world_size=8)


def test_two_looks_tell_what_a_third_would_find() -> None:
    calculated, seen = cost_on(8, looked_at_on(2), looked_at_on(4)), looked_at_on(8)
    assert [each.kind for each in seen.exchanged] == ["all_gather"]
    assert calculated.tokens == 4 * seen.tokens
    assert [(each.kind, each.full_bytes // 4, each.messages) for each in calculated.exchanged] == [
        (each.kind, each.full_bytes, each.messages) for each in seen.exchanged
    ]
    for name in ("forward", "backward"):
        of_calculated, of_seen = getattr(calculated, name), getattr(seen, name)
        assert of_calculated.growing_bytes == 4 * of_seen.growing_bytes
        assert of_calculated.flops == tuple((dtype, 4 * number) for dtype, number in of_seen.flops)
    assert (calculated.kept_bytes, calculated.largest_bytes) == (4 * seen.kept_bytes, 4 * seen.largest_bytes)


def test_what_is_gathered_does_not_shrink_with_more_ranks(training: Training) -> None:
    held = [memory_besides_attention(training, Split(1, P), "contiguous").activations for P in (2, 8, 64)]
    once = replace(training, cost_on_more=None)
    assert held[2] > memory_besides_attention(once, Split(1, 64), "contiguous").activations * 8
    assert held[0] > held[1] > held[2]


def test_rows_that_move_between_ranks_do_not_shrink_with_more_of_them() -> None:
    """Two sequences end to end: how many rows change their rank depends on where the first ends, and on all ranks together."""

    def joined() -> tuple[nn.Module, dict[str, Any]]:
        sizes = {"text": (1, 128, WIDTH), "image": (1, 4096, WIDTH), "wanted": (1, 4096, 6)}
        return Joint(False, 1, WIDTH), {name: torch.randn(size) for name, size in sizes.items()}

    options = Options(layout="contiguous")
    looks = {P: with_programs(joined, partial(model_cost, world_size=P), world_size=P, options=options) for P in (2, 4, 8)}
    assert gathers(looks[2]) and {each.kind for each in looks[2].exchanged} == {"all_to_all"}
    (calculated,), (seen,) = cost_on(8, looks[2], looks[4]).exchanged, looks[8].exchanged
    assert calculated.full_bytes * looks[8].tokens / looks[2].tokens == pytest.approx(seen.full_bytes, rel=0.1)


def test_models_without_such_steps_are_looked_at_once() -> None:
    found = look_at(partial(make, sorts=False), batch=1, seq_len=LENGTH, world_size=8)
    assert not gathers(found.cost)
    assert found.cost_on_more is None
    assert cost_on(64, found.cost, None) is found.cost
