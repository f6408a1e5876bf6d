"""What shares the memory of a deferred output holds what one device's would, whichever of the two is written afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import autoseq
from autoseq.runtime.data_of_plain_tensors import give_whole_data
from autoseq.runtime.deferred import DeferredTensor
from ranks import run_ranks
from test_deferred import deferred, example

USES: dict[str, Callable[[Tensor, Any], Any]] = {}


def use(fn: Callable[[Tensor, Any], Any]) -> Callable[[Tensor, Any], Any]:
    """`fn` is given an output and a module with a parameter and a buffer of its shape; what it returns, and all three, are compared."""
    USES[fn.__name__.replace("_", " ")] = fn
    return fn


@use
def data_of_a_plain_tensor(y: Tensor, m: Any) -> Any:
    plain = torch.zeros(2, 5, 3)
    plain.data = y
    return plain * 2, plain.is_leaf, plain.requires_grad, plain.clone().untyped_storage().nbytes()


@use
def data_of_a_parameter_that_is_written_then(y: Tensor, m: Any) -> Any:
    m.weight.data = y
    with torch.no_grad():
        m.weight.mul_(2)
    (m.weight**2).sum().backward()
    return m.weight.grad, isinstance(m.weight, nn.Parameter), y * 1


@use
def data_of_another_shape(y: Tensor, m: Any) -> Any:
    m.mean.data = torch.zeros(7)
    m.mean.data = y.detach()
    y.data.add_(1)
    return m.mean.sum(1)


@use
def data_set_by_setattr_and_in_a_view(y: Tensor, m: Any) -> Any:
    view = m.mean[0]
    setattr(view, "data", y)  # noqa: B010
    return view * 1


@use
def data_in_code_that_another_backend_compiles(y: Tensor, m: Any) -> Any:
    def set_data(mean: Tensor, y: Tensor) -> Tensor:
        mean.data = y.data
        return mean * 2

    return torch.compile(set_data, backend="eager")(m.mean, y.detach()), m.mean * 1


@use
def a_parameter_of_it_that_is_trained(y: Tensor, m: Any) -> Any:
    m.weight = nn.Parameter(y.detach())
    optimizer = torch.optim.AdamW(m.parameters(), 0.1)
    for _ in range(2):
        (m.weight**2).sum().backward()
        optimizer.step()
    return isinstance(m.weight, nn.Parameter), m.weight.is_leaf, m.weight.grad, y.detach() * 1


@use
def a_buffer_of_it(y: Tensor, m: Any) -> Any:
    m.register_buffer("other", y.detach())
    m.other.mul_(0.5)
    return copy.deepcopy(m).state_dict()["other"] * 1, y * 1


@use
def set_to_it(y: Tensor, m: Any) -> Any:
    m.mean.set_(y.detach())
    m.mean.zero_()
    return y.detach() * 1


@use
def set_to_its_storage(y: Tensor, m: Any) -> Any:
    flat = torch.empty(0).set_(y.detach().untyped_storage())
    flat[2:].zero_()
    return flat, y.detach() * 1


@use
def resized_as_it(y: Tensor, m: Any) -> Any:
    return torch.zeros(1).resize_as_(y.detach()).zero_()


@use
def swapped_with_it(y: Tensor, m: Any) -> Any:
    plain, other = torch.ones(2, 5, 3), y.detach()
    torch.utils.swap_tensors(plain, other)
    return plain * 1, other * 1


@use
def copied_into_a_plain_tensor(y: Tensor, m: Any) -> Any:
    with torch.no_grad():
        m.weight.copy_(y)
        m.mean[0] = y[1]
    return (m.mean * y).sum()


@use
def a_gradient(y: Tensor, m: Any) -> Any:
    m.weight.grad = y.detach()
    (m.weight * 2).sum().backward()
    torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
    torch.optim.SGD(m.parameters(), 0.1).step()
    return m.weight.grad * 1


@use
def loaded(y: Tensor, m: Any) -> Any:
    m.load_state_dict({"weight": y.detach(), "mean": y.detach()})
    m.weight.data.mul_(2)
    return y.detach() * 1


@use
def loaded_by_assignment(y: Tensor, m: Any) -> Any:
    m.load_state_dict({"weight": y.detach(), "mean": y.detach()}, assign=True)
    m.mean.mul_(2)
    m.double()
    return y.detach() * 1


@use
def lists_that_are_written(y: Tensor, m: Any) -> Any:
    torch._foreach_mul_([y.detach(), m.mean], 2.0)
    return y.detach() * 1


@use
def written_through_numpy(y: Tensor, m: Any) -> Any:
    np.asarray(y.detach())[0] = 7
    return y.detach() * 1


@use
def functions_of_values(y: Tensor, m: Any) -> Any:
    doubled = y.detach().apply_(lambda value: 2 * value)
    added = y.detach().map_(m.mean, lambda a, b: a + b)
    return doubled * 1, added * 1, y.detach().map2_(m.mean, m.mean, lambda a, b, c: a + b + c) * 1


@use
def shared_between_processes(y: Tensor, m: Any) -> Any:
    shared = y.detach().share_memory_()
    shared.add_(1)
    return shared.is_shared(), shared * 1, y.detach().is_shared()


class Named(Tensor):
    """A subclass of the user's."""


@use
def a_subclass(y: Tensor, m: Any) -> Any:
    named = y.as_subclass(Named)
    return type(named) is Named, (named * 2).as_subclass(Tensor)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 30).view(2, 5, 3))
        self.register_buffer("mean", torch.linspace(-2, 3, 30).view(2, 5, 3))


def plain(value: Any) -> Any:
    return value.detach() * 1 if isinstance(value, Tensor) else value


def everything(fn: Callable[[Tensor, Any], Any], y: Tensor, x: Tensor) -> list[Any]:
    holder = Holder()
    result = fn(y, holder)
    results = list(result) if isinstance(result, tuple) else [result]
    rows = y.local if isinstance(y, DeferredTensor) else y.chunk(dist.get_world_size(), 1)[dist.get_rank()]
    differentiable = [each for each in results if isinstance(each, Tensor) and each.requires_grad]
    gradients = torch.autograd.grad(sum(((each * each).sum() for each in differentiable), (y * 3).sum()), x)
    return [plain(each) for each in (*results, y, rows, holder.weight, holder.mean, *gradients)]


def check_uses(rank: int, P: int) -> None:
    give_whole_data()
    for name, fn in USES.items():
        x = example()
        mine, whole = everything(fn, deferred(x), x), everything(fn, x * 1, x)
        assert len(mine) == len(whole)
        for number, (actual, expected) in enumerate(zip(mine, whole, strict=True)):
            same = torch.equal(actual, expected) if isinstance(expected, Tensor) else actual == expected
            assert same, (name, number, actual, expected)


@pytest.mark.parametrize("P", [1, 2])
def test_what_shares_an_outputs_memory_is_one_devices(P: int) -> None:
    run_ranks(check_uses, P)


class Parts(nn.Module):
    """Two parts; between them and in the second, the output of the first becomes a buffer's data."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.between = nn.Linear(8, 24), False
        self.register_buffer("mean", torch.zeros(2, 9, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        if self.between:
            set_mean(self, y)
        else:
            torch._dynamo.graph_break()
            self.mean.data = y.data
        return y * self.mean.sum(1, keepdim=True)


@torch._dynamo.disable
def set_mean(model: Any, y: Tensor) -> None:
    model.mean.data = y
    model.mean.mul_(2)


def check_parts(rank: int, P: int, between: bool) -> float:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Parts()
    model.between = between
    oracle, x = copy.deepcopy(model), torch.randn(2, 9, 8)
    compiled = autoseq.parallelize(model, inner="eager")
    worst = 0.0
    for _ in range(2):
        results = []
        for run in (compiled, oracle):
            run.zero_grad()
            y = run(x)
            y.square().sum().backward()
            results.append([y.detach() * 1, run.mean * 1, run.qkv.weight.grad])
        worst = max([worst, *(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))])
    return worst


@pytest.mark.parametrize("between", [True, False], ids=["between the parts", "in a part"])
def test_an_output_of_a_part_becomes_a_buffers_data(between: bool) -> None:
    # Relative L2 in float32; sums over rows run in another order.
    assert max(run_ranks(check_parts, 2, between)) <= 1e-5
