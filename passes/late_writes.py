"""Late writes: memory that a backward reads, written without autograd's knowledge. On one device the backward sees the new values.

    z = y * y                        # keeps y for its backward
    y.data.mul_(2)                   # changes what is kept, and no version counter tells

A functional graph keeps the values that were read. That backward is another one, so `hidden_writes` refuses such a program by name.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes


def keeper_of(write: fx.Node, written: Sequence[fx.Node]) -> fx.Node | None:
    """The first node before the write whose result's history keeps memory that is written, as Dynamo ran it on fake tensors."""
    targets = [node.meta.get("example_value") for node in written]
    memory = {target.untyped_storage()._cdata for target in targets if isinstance(target, Tensor)}
    seen: set[Any] = set()
    with _disable_current_modes():  # Dynamo's fake tensors are not this trace's
        for node in write.graph.nodes:
            if node is write:
                return None
            result = node.meta.get("example_value")
            if node.op.startswith("call") and isinstance(result, Tensor) and _keeps(_history(result), memory, seen):
                return node
    return None


def _history(x: Tensor) -> Any:
    try:
        return x.grad_fn
    except RuntimeError:  # a view made under no_grad whose base was written since: autograd lets nothing use its history
        return None


def _keeps(history: Any, memory: set[int], seen: set[Any]) -> bool:
    """Whether a part of an autograd graph that was not seen yet keeps a tensor of some memory."""
    waiting = [history]
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if any(x.untyped_storage()._cdata in memory for x in _kept(function)):
            return True
        waiting += [following for following, _ in function.next_functions]
    return False


def _kept(function: Any) -> list[Tensor]:
    found: list[Any] = []
    for name in dir(function):
        if name.startswith("_saved_"):
            try:
                value = getattr(function, name)
            except RuntimeError:  # its version says that it was written later, which autograd reports itself
                continue
            found += value if isinstance(value, (list, tuple)) else [value]
    return [x for x in found if isinstance(x, Tensor)]
