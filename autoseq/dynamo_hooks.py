"""Hooks under torch 2.11: Dynamo traces `y.register_hook(f)` to the operator that it traces it to in later versions.

Torch 2.11 itself makes a custom autograd.Function of the call, beside y: of two hooks the second then runs first, and a write to y is an
error. `keep_hooks` reads the operator.
"""

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from torch._dynamo.exc import UnknownPropertiesDuringBackwardTrace, unimplemented
from torch._dynamo.variables import RemovableHandleVariable, TensorVariable
from torch._dynamo.variables.base import ValueMutationNew, VariableTracker
from torch._dynamo.variables.higher_order_ops import speculate_subgraph
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule

from autoseq.compiled_calls import is_ours


def trace_hooks() -> None:
    """Have Dynamo trace hooks of this backend's programs so, where it does not by itself; to be called once."""
    if find_spec("torch._higher_order_ops.register_hook") is None:
        TensorVariable._method_register_hook = _for_ours(TensorVariable._method_register_hook)  # type: ignore[method-assign]


class _RegisterHook(HigherOrderOperator):
    """The operator: registers the hook on the tensor, and returns the tensor."""

    def __init__(self) -> None:
        super().__init__("register_hook")

    def __call__(self, tensor: Tensor, hook: Callable[..., Any], *captured: Any) -> Tensor:
        tensor.register_hook(lambda gradient: hook(gradient, *captured))
        return tensor


_register_hook = _RegisterHook()


def _for_ours(trace: Callable[..., VariableTracker]) -> Callable[..., VariableTracker]:
    @wraps(trace)
    def _method_register_hook(self: TensorVariable, tx: Any, name: str, hook: VariableTracker) -> VariableTracker:
        if self.source or name != "register_hook" or not is_ours(tx.output.compiler_fn):
            return trace(self, tx, name, hook)
        return _traced(self, tx, hook)

    return _method_register_hook


def _traced(hooked: TensorVariable, tx: Any, hook: VariableTracker) -> VariableTracker:
    """The operator in the graph in which the tensor was made, so that a checkpointed region that registers the hook does not hold it."""
    tensor = hooked.as_proxy()
    body, captured = _body(hooked, tx, hook)
    name = tx.output.install_subgraph("hook_body", GraphModule(dict(tx.output.nn_modules), body))
    held = tensor.tracer.create_proxy("get_attr", name, (), {})
    result = tensor.tracer.create_proxy("call_function", _register_hook, (tensor, held, *captured), {})
    result.node.meta["example_value"] = tensor.node.meta["example_value"]
    hooked.proxy = result
    hooked.synchronize_attributes(tx)
    return RemovableHandleVariable(mutation_type=ValueMutationNew())


def _body(hooked: TensorVariable, tx: Any, hook: VariableTracker) -> tuple[Any, list[Any]]:
    """The graph of the hook, and what it uses besides the gradient."""
    try:
        with tx.strict_translation_mode(lambda variable: variable.is_tensor()):
            _, graph, captured = speculate_subgraph(
                tx, hook, [hooked], {}, "register_hook", source_target=_register_hook, set_subgraph_inputs="automatic_with_forced_inputs",
            )  # fmt: skip # pyright: ignore[reportArgumentType]
    except UnknownPropertiesDuringBackwardTrace:
        unimplemented(
            gb_type="register_hook with stride-dependent code", context=str(hook),
            explanation="The strides of a gradient are unknown while a hook is traced.", hints=[],
        )  # fmt: skip
    return graph, list(captured)
