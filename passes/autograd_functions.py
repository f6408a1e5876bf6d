"""Custom autograd functions as one operator each, with the forward and the backward their author wrote.

    autograd_function_apply(fwd_body, bwd_body, x, w, …)      →      autoseq.autograd_function([x, w], [], [], "gelu's key")

The operator is composite: tracing before autograd keeps it whole, as it keeps `linear`, and AOTAutograd opens it into torch's own
higher-order call, so that the backward joins the backward graph and Inductor fuses both. It carries only a key, which is made from
what the two bodies do: the same on every rank, and in every run.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._functorch.autograd_function import autograd_function_apply

_LIBRARY = torch.library.Library("autoseq", "FRAGMENT")
_LIBRARY.define("autograd_function(Tensor[] tensors, SymInt[] sizes, float[] floats, str key) -> Tensor[]")


@dataclass(frozen=True, slots=True)
class Slot:
    """An argument that is taken from one of the operator's lists."""

    list: Literal["tensors", "sizes", "floats"]
    index: int


@dataclass(frozen=True, slots=True)
class AutogradFunction:
    """What one key stands for."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    options: dict[str, Any]
    arguments: tuple[Any, ...]  # a Slot, or a constant
    results: tuple[int, ...]  # which of the forward's outputs are tensors: those that the operator returns
    row_wise: bool  # both bodies compute each element of their results from the same element of their operands
    draws: bool  # a body draws random numbers
    is_hook: bool = False  # `register_hook`: the forward is the identity, the backward what the hook does


FUNCTIONS: dict[str, AutogradFunction] = {}


def key_of(function: AutogradFunction) -> str:
    """A name for `function` that depends on what it does alone, not on where or when it was traced."""
    graphs = [m for body in (function.forward, function.backward) for m in body.modules() if isinstance(m, fx.GraphModule)]
    text = "\n".join([*(graph.code for graph in graphs), repr((function.options, function.arguments, function.row_wise, function.is_hook))])
    digest = hashlib.sha256(re.sub(r"(index=|cuda:)\d+", r"\1", text).encode())  # a rank's device is its own
    for tensor in (x for graph in graphs for x in (*graph.parameters(recurse=False), *graph.buffers(recurse=False))):
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _run(tensors: Sequence[Tensor], sizes: Sequence[Any], floats: Sequence[float], key: str) -> list[Tensor]:
    function = FUNCTIONS[key]
    lists = {"tensors": tensors, "sizes": sizes, "floats": floats}
    arguments = [lists[x.list][x.index] if isinstance(x, Slot) else x for x in function.arguments]
    results = autograd_function_apply(function.forward, function.backward, *arguments, **function.options)
    return [results[i] for i in function.results]


_LIBRARY.impl("autograd_function", _run, "CompositeImplicitAutograd")
AUTOGRAD_FUNCTION = torch.ops.autoseq.autograd_function.default
