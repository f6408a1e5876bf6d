"""A graph as text that a person reads: a line a node, with dtype, shape, placement and the model's own source line.

    linear_3: f32[1, 16384, 4096] Shard(1) = aten.linear(mul_2, vary_7)        # modeling_llama.py:243
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._dtype_abbrs import dtype_abbrs

from autoseq.passes.source import source_line

_GLOBAL = "global_shape"
_SHOWN_ITEMS = 6


def remember_global(name: str, gm: fx.GraphModule) -> None:
    """An observer of passes: notes each value's global shape before `shard`, which hands notes on to the local nodes."""
    if name != "find_sequence":
        return
    for node in gm.graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            node.meta[_GLOBAL] = tuple(node.meta["val"].shape)


def graph_lines(graph: fx.Graph) -> Iterator[str]:
    """The graph, line by line."""
    for node in graph.nodes:
        if node.op == "output":
            yield f"return {_argument(node.args[0])}"
            continue
        made = " ".join(part for part in (f"{node.name}:", _type(node.meta.get("val")), placement(node), "=", _call(node)) if part)
        where = "" if node.op == "placeholder" else source_line(node)
        yield f"{made:<110}  # {short_source(where)}" if where and not where.startswith("(no") else made


def short_source(source: str) -> str:
    """`models/llama.py:12 in forward: code` without the folder, function and code."""
    return source.split(" in ")[0].split("/")[-1]


def placement(node: fx.Node) -> str:
    """`Shard(dim)` where a local value has fewer rows than the global one, `Replicate`, or "" if it is not known."""
    val, whole = node.meta.get("val"), node.meta.get(_GLOBAL)
    name = getattr(node.target, "__name__", "")
    if name in ("take_shard", "reduce_scatter"):
        return f"Shard({node.kwargs['dim']})"
    if name in ("all_gather", "all_gather_varying", "all_reduce", "vary"):
        return "Replicate"
    if whole is None or not isinstance(val, torch.Tensor) or val.dim() != len(whole):
        return ""
    dims = [dim for dim, (ours, all_) in enumerate(zip(val.shape, whole, strict=True)) if ours != all_]
    return "Replicate" if not dims else f"Shard({dims[0]})"


def _type(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        return f"{dtype_abbrs[val.dtype]}[{', '.join(map(str, val.shape))}]"
    return f"({len(val)} tensors)" if isinstance(val, (list, tuple)) else ""


def _call(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"input {node.meta.get('source_name', node.target)}"
    if node.op == "get_attr":
        return f"held {node.target}"
    arguments = [*map(_argument, node.args), *(f"{key}={_argument(value)}" for key, value in node.kwargs.items())]
    return f"{_operator(node.target)}({', '.join(arguments)})"


def _operator(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    module = getattr(target, "__module__", "").removeprefix("autoseq.runtime.")
    name = getattr(target, "__name__", str(target))
    return name if module in ("_operator", "builtins", "") else f"{module}.{name}"


def _argument(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        items = [_argument(item) for item in value[:_SHOWN_ITEMS]]
        left = len(value) - len(items)
        return f"[{', '.join(items)}{f', … {left} more' if left else ''}]"
    return repr(value) if isinstance(value, str) else str(value)
