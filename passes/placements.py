"""The local graph while it is made: each value of the global graph in the placements that its users need.

    value: Shard(1)        whole → all_gather(value)        varied → all_gather_varying(value)
    value: Replicate       varied → vary(value)             sharded as a mark says → take_shard(value)

Each conversion is made once, right after the value it converts and not where it is used: a value made under grad is converted
under grad, whatever region its user stands in. What can be computed from whole values at no cost is not gathered.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoseq.passes.factors import Mark, Size, operand_at, product, tensor_operands
from autoseq.passes.rules import Rule, rule_for
from autoseq.passes.sizes import Sizes, hint
from autoseq.runtime import collectives
from autoseq.runtime.layout import Layout, local_length

aten = torch.ops.aten


@dataclass(slots=True)
class Value:
    """A node of the global graph as the local graph has it: `mark` says how it is sharded, None means replicated."""

    node: fx.Node
    mark: Mark | None
    converted: dict[str, fx.Node]


class Placements:
    """The values of the global graph in the local one. Two anchors keep its top in order: inputs, sizes, the inputs' conversions."""

    def __init__(self, gm: fx.GraphModule, group: str, P: int, layout: Layout) -> None:
        self.group, self.P, self.layout = group, P, layout
        self.graph = fx.Graph(gm)
        self.values: dict[fx.Node, Value] = {}
        self._top: set[fx.Node] = set()  # conversions of inputs, which stand between the anchors
        self._remade: dict[fx.Node, bool] = {}
        self.cut_anew: dict[fx.Node, Mark] = {}  # shards that are gathered because a user needs their rows cut up otherwise

    def start(self, inputs: list[fx.Node]) -> None:
        """Copy the inputs and set up the anchors."""
        for node in inputs:
            self.values[node] = Value(self.graph.node_copy(node), None, {})
        self._sizes_end = self.graph.call_function(len, ((),))
        self._conversions_end = self.graph.call_function(len, ((),))
        self.sizes = Sizes(self.graph, self._sizes_end)
        for node in inputs:
            self.sizes.bind(self.values[node].node)

    def finish(self) -> None:
        for anchor in (self._conversions_end, self._sizes_end):
            self.graph.erase_node(anchor)

    def plain(self, node: fx.Node) -> Any:
        return self.values[node].node

    def mark_of(self, node: fx.Node) -> Mark | None:
        return self.values[node].mark

    def length(self, val: torch.Tensor, mark: Mark) -> Size:
        return val.shape[mark.dim] // (mark.outer * mark.inner)

    def sharding(self, val: torch.Tensor, mark: Mark) -> dict[str, Any]:
        """The keyword arguments by which the runtime's collectives know a sharding of a tensor like `val`."""
        return {
            "dim": mark.dim,
            "outer": self.sizes.argument(mark.outer),
            "length": self.sizes.argument(self.length(val, mark)),
            "local": self.sizes.argument(local_length(mark.base, self.P, self.layout)),
            "layout": self.layout,
            "group": self.group,
        }

    def whole(self, node: fx.Node) -> fx.Node:
        """The replicated form of a value."""
        value = self.values[node]
        if value.mark is None:
            return value.node
        if "whole" not in value.converted and self.can_be_made_again(node):
            value.converted["whole"] = self._made_again(node)
        return self._convert(node, "whole", collectives.all_gather, self.sharding(node.meta["val"], value.mark))

    def can_be_made_again(self, node: fx.Node) -> bool:
        """Whether a shard's whole is computed rather than gathered: constants, and integers made of whole ones and of constants."""
        if node not in self._remade:
            rule, val = rule_for(node) if node.op == "call_function" else None, node.meta.get("val")
            possible = rule is not None and isinstance(val, torch.Tensor) and not writes(node)
            read = read_operands(node, rule) if possible else []  # type: ignore[arg-type]
            exact = possible and (not read or not (val.is_floating_point() or val.is_complex()))  # type: ignore[union-attr]
            self._remade[node] = exact and all(self.values[n].mark is None or self.can_be_made_again(n) for n in read)
        return self._remade[node]

    def _made_again(self, node: fx.Node) -> fx.Node:
        operands = self.whole_operands(node)
        with self._after(self.values[node].node):
            return self.graph.node_copy(node, operands.__getitem__)

    def whole_operands(self, node: fx.Node) -> dict[fx.Node, fx.Node]:
        """The replicated form of each operand; of one that only lends its shape, an empty tensor of that shape."""
        rule = rule_for(node) if node.op == "call_function" else None
        read = node.all_input_nodes if rule is None else read_operands(node, rule)
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
        if value.mark is not None and not self.can_be_made_again(node):
            self.cut_anew[node] = value.mark
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
            if source.op == "placeholder" or source in self._top:
                self._top.add(made)
            for field in ("stack_trace", "nn_module_stack"):
                if field in node.meta:
                    made.meta[field] = node.meta[field]
            value.converted[key] = made
        return value.converted[key]

    def _after(self, node: fx.Node) -> Any:
        if node.op == "placeholder" or node in self._top:
            return self.graph.inserting_before(self._conversions_end)
        return self.graph.inserting_after(node)

    def gather_bytes(self, node: fx.Node, mark: Mark) -> int:
        val = node.meta["val"]
        rows_per_rank = local_length(mark.base, self.P, self.layout)
        elements = product([*val.shape[: mark.dim], mark.outer * rows_per_rank * mark.inner, *val.shape[mark.dim + 1:]])
        return (self.P - 1) * hint(elements) * val.element_size()


def writes(node: fx.Node) -> bool:
    """Whether a node writes to an operand (the write-back of a mutated input): that takes the whole value."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def read_operands(node: fx.Node, rule: Rule) -> list[fx.Node]:
    """The operands of which more than dtype, device and shape is read, and the sizes."""
    paths = tensor_operands(node)
    unread = {operand_at(node, paths[i]) for i in rule.unread}
    read = {operand_at(node, path) for i, path in enumerate(paths) if i not in rule.unread}
    return [n for n in node.all_input_nodes if n in read or n not in unread]
