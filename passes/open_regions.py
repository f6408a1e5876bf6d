"""Open higher-order regions: the body of a call that holds a graph joins the graph around it, where every pass sees it.

First stage of the pipeline, on Dynamo's graph. A model with gradient checkpointing hides its attention inside
`tag_activation_checkpoint` subgraphs, where no other pass would see it (and where other systems lose their collectives).

    y = tag_activation_checkpoint(body, x, w)[0]      →      h = linear(x, w)   # meta: recompute
                                                             y = softmax(h)     # meta: recompute

Legal because the operator computes exactly its body; what it adds, the wish to recompute, is kept as the node tags that
AOTAutograd's partitioner reads (`recompute`, `ac_graph_id`), the same tags the operator itself would set. Each other kind of
region has a file of its own, `open_*.py`, that says why opening it is legal.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from autoseq.passes.checkpoint_policy import policy_of, tags
from autoseq.passes.inline import inline, replace_items
from autoseq.passes.open_encoder_layer import open_encoder_layers
from autoseq.passes.open_flash_attn import open_flash_attention
from autoseq.passes.open_flex import open_flex
from autoseq.passes.open_vmap import open_vmaps
from autoseq.passes.source import source_line
from autoseq.runtime.errors import UnsupportedError

_region_ids = itertools.count(1)
_Values = Mapping[fx.Node, Any]
_Opener = Callable[[fx.GraphModule, fx.Node, _Values], None]


def open_regions(gm: fx.GraphModule, inputs: Sequence[Any] = ()) -> int:
    """Open every region of `gm`, nested ones included; returns how many were opened.

    `inputs` are the values of the first call, where there are any: some regions look into theirs.
    """
    opened, values = 0, dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=False))
    while (found := _first_region(gm)) is not None:
        node, opener = found
        with gm.graph.inserting_before(node):
            opener(gm, node, values)
        _drop_bodies(gm)
        opened += 1
    opened += open_vmaps(gm) + open_encoder_layers(gm) + open_flash_attention(gm)
    _drop_bodies(gm)
    gm.recompile()
    return opened


def _first_region(gm: fx.GraphModule) -> tuple[fx.Node, _Opener] | None:
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in _OPENERS:
            return node, _OPENERS[node.target.name()]
    return None


def _drop_bodies(gm: fx.GraphModule) -> None:
    """Remove the graphs that nothing holds any more: tracing would take their tensors for inputs of the program."""
    for node in gm.graph.find_nodes(op="get_attr"):
        if not node.users:
            gm.graph.erase_node(node)
    held = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    for name, child in list(gm.named_children()):
        if isinstance(child, fx.GraphModule) and name not in held:
            gm.delete_submodule(name)


def _open_checkpoint(gm: fx.GraphModule, region: fx.Node, values: _Values) -> None:
    body = _body(gm, region)
    chosen: dict[fx.Node, CheckpointPolicy] = {}
    if "_checkpoint_context_fn" in body.meta:
        policy = policy_of(body.meta["_checkpoint_context_fn"])
        if policy is None:
            raise UnsupportedError(
                f"the activation checkpointing at {source_line(region)} has a context_fn of its own; only those of "
                "torch.utils.checkpoint.create_selective_checkpoint_contexts are read"
            )
        chosen = tags(body, policy)
    for node in body.graph.nodes:
        node.meta["recompute"] = chosen.get(node, CheckpointPolicy.PREFER_RECOMPUTE)
    region_id, before = next(_region_ids), set(gm.graph.nodes)
    results = inline(gm, body, region.args[1:])
    for node in gm.graph.nodes:
        if node not in before:
            node.meta["ac_graph_id"] = region_id
    replace_items(region, results)


def _open_compile_region(gm: fx.GraphModule, region: fx.Node, values: _Values) -> None:
    """`torch.compiler.nested_compile_region`: a body that is compiled once for all of its calls; as part of the graph it is so anyway."""
    before = set(gm.graph.nodes)
    results = inline(gm, _body(gm, region), region.args[2:])
    for node in gm.graph.nodes:
        for key in {"recompute", "ac_graph_id"} & region.meta.keys() if node not in before else ():
            node.meta.setdefault(key, region.meta[key])
    replace_items(region, results)


def _body(gm: fx.GraphModule, region: fx.Node) -> fx.GraphModule:
    body = gm.get_submodule(str(region.args[0].target))  # type: ignore[union-attr]
    assert isinstance(body, fx.GraphModule)
    return body


_OPENERS: dict[str, _Opener] = {
    "tag_activation_checkpoint": _open_checkpoint,
    "invoke_subgraph": _open_compile_region,
    "flex_attention": open_flex,
}
