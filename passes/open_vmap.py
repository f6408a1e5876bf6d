"""Open `torch.vmap`: what stands between its entry and its exit becomes the batched operators it computes with.

    _vmap_increment_nesting(2); x = _add_batch_dim(a, 0, 1); y = x >= b; out = _remove_batch_dim(y, 1, 2, 0); _vmap_decrement_nesting()
        →  out = aten.ge.Tensor(aten.view(a, [2, 1]), b)

Part of `open_regions`, on Dynamo's graph: masks are often written for one (batch, head, query, key) and vmapped. Legal because the
operators are those that torch's own batching rules call. `normalize` could not trace the entry and exit, which are Python state.
"""

from typing import Any

import torch
from torch import fx
from torch._functorch import predispatch

from autoseq.passes.autocast import ENTER, autocast_dtype
from autoseq.passes.inline import example, inline_call
from autoseq.passes.source import has_source_line, source_line
from autoseq.runtime.errors import UnsupportedError

_ENTRY, _EXIT = predispatch._vmap_increment_nesting, predispatch._vmap_decrement_nesting
_STATE = (torch._C._set_grad_enabled, ENTER)


def open_vmaps(gm: fx.GraphModule) -> int:
    """Replace every outermost vmap of `gm`; returns how many there were."""
    opened = 0
    while (nodes := _first_vmap(gm)) is not None:
        _open(gm, nodes)
        opened += 1
    for node in gm.graph.find_nodes(op="call_function", target=predispatch.lazy_load_decompositions):
        gm.graph.erase_node(node)
    return opened


def _first_vmap(gm: fx.GraphModule) -> list[fx.Node] | None:
    """The nodes from the first entry to its exit."""
    nodes: list[fx.Node] = []
    depth = 0
    for node in gm.graph.nodes:
        depth += (node.target is _ENTRY) - (node.target is _EXIT)
        if nodes or depth:
            nodes.append(node)
        if nodes and not depth:
            return nodes
    return None


def _open(gm: fx.GraphModule, nodes: list[fx.Node]) -> None:
    inside, last = set(nodes), nodes[-1]
    described = next((node for node in nodes if has_source_line(node)), last)
    if any(node.target in _STATE for node in nodes):
        where = source_line(described)
        raise UnsupportedError(f"grad mode or autocast changes inside the vmap at {where}, which is not supported; set it outside")
    operands = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside and n.op != "get_attr"))
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    body = _body(gm, nodes, operands, results)
    device = next((x.device.type for x in map(example, operands) if isinstance(x, torch.Tensor)), "cpu")
    with gm.graph.inserting_after(last):
        anchor = gm.graph.call_function(len, ((),))
    with gm.graph.inserting_before(anchor):
        made = inline_call(gm, described, fx.Interpreter(body).run, operands, autocast_dtype(last, device))
    gm.graph.erase_node(anchor)
    for old, new in zip(results, made, strict=True):
        old.replace_all_uses_with(new)
    for node in reversed(nodes):
        gm.graph.erase_node(node)


def _body(gm: fx.GraphModule, nodes: list[fx.Node], operands: list[fx.Node], results: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {operand: graph.placeholder(operand.name) for operand in operands}

    def copy(node: fx.Node) -> fx.Node:
        if node not in env:  # an attribute that stands outside
            env[node] = graph.node_copy(node)
        return env[node]

    for node in nodes:
        env[node] = graph.node_copy(node, copy)
    graph.output(tuple(env[node] for node in results))
    return fx.GraphModule(gm, graph)
