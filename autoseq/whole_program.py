"""Programs that every rank runs whole: what Dynamo traced, on full inputs, with full outputs.

    no attention can be split · fewer tokens than ranks (a step of one token) · a size that only a tensor's value tells
    a write to an input that shares memory with another one

Legal because nothing is rewritten and every rank is given the same: outputs and gradients are one device's on each, so nothing is
summed, and random numbers are alike as the ranks' generators are. What an earlier program handed on as shards is gathered first.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from autoseq.passes.attention_site import LeftWhole
from autoseq.passes.short_attention import ShortAttention
from autoseq.passes.source import first_source
from autoseq.runtime.groups import SequenceGroup, process_group

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
"""What tracing raises where a size depends on the values of a tensor."""

NAMES_BREAKS = "; TORCH_LOGS=graph_breaks names what breaks it"

_READ = (
    "autoseq reads scaled_dot_product_attention, a softmax between two matrix products, nn.MultiheadAttention, flex_attention and "
    "flash-attn's functions (docs/attention.md)"
)


@dataclass(frozen=True, slots=True)
class Whole:
    """Why a program runs whole: what it is, the reason in words, and what the same reason of another length has in common with it."""

    what: str
    reason: str
    kind: str


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module of the same tensors and subgraphs, to be rewritten while `gm` stays what Dynamo traced."""
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(gm.graph, nodes))
    for node in gm.graph.find_nodes(op="placeholder"):
        if hasattr(node, "_dynamo_source"):
            nodes[node]._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    made = fx.GraphModule(gm, graph)
    made.meta.update(gm.meta)
    if hasattr(gm, "compile_subgraph_reason"):
        made.compile_subgraph_reason = gm.compile_subgraph_reason
    return made


# Why ------------------------------------------------------------------------------------------------------------------


def _named(is_part: bool) -> str:
    return "a part of the program" if is_part else "the program"


def too_short(short: ShortAttention) -> Whole:
    """None of a program's attentions has rows for all ranks; `short` is the first."""
    reason = f"the attention at {short.source} cannot be split: {short.reason}; the same program with longer inputs is split"
    return Whole("the program", reason, f"short {short.source}")


def no_attention(gm: fx.GraphModule, left_whole: Sequence[LeftWhole], *, is_part: bool) -> Whole:
    """Nothing in a program can be split."""
    if left_whole:
        calls = "; ".join(f"{call.source}: {call.reason}" for call in left_whole)
        reason = f"no attention can be split: {calls}"
    elif is_part:
        reason = f"the program was traced in several parts, and a part without attention runs whole on every rank{NAMES_BREAKS}"
    else:
        reason = f"no attention was found in the program that ends at {_end(gm)}. {_READ}"
    return Whole(_named(is_part), reason, f"{reason} {first_source(gm.graph)}")


def _end(gm: fx.GraphModule) -> str:
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    frame = reason.user_stack[-1] if reason is not None and reason.user_stack else None
    return f"{frame.filename}:{frame.lineno} in {frame.name}" if frame else "the compiled function"


def untraceable(gm: fx.GraphModule, error: Exception, *, is_part: bool) -> Whole:
    """A size of a program is a tensor's value, which a trace does not know."""
    reason = f"a size in it depends on the values of a tensor ({type(error).__name__}: {str(error).splitlines()[0]})"
    return Whole(_named(is_part), reason, f"values {first_source(gm.graph)}")


def writes_shared_inputs(gm: fx.GraphModule, *, is_part: bool) -> Whole:
    """Two inputs of a program overlap in memory, and the program writes to one of them; torch has no functional form of that."""
    reason = "two of its inputs share memory, and it writes to one of them (clone one of them first, and the program is split)"
    return Whole(_named(is_part), reason, f"shared inputs {first_source(gm.graph)}")


def no_rows_of_its_own(short: ShortAttention) -> str:
    """The message where a user wants each rank's own rows of a program whose attention is left whole."""
    return (
        f"outputs='local' gives each rank its own rows, and the attention at {short.source} cannot be split: {short.reason}, so some rank "
        "would have none. Use outputs='deferred' or 'full', or a smaller mesh, or pad the inputs"
    )


# Said once ------------------------------------------------------------------------------------------------------------

# By the group object, so a group that is made again under an old name hears everything again.
_said: weakref.WeakKeyDictionary[dist.ProcessGroup, set[str]] = weakref.WeakKeyDictionary()


def say_once(kind: str, group: SequenceGroup) -> bool:
    """True the first time that something of this kind is to be said of a program of this group: generation compiles several programs."""
    if not group.name:
        return True
    said = _said.setdefault(process_group(group.name), set())
    is_new = kind not in said
    said.add(kind)
    return is_new
