"""torch.vmap opened: the batched operators stand in the graph, with the program's numbers and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn.attention.flex_attention import create_mask
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from graphs import trace


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def causal(x: Tensor) -> Tensor:
    mask = create_mask(lambda b, h, q, k: (q >= k) & (k >= b), 2, 1, x.shape[1], x.shape[1], device="cpu")
    return (x @ x.mT).masked_fill(~mask[:, 0], 0)


def under_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.vmap(lambda row: row @ row.mT)(x)


PROGRAMS = [
    pytest.param(lambda x: x * 2, 0, id="must not fire: no vmap"),
    pytest.param(torch.vmap(lambda row: row.softmax(0) * 3), 1, id="fires: one"),
    pytest.param(lambda x: torch.vmap(torch.vmap(torch.dot, (None, 0)), (0, None))(x[0], x[1]), 1, id="fires: one in another is one"),
    pytest.param(lambda x: torch.vmap(torch.sin)(torch.vmap(torch.cos)(x) + x), 2, id="fires: one after another"),
    pytest.param(lambda x: torch.cat(torch.vmap(lambda row: (row + x.sum(), row * 2), out_dims=(0, 1))(x[0])[:1]), 1,
                 id="fires: a capture, two results"),
    pytest.param(causal, 1, id="fires: a mask of one position"),
    pytest.param(under_autocast, 1, id="fires: under autocast"),
]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("fn", "opened"), PROGRAMS)
def test_open_vmaps(fn: Callable[[Tensor], Tensor], opened: int, dynamic: bool) -> None:
    x = floats(2, 5, 4)
    traced = trace(fn, x, dynamic=dynamic)
    assert traced.num_opened == opened
    assert not any("functorch" in str(getattr(node.target, "__module__", "")) for node in traced.opened.graph.nodes)
    actual, expected = fx.Interpreter(traced.normal).run(*traced.inputs)[0], fn(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)  # float32; a batched product adds its gradient up in another order


def test_a_vmap_keeps_its_source_line_and_the_tags_of_its_checkpoint() -> None:
    def fn(x: Tensor) -> Any:
        return checkpoint(torch.vmap(torch.sinh), x, use_reentrant=False)

    traced = trace(fn, floats(3, 2))
    (node,) = traced.normal.graph.find_nodes(op="call_function", target=torch.ops.aten.sinh.default)
    assert node.meta["recompute"] == CheckpointPolicy.PREFER_RECOMPUTE and "stack_trace" in node.meta


def test_grad_mode_inside_a_vmap_is_refused() -> None:
    def row(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        return y * x

    with pytest.raises(Exception, match=r"grad mode or autocast changes inside the vmap at .*test_open_vmap\.py"):
        trace(torch.vmap(row), floats(3, 2))
