"""Inline: the body of another graph joins a graph, and a Python function becomes such a body by being traced.

What `open_regions` and its openers share. Nodes that join carry the metadata of the call they come from (source line, modules,
recompute tag), so that later passes and messages see them as the user's own.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten
_CARRIED = ("stack_trace", "nn_module_stack", "source_fn_stack", "recompute", "ac_graph_id", "autograd_function")


def inline(gm: fx.GraphModule, body: fx.GraphModule, operands: Sequence[Any]) -> Any:
    """Copy the nodes of `body` to where `gm.graph` inserts now, its inputs being `operands`; returns its results as nodes of `gm`."""
    env: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    for node in body.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return fx.map_arg(node.args[0], env.__getitem__)
        copied = gm.graph.node_copy(node, env.__getitem__)
        if node.op == "get_attr":
            copied.target = _adopt(gm, body, str(node.target))
        env[node] = copied
    raise AssertionError("a graph without an output")


def _adopt(gm: fx.GraphModule, body: fx.GraphModule, target: str) -> str:
    """Give `gm` an attribute of `body`; the name depends on the graph alone, since ranks compare graphs as text."""
    value: Any = body
    for atom in target.split("."):
        value = getattr(value, atom)
    stem, count = target.replace(".", "_"), 0
    while hasattr(gm, name := f"{stem}_{count}"):
        count += 1
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        gm.register_buffer(name, value, persistent=False)
    else:
        setattr(gm, name, value)
    return name


def inline_call(
    gm: fx.GraphModule, call: fx.Node, fn: Callable[..., Any], operands: Sequence[Any], autocast: torch.dtype | None = None
) -> Any:
    """Trace `fn` of the example values of `operands` to ATen and inline it; its nodes carry the metadata of `call`."""
    before = set(gm.graph.nodes)
    results = inline(gm, trace_body(fn, [example(x) for x in operands], autocast), operands)
    for node in gm.graph.nodes:
        if node not in before:
            carry(call, node)
    return results


def trace_body(fn: Callable[..., Any], examples: Sequence[Any], autocast: torch.dtype | None = None) -> fx.GraphModule:
    """What `fn` computes under an autocast, as ATen operators below autograd; the examples are fake tensors and sizes."""
    with example_mode(examples), casting(examples, autocast):
        body = make_fx(fn)(*examples)
    for node in body.graph.nodes:
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]
    _unwrap_numbers(body.graph)
    body.graph.eliminate_dead_code()
    return body


def _unwrap_numbers(graph: fx.Graph) -> None:
    """vmap writes `x * 8` as `x * _to_copy(8, dtype=…)`: a number again, or a tensor where its dtype rounds more than an operator would."""
    for node in graph.find_nodes(op="call_function", target=aten._to_copy.default):
        number, dtype = node.args[0], node.kwargs.get("dtype")
        if isinstance(number, (bool, int, float)):
            if dtype in (torch.float16, torch.bfloat16):
                node.target, node.args = aten.full.default, ([], number)
            else:
                _put(number, node)


def example_mode(values: Sequence[Any]) -> AbstractContextManager[Any]:
    """The fake mode that Dynamo traced nodes or their examples in: not that of the tracing context, which is the backend's."""
    leaves = pytree.tree_leaves([example(value) for value in values])
    return next((x.fake_mode for x in leaves if isinstance(x, FakeTensor)), nullcontext())


def _put(number: float, node: fx.Node) -> None:
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: number if n is node else n)
    node.graph.erase_node(node)


def casting(values: Sequence[Any], dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to `dtype` on the device of the values, or no autocast, whatever is on where this program is compiled."""
    device = next(x.device.type for x in map(example, values) if isinstance(x, torch.Tensor))
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, dtype, enabled=dtype is not None)


def example(value: Any) -> Any:
    """The fake value of a node of Dynamo's graph (or of a body that joined it); anything else is its own example."""
    if not isinstance(value, fx.Node):
        return value
    if "example_value" not in value.meta:  # Dynamo made this node between two others, such as `w.T` for a backward
        args, kwargs = fx.map_arg(value.args, example), fx.map_arg(value.kwargs, example)
        with example_mode(value.all_input_nodes), torch.no_grad():
            target: Any = getattr(type(args[0]), str(value.target)) if value.op == "call_method" else value.target
            value.meta["example_value"] = target(*args, **kwargs)
    return value.meta["example_value"]


def carry(old: fx.Node, new: fx.Node) -> fx.Node:
    """Give `new` the metadata of the call it comes from."""
    new.meta.update({key: old.meta[key] for key in _CARRIED if key in old.meta})
    return new


def replace_items(call: fx.Node, results: Sequence[Any]) -> None:
    """The users of a call that returned a tuple are `getitem`s: give them its results, and erase the call."""
    for user in list(call.users):
        assert user.target.__name__ == "getitem", user.format_node()  # type: ignore[union-attr]
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        user.graph.erase_node(user)
    call.graph.erase_node(call)
