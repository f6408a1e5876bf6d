"""Rules of products of matrices, norms and embeddings: where factors meet."""

import torch
from torch import fx

from autoseq.passes.factors import Factors, parse_pattern
from autoseq.passes.rules.rule import LocalEmitter, Rule, argument, bind_node, operand_shapes, pattern
from autoseq.runtime import collectives, rows

aten = torch.ops.aten


def _matmul(node: fx.Node) -> Factors | None:
    left, right = (len(s) for s in operand_shapes(node) if s is not None)
    text = {(1, 1): "k, k ->", (1, 2): "k, k n -> n", (2, 1): "m k, k -> m"}.get((left, right))
    if text is None and min(left, right) == 1:
        text = "k, ... k n -> ... n" if left == 1 else "... m k, k -> ... m"
    return bind_node(parse_pattern(text or "... m k, ... k n -> ... m n"), node)


def _addmm(node: fx.Node) -> Factors | None:
    bias = operand_shapes(node)[0]
    assert bias is not None
    return bind_node(parse_pattern(f"{'m n' if len(bias) == 2 else 'n'}, m k, k n -> m n"), node)


def _norm(node: fx.Node) -> Factors | None:
    """`layer_norm` and `rms_norm` over the last dims given by `normalized_shape`."""
    normalized = argument(node, 1, "normalized_shape")
    names = " ".join(f"n{i}!" for i in range(len(normalized)))
    return bind_node(parse_pattern(f"... {names}, [{names}], [{names}] -> ... {names}"), node)


def _einsum(node: fx.Node) -> Factors | None:
    equation = str(argument(node, 0, "equation")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow or "." in equation or any(len(set(t)) != len(t) for t in left.split(",")):
        return None
    spaced = ", ".join(" ".join(letter.lower() + ("_" if letter.isupper() else "") for letter in t) for t in left.split(","))
    result = " ".join(letter.lower() + ("_" if letter.isupper() else "") for letter in right)
    return bind_node(parse_pattern(f"{spaced} -> {result}"), node)


def _local_einsum(node: fx.Node, local: LocalEmitter) -> fx.Node:
    """Rows that are in the result stay; a sum over rows is the sum of the ranks' sums, with no padding in one operand of the product."""
    equation, operands = local.args
    left, _, right = str(equation).replace(" ", "").partition("->")
    sharded = {i: mark for i in range(len(operands)) if (mark := local.operand_mark(i)) is not None}
    first = min(sharded, default=None)
    if first is None or left.split(",")[first][sharded[first].dim] in right:
        return local.emit(node.target, local.args, local.kwargs)  # type: ignore[arg-type]
    valid = local.emit(rows.zero_padding, (operands[first],), local.sharding(first))
    partial = local.emit(node.target, (equation, [*operands[:first], valid, *operands[first + 1:]]), local.kwargs)  # type: ignore[arg-type]
    return local.emit(collectives.all_reduce, (partial,), {"group": local.sharding(first)["group"]})


def _embedding(node: fx.Node) -> Factors | None:
    """A gradient scaled by how often an id occurs counts over all rows; a sparse one has no sum over ranks."""
    if argument(node, 3, "scale_grad_by_freq", False) or argument(node, 4, "sparse", False):
        return None
    return bind_node(parse_pattern("v! e, ... -> ... e"), node)


PRODUCTS = {
    aten.linear.default: Rule(pattern("... i, o i, [o] -> ... o")),
    aten.matmul.default: Rule(_matmul),
    aten.mm.default: Rule(pattern("m k, k n -> m n")),
    aten.bmm.default: Rule(pattern("b m k, b k n -> b m n")),
    aten.addmm.default: Rule(_addmm),
    aten.baddbmm.default: Rule(pattern("b m n, b m k, b k n -> b m n")),
    aten.einsum.default: Rule(_einsum, local=_local_einsum),
}
RULES = {
    **PRODUCTS,
    aten.layer_norm.default: Rule(_norm),
    aten.rms_norm.default: Rule(_norm),
    aten.embedding.default: Rule(_embedding),
}
