"""Tidy: fewer, larger gradient reductions, and none where no gradient flows."""

import operator
from typing import Any

import torch
import torch._guards
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from autoseq.passes.sizes import num_bytes
from autoseq.runtime import collectives


def drop_idle_varies(gm: fx.GraphModule) -> int:
    """Remove `vary` in front of inputs that get no gradient; returns how many were removed.

        vary(buffer)     →     buffer

    Legal because `vary` computes the identity; its gradient, the sum over ranks, is needed only where a gradient is. A
    parameter that is used only under `no_grad` or behind `detach` then has no gradient at all, as on one device.
    """
    needed = _reached_by_gradients(gm)
    idle = [node for node in _input_varies(gm) if node not in needed or not node.args[0].meta.get("requires_grad")]  # type: ignore
    for node in idle:
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
    return len(idle)


def _reached_by_gradients(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes from which a differentiable path leads to an output."""
    differentiable = _differentiable(gm)
    reached: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.op == "output" or (node in reached and node in differentiable):
            reached.update(node.all_input_nodes)
    return reached


_NO_GRADIENT = (torch.ops.aten.detach.default, "detach", torch._C._autograd._get_data_attr)  # pyright: ignore[reportAttributeAccessIssue]


def _differentiable(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes that pass a gradient on to what they read."""
    enabled, found = True, set()
    for node in gm.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif (enabled and node.target not in _NO_GRADIENT) or node.op not in ("call_function", "call_method"):
            found.add(node)
    return found


def leave_gradients_unsummed(gm: fx.GraphModule, *, group: str) -> int:
    """Parameters' gradients become this rank's part of the sum, for a caller who adds them up; returns their number.

        linear(x, vary(w)); take_shard(w)     →     linear(x, w); take_shard(share_gradient(w))

    Legal for a caller who sums over the group: beside sharded values each rank has its own part already, and where a
    replicated use would give every rank the full gradient, each now gets a P-th of it. What writes to a parameter, or reads it without
    a gradient, has the parameter itself; a share is made anew for each use, as one that was written over would be out of date.
    """
    changed, differentiable = 0, _differentiable(gm)
    for parameter in gm.graph.find_nodes(op="placeholder"):
        if not (parameter.meta.get("is_parameter") and parameter.meta.get("requires_grad")):
            continue
        varied = [user for user in parameter.users if user.target is collectives.vary]
        for user in [user for user in parameter.users if user in differentiable and user not in varied and user.op != "output"]:
            with gm.graph.inserting_before(user):
                shared = gm.graph.call_function(collectives.share_gradient, (parameter,), {"group": group})
            user.replace_input_with(parameter, shared)
        for user in varied:
            user.replace_all_uses_with(parameter)
            gm.graph.erase_node(user)
        changed += 1
    return changed


def bucket_varies(gm: fx.GraphModule, *, bucket_bytes: int) -> int:
    """Join the `vary`s of inputs into buckets whose gradients are reduced in one message; returns the number of buckets.

        a2 = vary(a); b2 = vary(b)     →     both = vary_many([a, b]); a2 = both[0]; b2 = both[1]

    Legal because a sum over ranks of several tensors laid end to end is the tensors' sums.
    """
    buckets: list[list[fx.Node]] = []
    filled = bucket_bytes
    for node in _input_varies(gm):
        size = num_bytes(node.args[0].meta["val"])  # type: ignore[arg-type]
        if filled + size > bucket_bytes or not buckets:
            buckets.append([])
            filled = 0
        buckets[-1].append(node)
        filled += size
    for bucket in buckets:
        _join(gm, bucket)
    return len(buckets)


def _input_varies(gm: fx.GraphModule) -> list[fx.Node]:
    found = gm.graph.find_nodes(op="call_function", target=collectives.vary)
    return [node for node in found if node.args[0].op == "placeholder"]


def _join(gm: fx.GraphModule, bucket: list[fx.Node]) -> None:
    last = bucket[-1]
    with gm.graph.inserting_after(last):
        joined = gm.graph.call_function(collectives.vary_many, ([node.args[0] for node in bucket],), dict(last.kwargs))
    joined.meta["val"] = [node.args[0].meta["val"] for node in bucket]  # type: ignore[union-attr]
    anchor = joined
    for index, node in enumerate(bucket):
        with gm.graph.inserting_after(anchor):
            item = gm.graph.call_function(operator.getitem, (joined, index))
        anchor = item
        item.meta["val"] = node.args[0].meta["val"]  # type: ignore[union-attr]
        node.replace_all_uses_with(item)
        gm.graph.erase_node(node)


def refresh_values(gm: fx.GraphModule) -> int:
    """Recompute every node's fake value (`meta["val"]`) from the inputs'; returns the number of nodes.

    Not a rewrite: it checks that the local graph fits together, and gives reports and later passes its true shapes.
    """
    interpreter = _Refresh(gm)
    placeholders = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    fake_mode = torch._guards.detect_fake_mode(placeholders)
    assert fake_mode is not None
    interpreter.fake_mode = fake_mode
    # Torch 2.11's own decompositions of composite operators ask for sizes as numbers; those in Python keep symbols.
    with fake_mode, torch.no_grad(), enable_python_dispatcher():
        interpreter.run(*placeholders)
    return len(gm.graph.nodes)


class _Refresh(fx.Interpreter):
    fake_mode: torch._subclasses.FakeTensorMode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.fake_mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = result
        return result
