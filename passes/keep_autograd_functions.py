"""Keep custom autograd functions: each higher-order call becomes the one operator of `autograd_functions`.

Part of `keep_meaning`, on Dynamo's graph. The trace of `normalize` would go through the call and keep its forward alone, and the
program would be differentiated as if its author had written no backward.
"""

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from autoseq.passes.autograd_functions import AUTOGRAD_FUNCTION, FUNCTIONS, AutogradFunction, Slot, key_of
from autoseq.passes.inline import carry, example, replace_items, trace_body
from autoseq.passes.row_wise import is_row_wise
from autoseq.passes.source import source_line
from autoseq.runtime.errors import UnsupportedError

aten = torch.ops.aten


def keep_autograd_functions(gm: fx.GraphModule) -> int:
    """Replace each custom autograd function that stands where gradients are recorded; returns how many."""
    kept, recording = 0, torch.is_grad_enabled()
    for node in list(gm.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            recording = bool(node.args[0])
        elif recording and is_autograd_function(node):
            _keep(gm, node)
            kept += 1
    return kept


def is_autograd_function(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() == "autograd_function_apply"


def _keep(gm: fx.GraphModule, call: fx.Node) -> None:
    forward_at, backward_at, *arguments = call.args
    bodies = [_bare(gm.get_submodule(str(at.target))) for at in (forward_at, backward_at)]  # type: ignore[union-attr]
    replace_items(call, keep(gm, call, bodies, arguments, call.meta["example_value"], dict(call.kwargs)))


def keep(
    gm: fx.GraphModule, call: fx.Node, bodies: Sequence[fx.GraphModule], arguments: Sequence[Any], outputs: Sequence[Any],
    options: dict[str, Any], is_hook: bool = False,
) -> list[Any]:  # fmt: skip
    """Put the operator for two bodies in front of the call that they are of; its results are like `outputs`."""
    lists: dict[Any, list[Any]] = {"tensors": [], "sizes": [], "floats": []}
    slots = tuple(_slot(x, lists) for x in arguments)
    results = tuple(i for i, x in enumerate(outputs) if isinstance(x, Tensor))
    function = AutogradFunction(bodies[0], bodies[1], options, slots, results, row_wise=False, draws=False, is_hook=is_hook)
    function = _studied(call, function, [example(x) for x in arguments])
    key = key_of(function)
    FUNCTIONS.setdefault(key, function)
    graph = gm.graph
    with graph.inserting_before(call):
        made = carry(call, graph.call_function(AUTOGRAD_FUNCTION, (lists["tensors"], lists["sizes"], lists["floats"], key)))
        items = {index: carry(call, graph.call_function(operator.getitem, (made, i))) for i, index in enumerate(results)}
    for index, item in items.items():
        item.meta["example_value"] = outputs[index]
    return [items.get(i, x) for i, x in enumerate(outputs)]


def _slot(x: Any, lists: dict[Any, list[Any]]) -> Any:
    """Where an argument goes: into one of the operator's lists, or with the function if it is a constant."""
    if not isinstance(x, fx.Node):
        return x
    kinds = {"tensors": Tensor, "sizes": (int, torch.SymInt), "floats": (float, torch.SymFloat)}
    kind: Any = next(kind for kind, types in kinds.items() if isinstance(example(x), types))
    lists[kind].append(x)
    return Slot(kind, len(lists[kind]) - 1)


def _bare(body: Any) -> fx.GraphModule:
    """A body without the metadata of its trace, which would keep the whole compilation alive."""
    graph = fx.Graph()
    results = graph.graph_copy(body.graph, {})
    graph.output(results)
    for node in graph.nodes:
        node.meta = {}
    return fx.GraphModule(body, graph)


def _studied(call: fx.Node, function: AutogradFunction, examples: list[Any]) -> AutogradFunction:
    """`function` with what its bodies are known to do. Raises UnsupportedError for a forward that writes to its inputs."""
    forward = fx.Interpreter(function.forward).run
    functional = trace_body(torch.func.functionalize(forward, remove="mutations"), examples)
    written = any(node.target is aten.copy_.default for node in functional.graph.nodes)
    if written or function.options.get("dirty_idx"):
        raise UnsupportedError(
            f"the custom autograd.Function at {source_line(call)} writes to its inputs, which is not supported. "
            "Have it return new tensors, or run it under torch.no_grad()."
        )
    seeded = any(torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in functional.graph.nodes)
    row_wise = is_row_wise(forward, fx.Interpreter(function.backward).run, examples)
    return replace(function, row_wise=row_wise, draws=seeded)
