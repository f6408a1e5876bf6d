"""Keep hooks: `y.register_hook(f)` becomes an identity whose backward is f, an operator of `autograd_functions`.

    z = y * 3; y.register_hook(f); return y + z      →      h = autograd_function([y], …, "f's key")[0]; return h + h * 3

In two steps. Part of `keep_meaning`, on Dynamo's graph: the call becomes the operator. Part of `normalize`, on ATen: every other reader of
y, also one before the call, reads h. Legal because a hook gets the sum of the gradients of all readers of a tensor. Of two hooks of a
tensor the first is called first, so the second stands nearer to the tensor.
"""

from typing import Any

from torch import fx

from autoseq.passes.autograd_functions import AUTOGRAD_FUNCTION, FUNCTIONS
from autoseq.passes.inline import aten, example
from autoseq.passes.keep_autograd_functions import keep
from autoseq.passes.source import source_line
from autoseq.runtime.errors import UnsupportedError

_OPTIONS: dict[str, Any] = {"non_differentiable_idx": [], "saved_for_backward_idx": []}


def keep_hooks(gm: fx.GraphModule) -> int:
    """Replace each `register_hook` of Dynamo's graph by the operator; returns how many."""
    calls = [node for node in gm.graph.nodes if is_register_hook(node)]
    for call in calls:
        tensor, body_at, *captured = call.args
        body = gm.get_submodule(str(body_at.target))
        assert isinstance(body, fx.GraphModule)
        bodies = (_identity(body, len(captured)), _hooked(body, len(captured)))
        (hooked,) = keep(gm, call, bodies, (tensor, *captured), [example(tensor)], _OPTIONS, is_hook=True)
        call.replace_all_uses_with(hooked)
        gm.graph.erase_node(call)
    return len(calls)


def is_register_hook(node: fx.Node) -> bool:
    return getattr(node.target, "_name", None) == "register_hook"


def _identity(owner: fx.GraphModule, captured: int) -> fx.GraphModule:
    """(tensor, *captured) → ((tensor,), captured)."""
    graph = fx.Graph()
    tensor, *others = (graph.placeholder(f"x{i}") for i in range(captured + 1))
    graph.output(((graph.call_function(aten.clone.default, (tensor,)),), tuple(others)))
    return fx.GraphModule(owner, graph)


def _hooked(body: fx.GraphModule, captured: int) -> fx.GraphModule:
    """(gradient, *captured) → (what the hook returns, or else the gradient; no gradients of what is captured)."""
    graph = fx.Graph()
    returned: Any = graph.graph_copy(body.graph, {})
    if isinstance(returned, (tuple, list)):
        (returned,) = returned
    graph.output((returned if returned is not None else graph.find_nodes(op="placeholder")[0], *[None] * captured))
    for node in graph.nodes:
        node.meta = {}
    return fx.GraphModule(body, graph)


def is_hook(target: Any, args: Any) -> bool:
    return target is AUTOGRAD_FUNCTION and FUNCTIONS[args[3]].is_hook


def hook_all_readers(exported: fx.GraphModule, hooks: list[fx.Node]) -> int:
    """Let every other reader of a hooked value read the hook's result (in `hooks`, in the order of the calls); returns their number."""
    last: dict[fx.Node, fx.Node] = {}  # by hooked value: the call of the hook that is nearest to it
    hooked: dict[fx.Node, fx.Node] = {}  # by a hook's result: the value
    for item in hooks:
        call: Any = item.args[0]
        given = call.args[0][0]
        value = hooked.setdefault(item, hooked.get(given, given))
        if value in last:
            item.replace_all_uses_with(given)
            call.args = ([value, *call.args[0][1:]], *call.args[1:])
            before = last[value]
            before.args = ([item, *before.args[0][1:]], *before.args[1:])  # type: ignore[misc, index]
        else:
            value.replace_all_uses_with(item, delete_user_cb=lambda user, call=call: user is not call)
        last[value] = call
        _stand_before_readers(call, item)
    return len(hooks)


def _stand_before_readers(call: fx.Node, item: fx.Node) -> None:
    """Move a hook's call to where its operands are made."""
    order = {node: index for index, node in enumerate(call.graph.nodes)}
    anchor = max(call.all_input_nodes, key=order.__getitem__)
    if any(order[user] < order[anchor] for user in item.users):
        raise UnsupportedError(
            f"the hook registered at {source_line(call)} uses a tensor that is made after the hooked tensor was read, which is not "
            "supported. Register the hook where the hooked tensor is made, or make the other tensor before."
        )
    while anchor.next.op == "placeholder":
        anchor = anchor.next
    anchor.append(call)
    call.append(item)
