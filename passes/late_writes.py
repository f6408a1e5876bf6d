"""Late writes: memory that a backward reads, written without autograd's knowledge. On one device the backward sees the new values.

    z = y * y                        # keeps y for its backward
    y.data.mul_(2)                   # changes what is kept, and no version counter tells

A functional graph keeps the values that were read, so that its backward is another one. `hidden_writes` refuses such a program by name;
a write behind the program is refused when the backward begins (`runtime.kept_memory`).
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from autoseq.runtime.deferred import DeferredTensor


def keeper_of(write: fx.Node, written: Sequence[fx.Node], by_storage: Mapping[int, fx.Node]) -> fx.Node | None:
    """The first node before the write whose result's history keeps memory that is written; `by_storage` are the graph's `keepers`."""
    found = [by_storage[storage] for storage in map(memory_of, written) if storage in by_storage]
    return min((keeper for keeper in found if keeper < write), default=None)


def keepers(graph: fx.Graph) -> dict[int, fx.Node]:
    """For each storage that is kept, by its number, the first node that does so."""
    found: dict[int, fx.Node] = {}
    seen: set[Any] = set()
    with _disable_current_modes():  # Dynamo's fake tensors are not this trace's
        for node in graph.nodes:
            result = node.meta.get("example_value") if node.op.startswith("call") else None
            for x in pytree.tree_leaves(result):
                for kept in _kept_by_history(_history(x), seen) if isinstance(x, Tensor) else ():
                    found.setdefault(storage_of(kept), node)
    return found


def memory_of(node: fx.Node) -> int:
    """The number of a node's storage; 0 if it has none."""
    value = node.meta.get("example_value")
    return storage_of(value) if isinstance(value, Tensor) else 0


def storage_of(x: Tensor) -> int:
    """The number of a tensor's storage."""
    whole = x.gathered if isinstance(x, DeferredTensor) else None  # a wrapper has no memory of its own
    return (x if whole is None else whole).untyped_storage()._cdata


def _history(x: Tensor) -> Any:
    try:
        return x.grad_fn
    except RuntimeError:  # a view made under no_grad whose base was written since: autograd lets nothing use its history
        return None


def _kept_by_history(history: Any, seen: set[Any]) -> list[Tensor]:
    """What the part of an autograd graph that was not seen yet keeps."""
    waiting, found = [history], []
    while waiting:
        function = waiting.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        found += _kept(function)
        waiting += [following for following, _ in function.next_functions]
    return found


def _kept(function: Any) -> list[Tensor]:
    found: list[Any] = []
    for name in _names_of_kept(type(function)):
        try:
            value = getattr(function, name)
        except RuntimeError:  # its version says that it was written later, which autograd reports itself
            continue
        found += value if isinstance(value, (list, tuple)) else [value]
    return [x for x in found if isinstance(x, Tensor)]


@cache
def _names_of_kept(kind: type) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_saved_")]
