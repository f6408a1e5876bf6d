"""Keep meaning: what `normalize`'s trace would drop from Dynamo's graph without a word is made explicit, or refused.

    y = linear(x, w).float()        # bfloat16 under autocast    →    y = aten._to_copy(linear(x, w), dtype=float32)
    y = x.data                      # no gradient                →    y = aten.detach(x)
    y.register_hook(f)              # changes y's gradient       →    y = autoseq.autograd_function([y], …)
    y = MyFunction.apply(x)         # its own backward           →    y = autoseq.autograd_function([x], …)

The trace runs above autocast, where `linear` still gives float32 and the cast looks idle; autocast is applied when the local
graph is compiled, and the explicit copy is then a real cast. Legal because a copy in the same dtype has the same values, and
because `.data` is `detach`, whose writes `hidden_writes` sees. Custom backwards and hooks have files of their own, `keep_*.py`.
"""

import torch
from torch import fx

from autoseq.passes.autocast import ENTER
from autoseq.passes.keep_autograd_functions import keep_autograd_functions
from autoseq.passes.keep_hooks import keep_hooks

aten = torch.ops.aten
_METHOD_DTYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


def keep_meaning(gm: fx.GraphModule) -> int:
    """Rewrite the casts, detaches, custom backwards and hooks that tracing would drop; returns how many."""
    kept = keep_autograd_functions(gm) + keep_hooks(gm) + _keep_detaches(gm) + (_keep_casts(gm) if _under_autocast(gm) else 0)
    gm.recompile()
    return kept


def _keep_detaches(gm: fx.GraphModule) -> int:
    data = torch._C._autograd._get_data_attr  # pyright: ignore[reportAttributeAccessIssue]
    reads = gm.graph.find_nodes(op="call_function", target=data)
    for node in reads:
        node.target = aten.detach.default
    return len(reads)


def _keep_casts(gm: fx.GraphModule) -> int:
    kept = 0
    for node in gm.graph.nodes:
        dtype = _cast_dtype(node) if node.op == "call_method" else None
        if dtype is not None:
            node.op, node.target = "call_function", aten._to_copy.default
            node.args, node.kwargs = node.args[:1], {"dtype": dtype}
            kept += 1
    return kept


def _under_autocast(gm: fx.GraphModule) -> bool:
    ambient = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda") if torch.amp.is_autocast_available(device))
    return ambient or bool(gm.graph.find_nodes(op="call_function", target=ENTER))


def _cast_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype that a method call casts to, if that is all it does."""
    if node.target in _METHOD_DTYPES:
        return _METHOD_DTYPES[str(node.target)]
    given = [*node.args[1:], *node.kwargs.values()]
    return given[0] if node.target == "to" and len(given) == 1 and isinstance(given[0], torch.dtype) else None
