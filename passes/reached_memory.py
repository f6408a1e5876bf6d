"""Reached memory: what a program's caller can write to, of which the program has copies where one device has one memory.

    h = linear(x); return h, h[:, :4]      →      output 1 overlaps output 0
    y = attend(x); return y                →      output 0 is kept for the backward of attention

As Dynamo ran the program on fake tensors. The runtime refuses the writes that would show (`runtime.whole_value`, `runtime.kept_memory`).
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch.utils._pytree as pytree
from torch import SymInt, Tensor, fx
from torch._C._dynamo.guards import compute_overlapping_tensors  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
from torch._guards import TracingContext

from autoseq.passes.late_writes import keepers, memory_of, storage_of
from autoseq.passes.source import source_line
from autoseq.runtime.deferred import DeferredTensor


@dataclass(frozen=True, slots=True)
class Overlap:
    """An output and another output, or an input, by their numbers."""

    output: int
    other: int
    is_input: bool


@dataclass(frozen=True, slots=True)
class ReachedMemory:
    """What overlaps, and the inputs and outputs that a backward keeps, by their numbers, each with the source line that keeps it."""

    overlaps: Sequence[Overlap] = ()
    kept_inputs: Mapping[int, str] = field(default_factory=dict)
    kept_outputs: Mapping[int, str] = field(default_factory=dict)


def reached_memory(gm: fx.GraphModule) -> ReachedMemory:
    """That of a program as Dynamo traced it."""
    inputs, outputs = gm.graph.find_nodes(op="placeholder"), pytree.arg_tree_leaves(gm.graph.output_node().args[0])
    by_storage = keepers(gm.graph)

    def kept(nodes: Sequence[Any]) -> dict[int, str]:
        found = [(i, by_storage.get(memory_of(node))) for i, node in enumerate(nodes) if isinstance(node, fx.Node)]
        return {i: source_line(keeper) for i, keeper in found if keeper is not None}

    return ReachedMemory(_overlaps(_values(inputs), _values(outputs)), kept(inputs), kept(outputs))


def writes_overlapping_input(gm: fx.GraphModule) -> bool:
    """Whether two inputs of a program overlap, of which one was written to while Dynamo traced."""
    pairs = combinations(_values(gm.graph.find_nodes(op="placeholder")).values(), 2)
    return any(x._version > 0 for pair in pairs if _overlap(*pair) for x in pair)


def _overlaps(inputs: Mapping[int, Tensor], outputs: Mapping[int, Tensor]) -> list[Overlap]:
    """Each pair of outputs is there once."""
    found = []
    for i, output in outputs.items():
        found += [Overlap(i, j, False) for j, other in outputs.items() if j > i and _overlap(output, other)]
        found += [Overlap(i, j, True) for j, other in inputs.items() if _overlap(output, other)]
    return found


def _values(nodes: Sequence[object]) -> dict[int, Tensor]:
    values = {i: node.meta.get("example_value") for i, node in enumerate(nodes) if isinstance(node, fx.Node)}
    whole = {i: x.gathered if isinstance(x, DeferredTensor) else x for i, x in values.items()}
    return {i: x for i, x in whole.items() if isinstance(x, Tensor)}


def _overlap(a: Tensor, b: Tensor) -> bool:
    if storage_of(a) != storage_of(b):
        return False
    context = TracingContext.try_get()
    shapes = context.fake_mode.shape_env if context is not None and context.fake_mode is not None else None
    symbolic = any(isinstance(size, SymInt) for x in (a, b) for size in (*x.shape, *x.stride(), x.storage_offset()))
    with shapes.suppress_guards() if shapes is not None else nullcontext():  # whether two overlap is no condition of the program
        return bool(compute_overlapping_tensors([a, b], symbolic=symbolic))
