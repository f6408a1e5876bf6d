"""Keep casts: under autocast, a cast that looks idle to the tracer is not.

    y = linear(x, w).float()       # bfloat16 under autocast     →     y = aten._to_copy(linear(x, w), dtype=float32)

`normalize` traces above autocast, where `linear` still gives float32 and `.float()` would be dropped as a cast of float32
to float32. Autocast itself is applied later, when the local graph is compiled; the explicit copy is then a real cast.
Legal because a copy in the same dtype has the same values.
"""

import torch
from torch import fx

_METHOD_DTYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


def keep_casts(gm: fx.GraphModule) -> int:
    """Make the casts of Dynamo's graph explicit if any of it runs under autocast; returns how many."""
    if not _under_autocast(gm):
        return 0
    kept = 0
    for node in gm.graph.find_nodes(op="call_method", target="to") + [
        n for name in _METHOD_DTYPES for n in gm.graph.find_nodes(op="call_method", target=name)
    ]:
        dtype = _cast_dtype(node)
        if dtype is None:
            continue
        node.op, node.target = "call_function", torch.ops.aten._to_copy.default
        node.args, node.kwargs = node.args[:1], {"dtype": dtype}
        kept += 1
    gm.recompile()
    return kept


def _under_autocast(gm: fx.GraphModule) -> bool:
    ambient = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda") if torch.amp.is_autocast_available(device))
    return ambient or bool(gm.graph.find_nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast))


def _cast_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype that a method call casts to, if that is all it does."""
    if node.target in _METHOD_DTYPES:
        return _METHOD_DTYPES[str(node.target)]
    given = [*node.args[1:], *node.kwargs.values()]
    return given[0] if len(given) == 1 and isinstance(given[0], torch.dtype) else None
