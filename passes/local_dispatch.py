"""A dispatch on local slots: the region that `dispatch` found, emitted for the slots of one rank.

    perm = sort(expert_ids)[1]; rows = x[perm // k]     →     the same, of this rank's slots and tokens
"""

from typing import Any

import torch
from torch import fx

from autoseq.passes.dispatch import Dispatch, Kind
from autoseq.passes.factors import MARK, Mark, Place, operand_at, tensor_operands
from autoseq.passes.local_node import LocalNode
from autoseq.passes.placements import Placements, Value
from autoseq.passes.rules import rule_for
from autoseq.passes.sizes import same_size
from autoseq.runtime.layout import local_length

aten = torch.ops.aten
_REPLICATED_SHAPES = (Kind.COUNTS, Kind.OFFSETS)


class LocalDispatch:
    """Emits the nodes of one region; `mark` says how its slots are sharded."""

    def __init__(self, placements: Placements, region: Dispatch, mark: Mark) -> None:
        self.placements, self.region, self.mark = placements, region, mark

    @staticmethod
    def begin(placements: Placements, region: Dispatch) -> "LocalDispatch | None":
        """The region on local slots, if they are sharded and a token's slots are together."""
        mark = placements.mark_of(region.ids)
        if mark is None or not all(same_size(mark.inner % k, 0) for k in region.slots_a_token.values()):
            return None
        return LocalDispatch(placements, region, mark)

    def emit(self, node: fx.Node) -> None:
        """Add one node of the region to the local graph."""
        kind = self.region.kinds[node]
        if node is self.region.root:
            made = self._call(node, {self.region.ids: self.placements.sharded(self.region.ids, self.mark)})
        elif node in self.region.slots_a_token and kind is not Kind.TOKENS:  # reads or adds to a value in natural order
            made = self._call(node, {node.args[0]: self.placements.sharded(node.args[0], self._tokens(node))})  # type: ignore
        elif node.target is aten.index_put.default:
            made = self._call(node, {node.args[2]: self._count_up(node.args[2])})  # type: ignore[dict-item, arg-type]
        elif kind in (Kind.ROWS, Kind.IDS, Kind.TOKENS, Kind.TUPLE) and rule_for(node) is not None and (place := self._place(node)):
            factors = rule_for(node).factors(node)  # type: ignore[union-attr]
            made, _ = LocalNode(self.placements, node, factors, rule_for(node), place).run()  # type: ignore[arg-type]
        else:
            made = self._call(node, {})
        self.placements.values[node] = Value(made, self._mark_of(node, kind), {})

    def _mark_of(self, node: fx.Node, kind: Kind) -> Any:
        if kind in _REPLICATED_SHAPES or kind is Kind.TUPLE:
            return None
        return self._tokens(node) if kind is Kind.SUMS else self.mark

    def _tokens(self, node: fx.Node) -> Mark:
        """How the tokens (or slots) are sharded that a node reads or makes in natural order."""
        return Mark(0, self.mark.outer, self.mark.inner // self.region.slots_a_token[node], self.mark.base)

    def _count_up(self, counted: fx.Node) -> fx.Node:
        rows = local_length(self.mark.base, self.placements.P, self.placements.layout)
        slots = self.placements.sizes.argument(self.mark.outer * rows * self.mark.inner)
        return self.placements.graph.call_function(aten.arange.default, (slots,), dict(counted.kwargs))

    def _call(self, node: fx.Node, forms: dict[fx.Node, fx.Node]) -> fx.Node:
        """The same call; operands from outside the region that are given no other form are whole, beside varying ones."""
        def form(x: fx.Node) -> fx.Node:
            if x in forms:
                return forms[x]
            return self.placements.plain(x) if x in self.region.kinds else self.placements.varied(x)

        made = self.placements.graph.node_copy(node, form)
        made.meta = {key: item for key, item in node.meta.items() if key not in ("val", "tensor_meta", MARK)}
        return made

    def _place(self, node: fx.Node) -> Place | None:
        """The slots among the factors of a node that works row by row."""
        factors = rule_for(node).factors(node)  # type: ignore[union-attr]
        if factors is None:
            return None
        for path, dims in zip(tensor_operands(node), factors.operands, strict=True):
            if operand_at(node, path) in self.region.kinds and dims:
                return Place(dims[0][0], self.mark.outer, self.mark.inner, self.mark.base)
        return None
