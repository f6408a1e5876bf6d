"""What a model costs besides its attention: exact products, collectives and kept activations, on any rank and at any length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import models
from autoseq.inspection import with_programs
from autoseq.options import Options
from autoseq.planning.model_cost import ModelCost, model_cost
from autoseq.planning.training import Split, Training, memory_besides_attention
from autoseq.saved_memory import saved_bytes

WIDTH, HEADS, WIDE = 8, 2, 24


class Small(nn.Module):
    """Attention, a wide layer and a sum: few enough operators to count by hand."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, WIDE, bias=False)
        self.down = nn.Linear(WIDE, WIDTH, bias=False)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        wide = (lambda y: self.down(F.gelu(self.up(y)))) if not self.checkpointed else self._again
        return wide(y).sum()

    def _again(self, y: Tensor) -> Tensor:
        out = checkpoint(lambda y: self.down(F.gelu(self.up(y))), y, use_reentrant=False)
        assert isinstance(out, Tensor)
        return out


def cost_of(make: Callable[[], nn.Module], *, tokens: int = 16, world_size: int = 2) -> ModelCost:
    def with_input() -> tuple[nn.Module, dict[str, Any]]:
        return make(), {"x": torch.randn(1, tokens, WIDTH)}

    return with_programs(with_input, lambda programs: model_cost(programs, world_size=world_size), world_size=world_size, options=Options())


def test_products_parameters_and_reductions_by_hand() -> None:
    found = cost_of(Small)
    weights = 3 * WIDTH * WIDTH + 2 * WIDTH * WIDE
    assert found.tokens == 8
    assert found.forward.flops == (("float32", 2 * 8 * weights),)
    # The first layer's input wants no gradient.
    assert found.backward.flops == (("float32", 2 * 8 * (2 * weights - 3 * WIDTH * WIDTH)),)
    assert (found.parameters, found.parameter_bytes, found.gradient_bytes) == (weights, 4 * weights, 4 * weights)
    # The gradients, and the sum that the program returns.
    assert sum(each.full_bytes for each in found.reduced) == 4 * weights + 4
    assert found.exchanged == ()


def test_what_is_frozen_has_no_gradient() -> None:
    def frozen() -> nn.Module:
        model = Small()
        model.up.weight.requires_grad_(False)
        return model

    found = cost_of(frozen)
    assert found.parameters - found.trained == WIDTH * WIDE
    assert sum(each.full_bytes for each in found.reduced) == found.gradient_bytes + 4
    assert found.parameter_bytes - found.gradient_bytes == 4 * WIDTH * WIDE


class Buffered(Small):
    """With a table that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.table)


def test_buffers_are_no_parameters_and_stay_whole() -> None:
    plain, found = cost_of(Small), cost_of(Buffered)
    assert (found.parameters, found.parameter_bytes) == (plain.parameters, plain.parameter_bytes)
    assert (plain.buffer_bytes, found.buffer_bytes) == (0, 4 * WIDTH * WIDTH)
    whole, sharded = (
        memory_besides_attention(Training((), found, 1, 16, shard_parameters), Split(1, 4), "contiguous").parameters
        for shard_parameters in (False, True)
    )
    assert whole == found.parameter_bytes + found.buffer_bytes
    assert sharded == found.parameter_bytes // 4 + found.buffer_bytes


@pytest.mark.parametrize("tokens", [16, 2 * WIDTH, 2 * WIDE], ids=["other sizes", "as many rows as the width", "as many as the wide layer"])
def test_one_count_serves_any_length(tokens: int) -> None:
    """Also where activations are as large as weights are."""
    base, other = cost_of(Small, tokens=96), cost_of(Small, tokens=tokens)
    share = tokens / 96
    for name in ("forward", "backward"):
        of_base, of_other = getattr(base, name), getattr(other, name)
        assert [(dtype, n) for dtype, n in of_other.flops] == [(dtype, n * share) for dtype, n in of_base.flops]
        assert (of_other.fixed_bytes, of_other.launches) == (of_base.fixed_bytes, of_base.launches)
        assert of_other.growing_bytes == of_base.growing_bytes * share
    assert (other.kept_bytes, other.largest_bytes) == (base.kept_bytes * share, base.largest_bytes * share)
    assert (other.reduced, other.parameter_bytes) == (base.reduced, base.parameter_bytes)


def test_kept_activations_are_those_that_autograd_saves() -> None:
    model, x = Small(), torch.randn(1, 16, WIDTH)
    found = cost_of(Small, world_size=1)
    measured = saved_bytes(lambda: model.down(F.gelu(model.up(model.qkv(x)[..., :WIDTH]))), model)
    # Here stands a slice of the first layer's result in place of the attention: two thirds of what is kept for it are not needed. And x
    # itself is not among what the program keeps, since it was given to it.
    size = x.untyped_storage().nbytes()
    assert found.kept_bytes == measured - 2 * size - size


def test_checkpointed_layers_keep_less_and_compute_twice() -> None:
    plain, again = cost_of(Small), cost_of(lambda: Small(checkpointed=True))
    assert again.kept_bytes == plain.kept_bytes - 2 * 8 * WIDE * 4  # what goes into and comes out of the gelu
    assert again.forward == plain.forward
    assert again.backward.flops == plain.backward.flops
    assert (plain.backward.again, again.backward.again) == ((), (("float32", 2 * 8 * 2 * WIDTH * WIDE),))


def test_what_one_checkpointed_layer_hands_to_the_next_is_kept() -> None:
    class Twice(Small):
        def _again(self, y: Tensor) -> Tensor:
            return super()._again(super()._again(y))

    once, twice = cost_of(lambda: Small(checkpointed=True)), cost_of(lambda: Twice(checkpointed=True))
    assert twice.kept_bytes == once.kept_bytes + 8 * WIDTH * 4


def test_steps_that_need_other_rows_are_exchanged() -> None:
    class Rolled(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.sort(self.qkv(x)[..., :WIDTH], dim=1).values)

    (gathered, *_) = cost_of(Rolled).exchanged
    assert gathered.kind == "all_gather"
    assert gathered.full_bytes == 16 * WIDTH * 4


def test_tokens_are_those_of_the_longest_attention_or_as_said() -> None:
    """An encoder of another length may come first."""

    class AfterAnother(Small):
        def forward(self, x: Tensor) -> Tensor:
            return Small.forward(self, x[:, :16]) + super().forward(x)

    assert cost_of(AfterAnother, tokens=96).tokens == 48


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_whole_models_are_counted(name: str) -> None:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        return models.make(name), dict(models.batch(name, batch_size=2, length=32))

    found = with_programs(make, lambda programs: model_cost(programs, world_size=2), world_size=2, options=Options())
    model = models.make(name)
    assert found.parameters >= sum(p.numel() for p in model.parameters())
    looked_up = ("embed", "wpe", "wte")
    products = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and not any(name in n for name in looked_up))
    head = models.VOCABULARY * 32  # tied to the embedding or not
    products += 0 if name == "llama" else head
    assert dict(found.forward.flops)["float32"] == 2 * found.tokens * products
    assert found.tokens == 2 * 16
