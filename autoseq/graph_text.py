"""A graph as text that a person reads: a line a node, with dtype, shape, placement and the model's own source line.

    linear_3: f32[1, 16384, 4096] Shard(1) = aten.linear(mul_2, vary_7)        # modeling_llama.py:243
"""

import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._dtype_abbrs import dtype_abbrs

from autoseq.passes.source import source_line

_GLOBAL = "global_shape"
ORIGIN = "origin"
"""On nodes of the local graph, and those before: the name of the global graph's node that it computes."""
_SHOWN_ITEMS = 6
_SOURCE_COLUMN = 120
# Of autoseq's own calls: what differs from one to the next. The rest (sizes, layout, group) is the same all over the graph.
_SHOWN_KEYWORDS = ("dim", "outer", "scale", "max_ahead", "max_behind", "predicate", "reduction")


def remember_global(name: str, gm: fx.GraphModule) -> None:
    """An observer of passes: notes each value's name and global shape before `shard`, which hands notes on to the local nodes."""
    if name != "find_sequence":
        return
    for node in gm.graph.nodes:
        node.meta[ORIGIN] = node.name
        if isinstance(node.meta.get("val"), torch.Tensor):
            node.meta[_GLOBAL] = tuple(node.meta["val"].shape)


def graph_lines(graph: fx.Graph) -> Iterator[str]:
    """The graph, line by line; a varied parameter stands inside the line that uses it, as `vary(head.weight)`."""
    names = shown_names(graph)
    for node in graph.nodes:
        if node.op == "output":
            yield f"return {_argument(node.args[0], names)}"
        elif names[node] == node.name or node.op in ("placeholder", "get_attr"):
            yield _line(node, names)


def _line(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    made = " ".join(part for part in (f"{names[node]}:", type_text(node.meta.get("val")), placement(node), *_call(node, names)) if part)
    where = "" if node.op == "placeholder" else source_line(node)
    return made if not where or where.startswith("(no") else f"{made:<{_SOURCE_COLUMN}}  # {short_source(where)}"


def shown_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """What each node is called: parameters and inputs as in the model."""
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        source = node.args[0] if node.target is operator.getitem else None
        if node.op == "placeholder":
            names[node] = parameter_name(str(node.meta.get("source_name", node.target)))
        elif isinstance(source, fx.Node) and getattr(source.target, "__name__", "") == "vary_many":
            names[node] = f"vary({names[source.args[0][node.args[1]]]})"  # type: ignore[index]
        else:
            names[node] = node.name
    return names


def parameter_name(dynamo_name: str) -> str:
    """`L_self_modules_head_parameters_weight_` as the model calls it: `head.weight`."""
    dotted = re.sub(r"_(?:modules|parameters|buffers)_", ".", dynamo_name.removeprefix("L_self"))
    return re.sub(r"^L_(kwargs_|args_)?", "", dotted).strip("._") or dynamo_name


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


def type_text(val: Any) -> str:
    """`f32[1, 4096, 256]`."""
    if isinstance(val, torch.Tensor):
        return f"{dtype_abbrs[val.dtype]}[{', '.join(map(str, val.shape))}]"
    return f"({len(val)} tensors)" if isinstance(val, (list, tuple)) else ""


def _call(node: fx.Node, names: Mapping[fx.Node, str]) -> tuple[str, ...]:
    return ("= input",) if node.op == "placeholder" else ("=", call_text(node, names))


def call_text(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    """`aten.linear(mul_4, vary(head.weight))`."""
    if node.op == "get_attr":
        return f"held {node.target}"
    keywords = node.kwargs
    if not _is_operator(node.target):
        keywords = {key: value for key, value in keywords.items() if key in _SHOWN_KEYWORDS and value not in (None, "")}
    arguments = [*(_argument(a, names) for a in node.args), *(f"{key}={_argument(value, names)}" for key, value in keywords.items())]
    return f"{operator_text(node.target)}({', '.join(arguments)})"


def _is_operator(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload)


def operator_text(target: Any) -> str:
    """`aten.linear`, `ring.attention`."""
    if _is_operator(target):
        return str(target).removesuffix(".default")
    module = getattr(target, "__module__", "").removeprefix("autoseq.runtime.")
    name = getattr(target, "__name__", str(target))
    return name if module in ("_operator", "builtins", "") else f"{module}.{name}"


def _argument(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, (list, tuple)):
        items = [_argument(item, names) for item in value[:_SHOWN_ITEMS]]
        left = len(value) - len(items)
        return f"[{', '.join(items)}{f', … {left} more' if left else ''}]"
    if isinstance(value, fx.Node):
        return names[value]
    return repr(value) if isinstance(value, str) else str(value)
