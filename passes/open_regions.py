"""Open higher-order regions: the body of an activation-checkpoint call joins the graph around it.

First stage of the pipeline, on Dynamo's graph. A model with gradient checkpointing hides its attention inside
`tag_activation_checkpoint` subgraphs, where no other pass would see it (and where other systems lose their collectives).

    y = tag_activation_checkpoint(body, x, w)[0]      →      h = linear(x, w)   # meta: recompute
                                                             y = softmax(h)     # meta: recompute

Legal because the operator computes exactly its body; what it adds, the wish to recompute, is kept as the node tags that
AOTAutograd's partitioner reads (`recompute`, `ac_graph_id`), the same tags the operator itself would set.
"""

import itertools

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from autoseq.passes.source import source_line
from autoseq.runtime.errors import UnsupportedError

_CHECKPOINT = "tag_activation_checkpoint"
_region_ids = itertools.count(1)


def open_regions(gm: fx.GraphModule) -> int:
    """Inline every checkpoint region of `gm`, nested ones included; returns how many were opened."""
    opened = 0
    while (node := _first_region(gm)) is not None:
        _open(gm, node)
        opened += 1
    return opened


def _first_region(gm: fx.GraphModule) -> fx.Node | None:
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() == _CHECKPOINT:
            return node
    return None


def _open(gm: fx.GraphModule, region: fx.Node) -> None:
    body_ref = region.args[0]
    assert isinstance(body_ref, fx.Node)
    body = gm.get_submodule(str(body_ref.target))
    assert isinstance(body, fx.GraphModule)
    if "_checkpoint_context_fn" in body.meta:
        raise UnsupportedError(
            f"the selective activation checkpointing (context_fn) at {source_line(region)} is not supported yet; use plain checkpointing"
        )
    region_id = next(_region_ids)
    operands = dict(zip(body.graph.find_nodes(op="placeholder"), region.args[1:], strict=True))
    with gm.graph.inserting_before(region):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                _replace_results(region, fx.map_arg(node.args[0], lambda n: operands[n]))
                break
            copied = gm.graph.node_copy(node, lambda n: operands[n])
            if node.op == "get_attr":
                copied.target = _hoist_attribute(gm, body, str(node.target), region_id)
            copied.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
            copied.meta.setdefault("ac_graph_id", region_id)
            operands[node] = copied
    gm.graph.erase_node(region)
    if not body_ref.users:
        gm.graph.erase_node(body_ref)
    gm.recompile()


def _hoist_attribute(gm: fx.GraphModule, body: fx.GraphModule, target: str, region_id: int) -> str:
    value: object = body
    for atom in target.split("."):
        value = getattr(value, atom)
    name = f"region{region_id}_{target.replace('.', '_')}"
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        gm.register_buffer(name, value, persistent=False)
    else:
        setattr(gm, name, value)
    return name


def _replace_results(region: fx.Node, results: object) -> None:
    """Users of a region are `getitem`s of its result tuple."""
    assert isinstance(results, (tuple, list))
    for user in list(region.users):
        assert user.target.__name__ == "getitem", user.format_node()  # type: ignore[union-attr]
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        user.graph.erase_node(user)
