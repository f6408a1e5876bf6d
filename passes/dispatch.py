"""Find dispatches: where a mixture of experts sorts the slots of its tokens by expert, each rank may sort its own.

    perm = sort(expert_ids)[1]                     # [T·k], k slots a token
    rows = x[perm // k] ; weights = w[perm]        # tokens and weights in the experts' order
    y = grouped_mm(rows, experts, cumsum(histc(expert_ids)))
    out = (y * weights)[inverse of perm]           # in natural order again

Such a region is local although a sort needs its dim whole: what comes out at a slot depends on that slot alone, and the order in
between is seen by nobody. Legal because every value of the region is known for what it is (`Kind`), each is used only in ways that
keep it so, and none but the results leaves the region. What does not fit this to the letter is no dispatch and runs whole.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import fx

from autoseq.passes.factors import operand_at, tensor_operands
from autoseq.passes.rules import rule_for
from autoseq.passes.rules.rule import argument
from autoseq.passes.sizes import same_size

aten = torch.ops.aten


class Kind(StrEnum):
    """What a value of the region is, for N slots in the experts' order."""

    ROWS = "one row a slot, in the experts' order"
    IDS = "the experts' ids, in their order"
    PERM = "for each place in the experts' order, the slot"
    TOKENS = "for each place in the experts' order, the token"
    INVERSE = "for each slot, its place in the experts' order"
    PATTERN = "a tensor of N that is about to be written over"
    COUNTS = "how many slots each expert has"
    OFFSETS = "where each expert's slots end"
    TUPLE = "several results, each one row a slot"
    SLOTS = "a result: one row a slot, in natural order"
    SUMS = "a result: one row a token, in natural order"


@dataclass(slots=True)
class Dispatch:
    """One region: the node that sorts, what each of its values is, and how many slots a token has wherever tokens are read."""

    root: fx.Node
    kinds: dict[fx.Node, Kind] = field(default_factory=dict)
    slots_a_token: dict[fx.Node, int] = field(default_factory=dict)

    @property
    def ids(self) -> fx.Node:
        return self.root.args[0]  # type: ignore[return-value]


def find_dispatches(gm: fx.GraphModule) -> list[Dispatch]:
    """The regions of a graph, none of them changed."""
    roots = [node for target in _SORTS for node in gm.graph.find_nodes(op="call_function", target=target)]
    return [found for root in roots if (found := _followed(root)) is not None]


_SORTS = (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)


def _followed(root: fx.Node) -> Dispatch | None:
    """The region that begins at a sort of one dim, or None if one of its values is used in a way that is not known."""
    ids = root.args[0]
    if ids.meta["val"].dim() != 1 or argument(root, 2, "descending", False):  # type: ignore[union-attr]
        return None
    region = Dispatch(root)
    region.kinds[root] = Kind.PERM if root.target in (aten.argsort.default, aten.argsort.stable) else Kind.TUPLE
    node = root.next
    while node.op != "root":
        if any(x in region.kinds and region.kinds[x] not in (Kind.SLOTS, Kind.SUMS) for x in node.all_input_nodes):
            kind = _kind(region, node)
            if kind is None:
                return None
            region.kinds[node] = kind
        node = node.next
    return region if {Kind.SLOTS, Kind.SUMS} & set(region.kinds.values()) else None


def _kind(region: Dispatch, node: fx.Node) -> Kind | None:
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        if node.args[0] is region.root:
            return (Kind.IDS, Kind.PERM)[node.args[1]]  # type: ignore[index]
        return Kind.ROWS
    how = _grouped if str(node.target) in _GROUPED else _KINDS.get(node.target)
    kind = how(region, node) if how else None
    return kind or _row_by_row(region, node)


def _of(region: Dispatch, x: object) -> Kind | None:
    return region.kinds.get(x) if isinstance(x, fx.Node) else None


def _length(x: fx.Node) -> int | torch.SymInt:
    return x.meta["val"].shape[0]


def _divided(region: Dispatch, node: fx.Node) -> Kind | None:
    """`perm // k`: the token of each slot."""
    slots, k = node.args[:2]
    floors = node.target is aten.floor_divide.default or node.kwargs.get("rounding_mode") == "floor"
    if _of(region, slots) is not Kind.PERM or not isinstance(k, int) or k < 1 or not floors:
        return None
    region.slots_a_token[node] = k
    return Kind.TOKENS


def _indexed(region: Dispatch, node: fx.Node) -> Kind | None:
    """`x[perm]`, `x[perm // k]`: x by slots or tokens into the experts' order; `y[inverse]`: back out of it."""
    x, index = node.args[0], node.args[1] if node.target is aten.index.Tensor else [node.args[2]]
    if len(index) != 1 or (node.target is aten.index_select.default and argument(node, 1, "dim") != 0):  # type: ignore[arg-type]
        return None
    inside, kind, slots = _of(region, x), _of(region, index[0]), _length(region.ids)  # type: ignore[index]
    if kind is Kind.INVERSE:
        return Kind.SLOTS if inside in (Kind.ROWS, Kind.IDS) else None
    k = {Kind.PERM: 1, Kind.TOKENS: region.slots_a_token.get(index[0], 0)}.get(kind) if kind else None  # type: ignore[index, arg-type]
    if k is None or inside is not None or not same_size(_length(x) * k, slots):  # type: ignore[arg-type]
        return None
    region.slots_a_token[node] = k
    return Kind.IDS if x is region.ids else Kind.ROWS


def _inverted(region: Dispatch, node: fx.Node) -> Kind | None:
    """`empty.index_put([perm], arange(N))`: where each slot has gone. Every place is written, since `perm` is a permutation."""
    into, indices, values = node.args[:3]
    counts_up = isinstance(values, fx.Node) and values.target is aten.arange.default and same_size(_length(values), _length(region.ids))
    permuted = len(indices) == 1 and _of(region, indices[0]) is Kind.PERM  # type: ignore[arg-type, index]
    overwritten = _of(region, into) is Kind.PATTERN and not argument(node, 3, "accumulate", False)
    return Kind.INVERSE if counts_up and permuted and overwritten else None


def _counted(region: Dispatch, node: fx.Node) -> Kind | None:
    """One bin an expert: experts 0 to E - 1."""
    bins, low, high = argument(node, 1, "bins", 100), argument(node, 2, "min", 0), argument(node, 3, "max", 0)
    return Kind.COUNTS if _of(region, node.args[0]) is Kind.IDS and low == 0 and high == bins - 1 else None


def _grouped(region: Dispatch, node: fx.Node) -> Kind | None:
    rows, experts, ends = node.args[0], node.args[1], argument(node, 2, "offs")
    if _of(region, rows) is not Kind.ROWS or _of(region, ends) is not Kind.OFFSETS or _of(region, experts) is not None:
        return None
    bias = argument(node, 3, "bias") if node.target is aten._grouped_mm.default else None
    fits = bias is None and experts.meta["val"].dim() == 3 and same_size(_length(experts), _length(ends))  # type: ignore[union-attr, arg-type]
    return Kind.ROWS if fits else None


def _added_up(region: Dispatch, node: fx.Node) -> Kind | None:
    """`zeros.index_add(0, perm // k, rows)`: each token's slots summed."""
    into, dim, tokens, rows = node.args[:4]
    k = region.slots_a_token.get(tokens, 0) if _of(region, tokens) is Kind.TOKENS else 0  # type: ignore[arg-type]
    if dim != 0 or not k or _of(region, rows) is not Kind.ROWS or _of(region, into) is not None:
        return None
    region.slots_a_token[node] = k
    return Kind.SUMS if same_size(_length(into) * k, _length(region.ids)) else None  # type: ignore[arg-type]


def _if(kind: Kind, result: Kind) -> Callable[[Dispatch, fx.Node], Kind | None]:
    return lambda region, node: result if _of(region, node.args[0]) is kind else None


def _cast(region: Dispatch, node: fx.Node) -> Kind | None:
    kind = _of(region, node.args[0])
    return kind if kind in (Kind.IDS, Kind.COUNTS, Kind.OFFSETS, Kind.PERM) else None


_KINDS: dict[object, Callable[[Dispatch, fx.Node], Kind | None]] = {
    **dict.fromkeys((aten.floor_divide.default, aten.div.Tensor_mode), _divided),
    **dict.fromkeys((aten.index.Tensor, aten.index_select.default), _indexed),
    aten.index_put.default: _inverted, aten.histc.default: _counted, aten.cumsum.default: _if(Kind.COUNTS, Kind.OFFSETS),
    **dict.fromkeys((aten.argsort.default, aten.argsort.stable), _if(Kind.PERM, Kind.INVERSE)),
    **dict.fromkeys((aten.empty_like.default, aten.zeros_like.default), _if(Kind.PERM, Kind.PATTERN)),
    **dict.fromkeys((aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.detach.default), _cast),
    aten.index_add.default: _added_up,
}  # fmt: skip
# Operators (rows, experts, ends) that multiply each expert's rows by its matrix; by name, since one is another package's.
_GROUPED = {"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"}


def _row_by_row(region: Dispatch, node: fx.Node) -> Kind | None:
    """An operator whose rule keeps dim 0 of every operand of the region, and whose other operands know nothing of it."""
    rule = rule_for(node)
    factors = rule.factors(node) if rule else None
    if factors is None:
        return None
    inside, outside = [], []
    for path, dims in zip(tensor_operands(node), factors.operands, strict=True):
        kind = _of(region, operand_at(node, path))
        if kind not in (None, Kind.ROWS, Kind.IDS):
            return None
        (outside if kind is None else inside).append(dims or ())
    firsts = {dims[0] if dims else () for dims in (*inside, *factors.results)}
    if len(firsts) != 1 or len(names := firsts.pop()) != 1:
        return None
    if any(names[0] in dim for dims in outside for dim in dims) or not factors.passes(names[0]) or names[0] in factors.cut:
        return None
    return Kind.TUPLE if isinstance(node.meta["val"], (list, tuple)) else Kind.ROWS
