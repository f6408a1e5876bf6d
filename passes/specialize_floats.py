"""Python floats that Dynamo made inputs (`dynamic=True`) become constants of the program again.

    scale = l_scale_.item(); y = x * scale       →       y = x * 0.25

Legal as long as the value stays: the caller gets the values that were assumed and must compare them on every call.
"""

from collections.abc import Sequence

import torch
from torch import fx


def specialize_floats(gm: fx.GraphModule, inputs: Sequence[object]) -> dict[int, float]:
    """Replace `.item()` of scalar inputs by their values in `inputs`; returns the value assumed for each input index."""
    assumed: dict[int, float] = {}
    for index, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)):
        reads = [user for user in node.users if user.op == "call_method" and user.target == "item"]
        if not reads or not isinstance(value, torch.Tensor) or value.dim() != 0 or value.requires_grad:
            continue
        assumed[index] = value.item()
        for read in reads:
            _inline(read, assumed[index])
    gm.recompile()
    return assumed


def _inline(read: fx.Node, value: float) -> None:
    for user in list(read.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is read else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is read else n)
    read.graph.erase_node(read)
