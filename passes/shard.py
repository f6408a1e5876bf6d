"""Shard: the global graph becomes the graph of one rank, with communication where a value must change its placement.

    x: [B, S, E]                              x: Shard(1) [B, s, E]
    y = linear(x, w)                 →        y = linear(x, vary(w))              # Shard(1)
    z = unknown_op(y)                         z = unknown_op(all_gather(y))       # Replicate: a fallback

Legal because each node is replaced by one that computes the same value under its placement: a factor that passes keeps
rows where they are, a contracted one leaves a partial sum that is reduced at once, anything else runs on whole values.
Replicated values that meet sharded ones go through `vary`, whose gradient sums over ranks (DESIGN's table of transposes).

Conversions are emitted right after the value they convert, not where they are used: a value made under grad is converted
under grad, whatever region its user stands in.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoseq.passes.attention_site import is_attention
from autoseq.passes.factors import MARK, Factors, Mark, Place, Size, fits, locate, operand_at, place_in, product, tensor_operands
from autoseq.passes.find_sequence import factors_of
from autoseq.passes.local_move import moved_results
from autoseq.passes.local_node import LocalNode
from autoseq.passes.rules import Rule, rule_for
from autoseq.passes.sizes import Sizes, hint
from autoseq.passes.source import source_line
from autoseq.runtime import collectives
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


@dataclass(slots=True)
class _Value:
    """A node of the global graph as the local graph has it: `mark` says how it is sharded, None means replicated."""

    node: fx.Node
    mark: Mark | None
    converted: dict[str, fx.Node]


def shard(gm: fx.GraphModule, *, group: str, group_size: int, layout: Layout, gather_outputs: bool = False) -> Sharding:
    """Rewrite `gm` in place for one rank of `group`; needs the marks of `find_sequence`."""
    sharder = _Sharder(gm, group, group_size, layout, gather_outputs)
    sharder.run()
    return Sharding(sharder.fallbacks, sharder.outputs)


class _Sharder:
    def __init__(self, gm: fx.GraphModule, group: str, P: int, layout: Layout, gather_outputs: bool) -> None:
        self.gm, self.group, self.P, self.layout = gm, group, P, layout
        self.gather_outputs = gather_outputs
        self.graph = fx.Graph(gm)
        self.values: dict[fx.Node, _Value] = {}
        self.fallbacks: list[Fallback] = []
        self.outputs: list[ShardedOutput] = []
        self.top: set[fx.Node] = set()  # conversions of inputs, which stand between the anchors
        self.remade: dict[fx.Node, bool] = {}

    def run(self) -> None:
        old = self.gm.graph
        for node in old.find_nodes(op="placeholder"):
            self._keep(node)
        # Two anchors keep the top in order: the inputs, the sizes made of them, the inputs' conversions, the rest.
        self.sizes_end = self.graph.call_function(len, ((),))
        self.conversions_end = self.graph.call_function(len, ((),))
        self.sizes = Sizes(self.graph, self.sizes_end)
        for node in old.find_nodes(op="placeholder"):
            self.sizes.bind(self.values[node].node)
        for node in old.nodes:
            if node.op != "placeholder":
                self._visit(node)
        for anchor in (self.conversions_end, self.sizes_end):
            self.graph.erase_node(anchor)
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

    # Values and their conversions -------------------------------------------------------------------------------------

    def _keep(self, node: fx.Node) -> None:
        """Copy a node that placement does not touch: inputs, attributes, sizes, grad-mode calls, items of a tuple."""
        if node in self.values:
            return  # an item that was made with its tuple
        if node.target in _SIZE_READS:
            size = self.sizes.argument(node.meta["val"])  # the size of a sharded tensor is still the global one
            self.values[node] = _Value(size, None, {})
            return
        mark = None
        if node.target is operator.getitem:
            marks = self.values[node.args[0]].mark  # type: ignore[index]
            mark = marks[node.args[1]] if isinstance(marks, tuple) else None  # type: ignore[index]
        copied = self.graph.node_copy(node, self.plain)
        self.values[node] = _Value(copied, mark, {})

    def plain(self, node: fx.Node) -> Any:
        return self.values[node].node

    def mark_of(self, node: fx.Node) -> Mark | None:
        return self.values[node].mark

    def _set(self, node: fx.Node, made: fx.Node, mark: Any) -> None:
        for key, item in node.meta.items():
            if key not in (MARK, "tensor_meta", "val"):
                made.meta.setdefault(key, item)
        self.values[node] = _Value(made, mark, {})

    def _length(self, val: torch.Tensor, mark: Mark) -> Size:
        return val.shape[mark.dim] // (mark.outer * mark.inner)

    def sharding(self, val: torch.Tensor, mark: Mark) -> dict[str, Any]:
        """The keyword arguments by which the runtime's collectives know a sharding of a tensor like `val`."""
        return {
            "dim": mark.dim,
            "outer": self.sizes.argument(mark.outer),
            "length": self.sizes.argument(self._length(val, mark)),
            "local": self.sizes.argument(local_length(mark.base, self.P, self.layout)),
            "layout": self.layout,
            "group": self.group,
        }

    def whole(self, node: fx.Node) -> fx.Node:
        """The replicated form of a value."""
        value = self.values[node]
        if value.mark is None:
            return value.node
        if "whole" not in value.converted and self._can_be_made_again(node):
            value.converted["whole"] = self._made_again(node)
        return self._convert(node, "whole", collectives.all_gather, self.sharding(node.meta["val"], value.mark))

    def _can_be_made_again(self, node: fx.Node) -> bool:
        """Whether a shard's whole is computed rather than gathered: constants, and integers made of whole ones and of constants."""
        if node not in self.remade:
            rule, val = rule_for(node) if node.op == "call_function" else None, node.meta.get("val")
            possible = rule is not None and isinstance(val, torch.Tensor) and not _writes(node)
            read = _read_operands(node, rule) if possible else []  # type: ignore[arg-type]
            exact = possible and (not read or not (val.is_floating_point() or val.is_complex()))  # type: ignore[union-attr]
            self.remade[node] = exact and all(self.values[n].mark is None or self._can_be_made_again(n) for n in read)
        return self.remade[node]

    def _made_again(self, node: fx.Node) -> fx.Node:
        operands = self._whole_operands(node)
        with self._after(self.values[node].node):
            return self.graph.node_copy(node, operands.__getitem__)

    def _whole_operands(self, node: fx.Node) -> dict[fx.Node, fx.Node]:
        """The replicated form of each operand; of one that only lends its shape, an empty tensor of that shape."""
        rule = rule_for(node) if node.op == "call_function" else None
        read = node.all_input_nodes if rule is None else _read_operands(node, rule)
        return {n: self.whole(n) if n in read else self._pattern(n) for n in node.all_input_nodes}

    def _pattern(self, node: fx.Node) -> fx.Node:
        value = self.values[node]
        if value.mark is None:
            return value.node
        sizes = [self.sizes.argument(size) for size in node.meta["val"].shape]
        return self._convert(node, "pattern", aten.new_empty.default, {}, arguments=(sizes,))

    def varied(self, node: fx.Node) -> fx.Node:
        """The replicated form of a value, for use beside sharded ones."""
        made = self.whole(node)
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor) or not (val.is_floating_point() or val.is_complex()):
            return made
        value = self.values[node]
        if value.mark is None:
            return self._convert(node, "varied", collectives.vary, {"group": self.group})
        return self._convert(node, "gathered", collectives.all_gather_varying, self.sharding(val, value.mark))

    def sharded(self, node: fx.Node, mark: Mark) -> fx.Node:
        """The form of a value that is sharded as `mark` says."""
        value = self.values[node]
        if mark.same(value.mark):
            return value.node
        source = self.whole(node)
        keywords = self.sharding(node.meta["val"], mark)
        key = f"shard {mark.dim} {keywords['outer']} {keywords['local']}"
        return self._convert(node, key, collectives.take_shard, keywords, source)

    def _convert(
        self, node: fx.Node, key: str, target: Callable[..., Any], keywords: dict[str, Any], source: fx.Node | None = None,
        arguments: tuple[Any, ...] = (),
    ) -> fx.Node:
        value = self.values[node]
        if key not in value.converted:
            source = source or value.node
            with self._after(source):
                made = self.graph.call_function(target, (source, *arguments), keywords)
            if source.op == "placeholder" or source in self.top:
                self.top.add(made)
            for field in ("stack_trace", "nn_module_stack"):
                if field in node.meta:
                    made.meta[field] = node.meta[field]
            value.converted[key] = made
        return value.converted[key]

    def _after(self, node: fx.Node) -> Any:
        if node.op == "placeholder" or node in self.top:
            return self.graph.inserting_before(self.conversions_end)
        return self.graph.inserting_after(node)

    # One node ---------------------------------------------------------------------------------------------------------

    def _operator(self, node: fx.Node) -> None:
        factors, rule = (None, None) if _writes(node) else (factors_of(node), rule_for(node))
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
        read = node.all_input_nodes if rule is None else _read_operands(node, rule)
        gathered = {n: self.values[n].mark for n in read if self.values[n].mark is not None and not self._can_be_made_again(n)}
        if gathered or "left_whole" in node.meta:
            sent = sum(self._gather_bytes(n, mark) for n, mark in gathered.items())  # type: ignore[arg-type]
            self.fallbacks.append(Fallback(_op_name(node), source_line(node), node.meta.get("left_whole", reason), sent))
        made = self.graph.node_copy(node, self._whole_operands(node).__getitem__)
        made.meta = dict(node.meta)
        self._set(node, made, None)

    def _gather_bytes(self, node: fx.Node, mark: Mark) -> int:
        val = node.meta["val"]
        rows_per_rank = local_length(mark.base, self.P, self.layout)
        elements = product([*val.shape[: mark.dim], mark.outer * rows_per_rank * mark.inner, *val.shape[mark.dim + 1:]])
        return (self.P - 1) * hint(elements) * val.element_size()

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
                at_run_time(mark.outer), at_run_time(self._length(val, mark)),
                at_run_time(local_length(mark.base, self.P, self.layout))))
        self.graph.output((*results, *sizes))


_SIZE_READS = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int, aten.sym_storage_offset.default)


def _touches_tensor(node: fx.Node) -> bool:
    vals = [node.meta.get("val"), *(n.meta.get("val") for n in node.all_input_nodes)]
    return any(isinstance(v, (torch.Tensor, list, tuple)) for v in vals)


def _writes(node: fx.Node) -> bool:
    """Whether a node writes to an operand (the write-back of a mutated input): that takes the whole value."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _read_operands(node: fx.Node, rule: Rule) -> list[fx.Node]:
    """The operands of which more than dtype, device and shape is read, and the sizes."""
    paths = tensor_operands(node)
    unread = {operand_at(node, paths[i]) for i in rule.unread}
    read = {operand_at(node, path) for i, path in enumerate(paths) if i not in rule.unread}
    return [n for n in node.all_input_nodes if n in read or n not in unread]


def _op_name(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", str(node.target))
