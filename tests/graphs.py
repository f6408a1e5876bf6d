"""Graphs of small functions at a chosen stage of the pipeline, traced the way the backend traces them."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autoseq.passes.find_attention import find_attention, is_attention
from autoseq.passes.normalize import drop_noops, normalize
from autoseq.passes.open_regions import open_regions
from autoseq.passes.read_masks import DenseMask, read_masks
from autoseq.program import fake_inputs
from autoseq.runtime.formula import Points
from autoseq.runtime.mask import Mask


@dataclass(frozen=True, slots=True)
class Traced:
    """One function's graph: as Dynamo made it, with regions opened, normalized; the inputs it is called with."""

    dynamo: fx.GraphModule
    opened: fx.GraphModule
    num_opened: int
    normal: fx.GraphModule
    inputs: list[Any]


class _Seen(Exception):
    """Ends the call of a compiled function: its graph was seen."""


def trace(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> Traced:
    """Dynamo's one graph of `fn(*args)`, and what the first passes make of it."""
    seen: list[Traced] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        before = copy.deepcopy(gm)
        num_opened = open_regions(gm, inputs)
        real = [x.node.hint if isinstance(x, torch.SymInt) else x for x in inputs]
        seen.append(Traced(before, gm, num_opened, normalize(gm, fake_inputs(gm, inputs)), real))
        return stop

    def stop(*_: Any) -> Any:
        raise _Seen

    torch._dynamo.reset()
    try:
        torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    except _Seen:
        pass
    finally:
        torch._dynamo.reset()
    return seen[0]


def run(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """What a graph computes for its inputs, a copy of which it may write to."""
    with torch.no_grad():
        return list(fx.Interpreter(gm).run(*[x.clone() if isinstance(x, Tensor) else x for x in inputs]))


def check_same_values(before: list[Any], after: list[Any]) -> None:
    """A rewrite kept every output, bit for bit."""
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def targets(gm: fx.GraphModule) -> list[str]:
    """The operators of a graph, in order: `aten.add.Tensor`."""
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def count(gm: fx.GraphModule, target: Any) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=target))


# Masks ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadMask:
    """What `read_masks` made of one attention's mask: its text, its report if it stays dense, the lookups that are left."""

    text: str
    dense: list[DenseMask]
    captures: list[tuple[int, ...]]


def check_mask(make: Callable[..., Tensor], *data: Tensor, dynamic: bool = False) -> ReadMask:
    """Read the mask that `make(*data)` computes, and hold what was read to the tensor itself at every (b, h, q, k)."""
    actual = make(*data)
    lead = [1] * (4 - actual.dim()) + list(actual.shape)
    B, H, Q, K = lead
    q, k = torch.zeros(B, H, Q, 2), torch.zeros(B, H, K, 2)

    def attend(q: Tensor, k: Tensor, m: Tensor | None = None) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=make() if m is None else make(m))

    traced = trace(attend, q, k, *data, dynamic=dynamic)
    gm = traced.normal
    drop_noops(gm)
    find_attention(gm)
    (site,) = [node for node in gm.graph.nodes if is_attention(node)]
    _, dense = read_masks(gm)
    gm.graph.eliminate_dead_code()
    captures = values_of(gm, site.args[3], traced.inputs)
    points = Points.of(B, range(H), torch.arange(Q), torch.arange(K))
    read = Mask(site.kwargs["max_ahead"], site.kwargs["max_behind"], site.kwargs["predicate"])
    allowed = read.allowed(points, captures)
    allowed = torch.ones((), dtype=torch.bool) if allowed is None else allowed
    text = site.meta["attention"]["mask"]
    differ = (allowed.expand(B, H, Q, K) != actual.expand(B, H, Q, K)).nonzero()
    assert not len(differ), f"{text!r} ({read}) is wrong at (b, h, q, k) = {differ[:3].tolist()} and {len(differ)} in all"
    return ReadMask(text, dense, [tuple(c.shape) for c in captures])


def values_of(gm: fx.GraphModule, nodes: Sequence[fx.Node], inputs: Sequence[Any]) -> list[Tensor]:
    """The values of some nodes of a graph when it is run."""
    wanted: dict[fx.Node, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in nodes:
                wanted[n] = value
            return value

    Keep(gm).run(*inputs)
    return [wanted[node] for node in nodes]
