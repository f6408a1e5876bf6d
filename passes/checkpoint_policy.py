"""Selective activation checkpointing: what a policy says of each operator becomes the recompute tag of the node that runs it.

    checkpoint(body, x, context_fn=…save mm…)      →      linear   # meta: recompute = MUST_SAVE
                                                          gelu     # meta: recompute = PREFER_RECOMPUTE

Part of `open_regions`. torch asks the policy while it traces, operator by operator below autograd: of `linear` it sees `mm` or `addmm`.
Here each node of the body is run on fake values for that, in order, since policies may count. A node is saved if any operator it
runs is to be saved. Legal because a tag decides when a value is computed, never which.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, SelectiveCheckpointContext, _CachingTorchDispatchMode

from autoseq.passes.autocast import ENTER, EXIT
from autoseq.passes.inline import example, example_mode

_STATE = (torch._C._set_grad_enabled, ENTER, EXIT)
_SHOWS_OUTPUTS = "op_output" in signature(SelectiveCheckpointContext).parameters  # not in torch 2.11
_STRONGEST_FIRST = (
    CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE, CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE
)  # fmt: skip


def policy_of(context_fn: Callable[[], Any]) -> Callable[..., Any] | None:
    """The policy behind a `context_fn`; None if it does not come from `create_selective_checkpoint_contexts`."""
    forward, _ = context_fn()
    return forward.policy_fn if isinstance(forward, _CachingTorchDispatchMode) else None


def tags(body: fx.GraphModule, policy: Callable[..., Any]) -> dict[fx.Node, CheckpointPolicy]:
    """What `policy` says of each node of a checkpointed body of Dynamo's graph."""
    found = {}
    for node in body.graph.nodes:
        if node.op not in ("call_function", "call_method") or node.target in _STATE:
            continue
        asked = _ask(node, policy)
        if asked:
            found[node] = min(asked, key=_STRONGEST_FIRST.index)
    return found


def _ask(node: fx.Node, policy: Callable[..., Any]) -> list[CheckpointPolicy]:
    listener = _Listener(policy)
    if isinstance(node.target, torch._ops.HigherOrderOperator):  # asked as one operator, as torch does
        listener.ask(node.target, node.meta["example_value"], fx.map_arg(node.args, _operand), fx.map_arg(node.kwargs, _operand))
        return listener.answers
    if not node.all_input_nodes or _in_vmap(node):
        return []
    args, kwargs = fx.map_arg(node.args, example), fx.map_arg(node.kwargs, example)
    target: Any = getattr(type(args[0]), str(node.target)) if node.op == "call_method" else node.target
    with example_mode(node.all_input_nodes), listener:
        target(*args, **kwargs)
    return listener.answers


def _in_vmap(node: fx.Node) -> bool:
    """Whether a node belongs to a vmap, whose values exist at its level only: such nodes are recomputed."""
    values = [example(n) for n in (node, *node.all_input_nodes) if n.op != "get_attr"]
    batched = any(isinstance(x, torch.Tensor) and is_functorch_wrapped_tensor(x) for x in values)
    return batched or str(getattr(node.target, "__module__", "")).startswith("torch._functorch")


def _operand(node: fx.Node) -> Any:
    return None if node.op == "get_attr" else example(node)


class _Listener(TorchDispatchMode):
    """Asks the policy of every operator that is dispatched."""

    def __init__(self, policy: Callable[..., Any]) -> None:
        super().__init__()
        self.policy = policy
        self.answers: list[CheckpointPolicy] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in SAC_IGNORED_OPS:
            self.ask(func, out, args, kwargs or {})
        return out

    def ask(self, func: Any, out: Any, args: Any, kwargs: Any) -> None:
        context = SelectiveCheckpointContext(is_recompute=False, **({"op_output": out} if _SHOWS_OUTPUTS else {}))
        answer = self.policy(context, func, *args, **kwargs)
        if isinstance(answer, bool):
            answer = CheckpointPolicy.MUST_SAVE if answer else CheckpointPolicy.PREFER_RECOMPUTE
        self.answers.append(answer)
