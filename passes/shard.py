"""Shard: the global graph becomes the graph of one rank, with communication where a value must change its placement.

    x: [B, S, E]                              x: Shard(1) [B, s, E]
    y = linear(x, w)                 →        y = linear(x, vary(w))              # Shard(1)
    z = unknown_op(y)                         z = unknown_op(all_gather(y))       # Replicate: a fallback

Legal because each node is replaced by one that computes the same value under its placement: a factor that passes keeps
rows where they are, a contracted one leaves a partial sum that is reduced at once, anything else runs on whole values.
Replicated values that meet sharded ones go through `vary`, whose gradient sums over ranks (DESIGN's table of transposes).
How a value gets the placement that a user needs is `placements`; one operator on local rows is `local_node`.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoseq.passes.attention_site import LEFT_WHOLE, is_attention
from autoseq.passes.dispatch import find_dispatches
from autoseq.passes.factors import MARK, Factors, Mark, Place, Size, fits, locate, operand_at, place_in, tensor_operands
from autoseq.passes.find_sequence import factors_of
from autoseq.passes.local_dispatch import LocalDispatch
from autoseq.passes.local_move import moved_results
from autoseq.passes.local_node import LocalNode
from autoseq.passes.placements import Placements, Value, read_operands, writes
from autoseq.passes.rules import rule_for
from autoseq.passes.source import source_line
from autoseq.runtime.layout import Layout, local_length

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Fallback:
    """A step that runs on gathered values: the operator, its source line, why, and the bytes a rank sends for it."""

    op: str
    source: str
    reason: str
    bytes_per_rank: int


@dataclass(frozen=True, slots=True)
class SizeOutput:
    """A symbolic size, which the local graph returns behind the program's own outputs."""

    index: int


RunTimeSize = int | SizeOutput


@dataclass(frozen=True, slots=True)
class ShardedOutput:
    """An output of the graph that is a shard, and what it takes to gather it: the sharding's sizes, the global shape."""

    index: int
    name: str
    source: str
    shape: tuple[RunTimeSize, ...]
    dim: int
    outer: RunTimeSize
    length: RunTimeSize
    local: RunTimeSize


@dataclass(frozen=True, slots=True)
class Sharding:
    """What `shard` did."""

    fallbacks: list[Fallback]
    outputs: list[ShardedOutput]


def shard(gm: fx.GraphModule, *, group: str, group_size: int, layout: Layout, gather_outputs: bool = False) -> Sharding:
    """Rewrite `gm` in place for one rank of `group`; needs the marks of `find_sequence`."""
    sharder = _Sharder(gm, group, group_size, layout, gather_outputs)
    sharder.run()
    return Sharding(sharder.fallbacks, sharder.outputs)


class _Sharder(Placements):
    def __init__(self, gm: fx.GraphModule, group: str, P: int, layout: Layout, gather_outputs: bool) -> None:
        super().__init__(gm, group, P, layout)
        self.gm, self.gather_outputs = gm, gather_outputs
        self.fallbacks: list[Fallback] = []
        self.outputs: list[ShardedOutput] = []
        self.dispatches: dict[fx.Node, LocalDispatch | None] = {}

    def run(self) -> None:
        self.start(self.gm.graph.find_nodes(op="placeholder"))
        regions = {node: region for region in find_dispatches(self.gm) for node in region.kinds}
        for node in self.gm.graph.nodes:
            region = regions.get(node)
            if region is not None and region.root is node:
                self.dispatches[node] = LocalDispatch.begin(self, region)
            dispatch = self.dispatches[region.root] if region is not None else None
            if dispatch is not None:
                dispatch.emit(node)
            elif node.op != "placeholder":
                self._visit(node)
        self._note_cut_anew()
        self.finish()
        self.gm.graph = self.graph

    def _visit(self, node: fx.Node) -> None:
        if node.op == "output":
            self._output(node)
        elif node.op == "get_attr" or node.target is operator.getitem or node.target in _SIZE_READS or not _touches_tensor(node):
            self._keep(node)
        elif is_attention(node):
            self._attention(node)
        else:
            self._operator(node)

    def _keep(self, node: fx.Node) -> None:
        """Copy a node that placement does not touch: inputs, attributes, sizes, grad-mode calls, items of a tuple."""
        if node in self.values:
            return  # an item that was made with its tuple
        if node.target in _SIZE_READS:
            size = self.sizes.argument(node.meta["val"])  # the size of a sharded tensor is still the global one
            self.values[node] = Value(size, None, {})
            return
        mark = None
        if node.target is operator.getitem:
            marks = self.values[node.args[0]].mark  # type: ignore[index]
            mark = marks[node.args[1]] if isinstance(marks, tuple) else None  # type: ignore[index]
        copied = self.graph.node_copy(node, self.plain)
        self.values[node] = Value(copied, mark, {})

    def _set(self, node: fx.Node, made: fx.Node, mark: Any) -> None:
        for key, item in node.meta.items():
            if key not in (MARK, "tensor_meta", "val"):
                made.meta.setdefault(key, item)
        self.values[node] = Value(made, mark, {})

    # One node ---------------------------------------------------------------------------------------------------------

    def _operator(self, node: fx.Node) -> None:
        factors, rule = (None, None) if writes(node) else (factors_of(node), rule_for(node))
        place = self._place(node, factors) if factors else None
        if place is not None and factors is not None and rule is not None:
            self._set(node, *LocalNode(self, node, factors, rule, place).run())
        elif (moved := moved_results(self, node)) is not None:
            for result, made, mark in moved:
                self._set(result, made, mark)
        else:
            self._run_whole(node, "no sharding rule" if factors is None else "the sequence must be whole here")

    def _place(self, node: fx.Node, factors: Factors) -> Place | None:
        """The factor to shard: the one that the result's mark or else a sharded operand's names, if the rule allows it."""
        results = [node] if not isinstance(node.meta["val"], (list, tuple)) else [u for u in node.users if u.target is operator.getitem]
        for result in results:
            index = 0 if result is node else result.args[1]
            if MARK in result.meta:
                place = locate(factors.results[index], factors.sizes, result.meta[MARK])  # type: ignore[index]
                if place is not None and self._allowed(node, factors, place):
                    return place
        for path, dims in zip(tensor_operands(node), factors.operands, strict=True):
            operand = operand_at(node, path)
            if operand is None or dims is None or self.values[operand].mark is None:
                continue
            place = locate(dims, factors.sizes, self.values[operand].mark)  # type: ignore[arg-type]
            if place is not None and self._allowed(node, factors, place):
                return place
        return None

    def _allowed(self, node: fx.Node, factors: Factors, place: Place) -> bool:
        if not factors.admits(place) or not self._fit(node, factors, place):
            return False
        if not factors.is_partial(place.factor):
            return True
        # A partial sum must be linear in everything it adds up: an operand without the factor would be added P times.
        present = [any(place.factor in dim for dim in dims) for dims in factors.operands if dims is not None]
        return place.factor in factors.sums and (all(present) or rule_for(node).local is not None)  # type: ignore[union-attr]

    def _fit(self, node: fx.Node, factors: Factors, place: Place) -> bool:
        for path, dims in zip(tensor_operands(node), factors.operands, strict=True):
            mark = place_in(dims, factors.sizes, place) if dims is not None else None
            if mark is not None and not fits(operand_at(node, path).meta["val"].shape, mark):  # type: ignore[union-attr]
                return False
        return True

    def _run_whole(self, node: fx.Node, reason: str) -> None:
        rule = rule_for(node)
        read = node.all_input_nodes if rule is None else read_operands(node, rule)
        gathered = {n: self.values[n].mark for n in read if self.values[n].mark is not None and not self.can_be_made_again(n)}
        if gathered or LEFT_WHOLE in node.meta:
            sent = sum(self.gather_bytes(n, mark) for n, mark in gathered.items())  # type: ignore[arg-type]
            self.fallbacks.append(Fallback(_op_name(node), source_line(node), node.meta.get(LEFT_WHOLE, reason), sent))
        made = self.graph.node_copy(node, self.whole_operands(node).__getitem__)
        made.meta = dict(node.meta)
        self._set(node, made, None)

    def _note_cut_anew(self) -> None:
        """The shards that were gathered to be cut up otherwise, one for each source line that is not among the fallbacks yet."""
        reason = "its rows are cut up as those of another sequence than the step that reads it needs"
        told = {fallback.source for fallback in self.fallbacks}
        for node, mark in self.cut_anew.items():
            if (source := source_line(node)) not in told:
                told.add(source)
                self.fallbacks.append(Fallback(_op_name(node), source, reason, self.gather_bytes(node, mark)))

    def _attention(self, node: fx.Node) -> None:
        """q, k and v by rows; what mask and score look up is whole."""
        marks = [node.args[i].meta[MARK] for i in range(3)]  # type: ignore[union-attr]
        ours = [Mark(2, 1, 1, mark.base) for mark in marks]
        q, k, v = (self.sharded(x, mark) for x, mark in zip(node.args[:3], ours, strict=True))  # type: ignore[arg-type]
        # A rank computes with its own rows or heads only, so what it finds of a gradient of these is a share.
        captures = [self.varied(c) for c in node.args[3]]  # type: ignore[union-attr]
        sinks, seed = (x if x is None else convert(x) for x, convert in zip(node.args[4:6], (self.varied, self.whole), strict=True))
        made = self.graph.call_function(
            node.target, (q, k, v, captures, sinks, seed),  # type: ignore[arg-type]
            {**{key: fx.map_arg(value, self.plain) for key, value in node.kwargs.items()}, "layout": self.layout, "group": self.group},
        )
        self._set(node, made, ours[0])

    def _output(self, node: fx.Node) -> None:
        results, sizes = [], []
        count = len(node.args[0])  # type: ignore[arg-type]

        def at_run_time(size: Size) -> RunTimeSize:
            argument = self.sizes.argument(size)
            if isinstance(argument, int):
                return argument
            sizes.append(argument)
            return SizeOutput(count + len(sizes) - 1)

        for index, result in enumerate(node.args[0]):  # type: ignore[arg-type]
            if not isinstance(result, fx.Node):
                results.append(result)
                continue
            value = self.values[result]
            if value.mark is None or self.gather_outputs:
                results.append(self.whole(result))
                continue
            results.append(value.node)
            val, mark = result.meta["val"], value.mark
            self.outputs.append(ShardedOutput(
                index, result.name, source_line(result), tuple(at_run_time(size) for size in val.shape), mark.dim,
                at_run_time(mark.outer), at_run_time(self.length(val, mark)),
                at_run_time(local_length(mark.base, self.P, self.layout))))
        self.graph.output((*results, *sizes))


_SIZE_READS = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int, aten.sym_storage_offset.default)


def _touches_tensor(node: fx.Node) -> bool:
    vals = [node.meta.get("val"), *(n.meta.get("val") for n in node.all_input_nodes)]
    return any(isinstance(v, (torch.Tensor, list, tuple)) for v in vals)


def _op_name(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", str(node.target))
