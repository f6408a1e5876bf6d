"""Tensors that share memory, across the parts of a model: one device's numbers, or a refusal that names both."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

import autoseq
from autoseq.runtime.errors import UnsupportedError
from ranks import run_ranks
from side_effect_programs import Program, W, Written, added_to


class Model(Written):
    def forward(self, x: Tensor) -> Any:
        return (EXACT | REFUSED)[self.name](self, x)


EXACT: dict[str, Program] = {}
REFUSED: dict[str, Program] = {}
"""On several ranks, where two outputs of one part would have to be one memory."""
program, refused = added_to(EXACT), added_to(REFUSED)
SPLIT = torch._dynamo.graph_break


@torch._dynamo.disable
def double(x: Tensor) -> None:
    x.mul_(2)


@refused
def an_output_is_written_outside_and_its_view_read(m: Any, x: Tensor) -> Any:
    h = m.f(m.attend(x))
    view = h[:, :, :4]
    double(h)
    return m.g(m.attend(h)), view * 3


@refused
def an_output_and_its_view_in_a_part_that_writes(m: Any, x: Tensor) -> Any:
    h = m.f(m.attend(x))
    view = h[:, :, :4]
    SPLIT()
    h.mul_(2)
    return m.attend(h), view * 3


@refused
def a_view_is_written(m: Any, x: Tensor) -> Any:
    h = m.f(m.attend(x))
    view = h[:, :, :4]
    SPLIT()
    view.mul_(2)
    return m.attend(h), view * 3


@refused
def a_detached_output_is_written(m: Any, x: Tensor) -> Any:
    h = m.f(m.attend(x))
    detached = h.detach()
    SPLIT()
    detached.mul_(2)
    return m.attend(h) + detached


@refused
def an_output_is_written_and_its_last_row_read(m: Any, x: Tensor) -> Any:
    h = m.f(m.attend(x))
    last = h[:, -1]
    SPLIT()
    h.mul_(2)
    return m.attend(h), last * 3


@program
def an_output_that_is_a_view_of_an_input_is_written(m: Any, x: Tensor) -> Any:
    x = x * 1
    double(x)
    h, y = x[:, 1:], m.attend(x.clone())
    double(h)
    return m.attend(h) + y[:, 1:], x


@program
def an_input_and_its_view_in_a_part_that_writes(m: Any, x: Tensor) -> Any:
    x = x * 1
    view = x[:, :, :4]
    SPLIT()
    x.mul_(2)
    return m.attend(x), view * 2


@program
def one_tensor_under_two_names(m: Any, x: Tensor) -> Any:
    h = m.f(m.attend(x))
    both = [h, h]
    SPLIT()
    both[0].mul_(2)
    return m.attend(both[1])


@program
def views_that_are_read(m: Any, x: Tensor) -> Any:
    h = m.f(m.attend(x))
    turned, flat = h.transpose(1, 2), h.view(-1, W)
    SPLIT()
    return m.attend(h) + turned.transpose(1, 2), flat.sin()


@program
def halves_of_one_tensor_one_is_written(m: Any, x: Tensor) -> Any:
    a, b = m.qkv(m.attend(x))[..., : 2 * W].split(W, -1)
    a = a.view_as(a).clone()
    SPLIT()
    a.mul_(2)
    return m.attend(a) + b


@program
def a_residual_stream_that_is_written_in_each_part(m: Any, x: Tensor) -> Any:
    h = m.f(m.attend(x))
    SPLIT()
    h += m.g(m.attend(h.clone()))
    SPLIT()
    h[:, 2:].mul_(0.5)
    return m.attend(h)


@torch._dynamo.disable
def peek(x: Tensor) -> float:
    return float(x[:, :2].detach().sum())


@program
def a_view_that_is_gone_when_its_base_is_written(m: Any, x: Tensor) -> Any:
    h = m.f(m.attend(x))
    view = h[:, :, :4]
    peek(view)
    del view
    SPLIT()
    h.mul_(2)
    return m.attend(h)


@program
def a_view_that_is_looked_at_and_read(m: Any, x: Tensor) -> Any:
    h = m.f(m.attend(x))
    view, last = h[:, :, :4], h[:, -1]
    peek(view)
    return m.attend(h), view * 3, last * 3


@program
def a_parameter_and_its_transpose(m: Any, x: Tensor) -> Any:
    turned = m.f.weight.t()
    y = m.attend(x)
    SPLIT()
    return F.linear(y, m.f.weight) + y @ turned


def results(model: Any, x: Tensor) -> list[Tensor]:
    """Outputs, and gradients where they are recorded."""
    if torch.is_inference_mode_enabled():
        return [y * 1 for y in tree_leaves(model(x))]
    x = x.clone().requires_grad_()
    outputs = tree_leaves(model(x))
    torch.stack([y.square().sum() for y in outputs]).sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in model.parameters())]
    return [*(y.detach() * 1 for y in outputs), *(each for each in gradients if each is not None)]


def check(rank: int, P: int, inner: str, inference: bool) -> None:
    for name in EXACT | REFUSED:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Model(name), torch.randn(2, 9, W)
        with torch.inference_mode(inference):
            expected = results(copy.deepcopy(model), x)
            try:
                actual = results(autoseq.parallelize(model, inner=inner), x)
            except UnsupportedError as error:
                assert P > 1 and name in REFUSED and "on one device" in str(error), (name, str(error))
                continue
        assert P == 1 or inference or name not in REFUSED, name
        worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(actual, expected, strict=True))
        assert worst <= 1e-5, (name, worst)  # float32; sums over rows run in another order


@pytest.mark.parametrize(("P", "inner"), [(1, "eager"), (2, "eager"), (2, "aot_eager")])
def test_shared_memory_is_one_devices_or_refused(P: int, inner: str) -> None:
    run_ranks(check, P, inner, False)


def test_in_inference_mode_nothing_is_refused_that_is_only_read() -> None:
    run_ranks(check, 2, "eager", True)
