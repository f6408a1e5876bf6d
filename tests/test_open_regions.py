"""Regions that Dynamo keeps as graphs of their own, one in another: every kind is opened, with its values and its tags."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from graphs import trace


@torch.compiler.nested_compile_region  # Dynamo itself inlines one that is called only once
def layer(x: Tensor, w: Tensor) -> Tensor:
    return torch.sin(x @ w) + x


@torch.compiler.nested_compile_region
def outer(x: Tensor, w: Tensor) -> Tensor:
    return layer(layer(x, w), w) * 2


def again(fn: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(fn, *args, use_reentrant=False)


NESTED = [
    pytest.param(lambda x, w: layer(layer(x, w), w), 2, 0, id="a region that is called twice"),
    pytest.param(lambda x, w: outer(outer(x, w), w), 6, 0, id="a region in a region"),
    pytest.param(lambda x, w: again(lambda: layer(layer(x, w), w)), 3, 6, id="regions in a checkpoint"),
    pytest.param(lambda x, w: again(torch.vmap(torch.cos), x) @ w, 2, 1, id="a vmap in a checkpoint"),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("fn", "opened", "tagged"), NESTED)
def test_regions_of_every_kind_are_opened(fn: Callable[..., Any], opened: int, tagged: int, dynamic: bool) -> None:
    inputs = torch.randn(4, 4).requires_grad_(), torch.randn(4, 4).requires_grad_()
    traced = trace(fn, *inputs, dynamic=dynamic)
    assert traced.num_opened == opened
    assert not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in traced.opened.graph.nodes)
    assert not any(isinstance(module, fx.GraphModule) for module in traced.opened.children()), "no body is left behind"
    tags = [node.meta.get("recompute") for node in traced.normal.graph.nodes if node.op == "call_function"]
    assert tags.count(CheckpointPolicy.PREFER_RECOMPUTE) == tagged
    actual, expected = fx.Interpreter(traced.normal).run(*traced.inputs)[0], fn(*inputs)
    grads = [torch.autograd.grad(y.sum(), inputs) for y in (actual, expected)]
    torch.testing.assert_close((actual, grads[0]), (expected, grads[1]), rtol=0, atol=0)
