"""Normalize: Dynamo's Torch IR becomes functional ATen before autograd, one node an operator a person would name.

    y = torch.nn.functional.linear(x, w); y.add_(1)     →     linear = aten.linear(x, w); add = aten.add.Tensor(linear, 1)

Legal because `aot_export_module` only functionalizes: composite operators (`linear`, `layer_norm`, attention, losses) stay
whole since the trace is taken before autograd, in-place writes to inputs come back as `copy_` at the end, and grad-mode
and autocast regions stay as the calls that enter and leave them. Every node keeps its source line.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch.aot_autograd import GraphSignature, aot_export_module

from autoseq.passes.hidden_writes import WithHiddenWrites
from autoseq.passes.keep_hooks import hook_all_readers
from autoseq.passes.sizes import same_shape, same_size
from autoseq.passes.source import input_name, is_buffer

aten = torch.ops.aten


def normalize(gm: fx.GraphModule, inputs: Sequence[object]) -> fx.GraphModule:
    """The same program as `gm` in functional ATen; `inputs` are fake tensors (or SymInts), one a placeholder of `gm`.

    The result takes the same inputs in the same order and returns the same outputs. Tensors that `gm` held as
    attributes stay attributes.
    """
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    wanted = [x.requires_grad for x in tensors]
    owner = WithHiddenWrites(gm, inputs)
    with warnings.catch_warnings():
        # `autograd_function` is to stay whole; torch says of each operator outside its own namespace that it does.
        warnings.filterwarnings("ignore", message="At pre-dispatch tracing, we assume")
        exported, signature = aot_export_module(owner, list(inputs), trace_joint=False, pre_dispatch=True)
    assert isinstance(exported, fx.GraphModule)
    for x, requires_grad in zip(tensors, wanted, strict=True):
        x.requires_grad_(requires_grad)  # the trace lets a target that is broadcast beside a prediction need a gradient
    _name_placeholders(exported, gm, signature)
    _restore_attributes(exported, owner, signature)
    _restore_mutations(exported, signature, inputs)
    hook_all_readers(exported, _taken_from_outputs(exported, owner.num_hooks))
    _reshape_views(exported)
    _read_copies(exported)
    return exported


def _read_before_write(graph: fx.Graph, target: fx.Node) -> None:
    """What reads a mutated input reads a copy: autograd may keep it, and the write would spoil what it kept."""
    last_input = graph.find_nodes(op="placeholder")[-1] if target.op == "placeholder" else target
    with graph.inserting_after(last_input):
        copy = graph.call_function(aten.clone.default, (target,))
    copy.meta.update(target.meta)
    target.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)


def _reshape_views(exported: fx.GraphModule) -> None:
    """`view` asks for a memory layout that a rewritten operand need not have; `reshape` asks for the values only."""
    for node in exported.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def _read_copies(exported: fx.GraphModule) -> None:
    """`copy(x, y)`, which is what an in-place copy becomes, has no gradient: it is y, in the shape and the dtype of x."""
    for node in exported.graph.find_nodes(op="call_function", target=aten.copy.default):
        into, value = node.args[:2]
        with exported.graph.inserting_before(node):
            if not same_shape(into.meta["val"].shape, value.meta["val"].shape):
                value = _made(exported, node, aten.expand_as.default, value, into)
            same = into.meta["val"].dtype == value.meta["val"].dtype and into.meta["val"].device == value.meta["val"].device
            copied = value if same else _made(exported, node, aten.type_as.default, value, into)
        node.replace_all_uses_with(copied)
        exported.graph.erase_node(node)


def _made(exported: fx.GraphModule, node: fx.Node, target: Callable[..., Any], *operands: fx.Node) -> fx.Node:
    """`target` of two operands in place of `node`, with its metadata."""
    made = exported.graph.call_function(target, operands)
    made.meta = {**node.meta, "val": target(*(operand.meta["val"] for operand in operands))}
    return made


def _name_placeholders(exported: fx.GraphModule, gm: fx.GraphModule, signature: GraphSignature) -> None:
    """Carry the user's names (`L['input_ids']`) over as metadata: messages and reports speak of them."""
    for new, old in zip(_user_inputs(exported, signature), gm.graph.find_nodes(op="placeholder"), strict=True):
        new.meta.update(source_name=input_name(old), is_buffer=is_buffer(old))


def _user_inputs(exported: fx.GraphModule, signature: GraphSignature) -> list[fx.Node]:
    return [node for node in exported.graph.find_nodes(op="placeholder") if node.name in signature.user_inputs]


def _is_trained_leaf(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad and x.is_leaf


def _restore_attributes(exported: fx.GraphModule, gm: torch.nn.Module, signature: GraphSignature) -> None:
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in exported.graph.find_nodes(op="placeholder"):
        if node.name not in lifted:
            continue
        owner: object = gm
        for atom in lifted[node.name].split("."):
            owner = getattr(owner, atom)
        attribute = "held_" + lifted[node.name].removeprefix("gm.").replace(".", "_")
        if isinstance(owner, torch.nn.Parameter):
            exported.register_parameter(attribute, owner)
        else:
            assert isinstance(owner, torch.Tensor)
            exported.register_buffer(attribute, owner, persistent=False)
        with exported.graph.inserting_before(node):
            held = exported.graph.get_attr(attribute)
        held.meta.update(node.meta)
        node.replace_all_uses_with(held)
        signature_name = node.name
        exported.graph.erase_node(node)
        held.meta["lifted_from"] = signature_name


def _restore_mutations(exported: fx.GraphModule, signature: GraphSignature, inputs: Sequence[object]) -> None:
    """Functionalization returns an input's new value as an extra leading output; write it back instead.

    To a leaf that needs a gradient nothing but a hidden write goes on one device, so the new value is copied back as one.
    """
    leaves = {node for node, x in zip(_user_inputs(exported, signature), inputs, strict=True) if _is_trained_leaf(x)}
    mutated = {**signature.parameters_to_mutate, **signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    targets = {names.get(n.meta.get("lifted_from", n.name), n.name): n for n in exported.graph.nodes if n.op in ("placeholder", "get_attr")}
    output = exported.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    with exported.graph.inserting_before(output):
        for value in results[: len(mutated)]:
            target = targets[mutated[value.name]]
            _read_before_write(exported.graph, target)
            if is_hidden := target in leaves and _records_gradients(exported.graph):
                exported.graph.call_function(torch._C._set_grad_enabled, (False,))
            exported.graph.call_function(aten.copy_.default, (target, value)).meta.update(target.meta)
            if is_hidden:
                exported.graph.call_function(torch._C._set_grad_enabled, (True,))
    output.args = (tuple(results[len(mutated):]),)


def _records_gradients(graph: fx.Graph) -> bool:
    """Whether gradients are recorded where the program ends; a caller's `no_grad` stays the caller's."""
    modes = graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    return bool(modes[-1].args[0]) if modes else torch.is_grad_enabled()


def _taken_from_outputs(exported: fx.GraphModule, count: int) -> list[fx.Node]:
    """The last outputs, which are no longer any."""
    output = exported.graph.output_node()
    results: tuple[Any, ...] = output.args[0]  # type: ignore[assignment]
    kept = len(results) - count
    output.args = (results[:kept],)
    return list(results[kept:])


def drop_noops(gm: fx.GraphModule) -> int:
    """Remove operators that return their operand unchanged; returns how many.

        y = aten.slice.Tensor(x, 1, 0, S) where x has S rows      →      x

    Legal because the graph is functional (an alias cannot be told from its base) and the shapes are equal. Where no gradients are recorded
    such an operator still cuts its result off from the operand's history, so it becomes `detach`.
    """
    dropped, records = 0, True
    for node in list(gm.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            records = bool(node.args[0])
        if node.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)
        elif (same := _unchanged_operand(node)) is not None:
            if not records and same.meta["val"].is_floating_point():
                node.target, node.args, node.kwargs = aten.detach.default, (same,), {}
                continue
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)
        else:
            continue
        dropped += 1
    return dropped


_SAME_IF_SAME_SHAPE = {
    aten.reshape.default, aten.expand.default, aten.slice.Tensor,
}


def _unchanged_operand(node: fx.Node) -> fx.Node | None:
    """The operand that `node` returns as it is, if it does."""
    if node.target in (aten.alias.default, aten.lift_fresh.default):
        return node.args[0]  # type: ignore[return-value]
    if node.target is aten.cat.default:
        return _only_part(node)
    if node.target in _SAME_IF_SAME_SHAPE and (len(node.args) < 5 or node.args[4] == 1):  # args[4]: a slice's step
        operand: fx.Node = node.args[0]  # type: ignore[assignment]
        return operand if same_shape(node.meta["val"].shape, operand.meta["val"].shape) else None
    return None


def _only_part(node: fx.Node) -> fx.Node | None:
    """The one part of a `cat` whose others are empty (a cache before its first token)."""
    parts = [part for part in node.args[0] if not same_size(part.meta["val"].numel(), 0)]  # type: ignore[union-attr]
    if len(parts) == 1 and parts[0].meta["val"].dtype == node.meta["val"].dtype:  # type: ignore[union-attr]
        return parts[0]  # type: ignore[return-value]
    return None
