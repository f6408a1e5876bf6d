"""Products of two tensors over one dim, in one form: `matmul`, `bmm` and two-operand `einsum`.

    einsum("bqhd,bkhd->bhqk", x, y)      left x, dims b q h d; right y, dims b k h d; result dims b h q k

Dims are named: `row` is the left operand's own, `col` the right's own, `sum` what is contracted, the others are batch dims that both
and the result have, in the result's order.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoseq.passes.attention_site import like
from autoseq.passes.sizes import same_size

aten = torch.ops.aten

Dims = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """One product of `left` and `right`; the dims of each by name."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_dims: Dims
    right_dims: Dims
    dims: Dims

    @property
    def batch(self) -> Dims:
        """The batch dims in the result's order."""
        return tuple(name for name in self.dims if name not in ("row", "col"))


def product_of(node: fx.Node) -> Product | None:
    """`node` as a product, None if it is none."""
    reader = {
        aten.matmul.default: _matmul, aten.bmm.default: _matmul, aten.mm.default: _matmul,
        aten.einsum.default: _einsum,
    }.get(node.target)  # type: ignore[call-overload]
    return reader(node) if reader else None


def _matmul(node: fx.Node) -> Product | None:
    left, right = node.args[:2]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    ranks = left.meta["val"].dim(), right.meta["val"].dim()
    if min(ranks) < 2:
        return None
    batch = tuple(f"batch{i}" for i in range(max(ranks) - 2))
    left_batch, right_batch = (batch[len(batch) - (rank - 2):] for rank in ranks)
    return Product(node, left, right, (*left_batch, "row", "sum"), (*right_batch, "sum", "col"), (*batch, "row", "col"))


def open_baddbmm(gm: fx.GraphModule) -> int:
    """`baddbmm(x, y, z)` as its parts, `x·beta + bmm(y, z)·alpha`; returns how many. Legal because it is the operator's definition."""
    nodes = gm.graph.find_nodes(op="call_function", target=aten.baddbmm.default)
    for node in nodes:
        added, left, right = node.args[:3]
        beta, alpha = (node.args[i] if len(node.args) > i else node.kwargs.get(name, 1) for i, name in ((3, "beta"), (4, "alpha")))
        with gm.graph.inserting_before(node):
            product = _scaled(_alike(gm.graph.call_function(aten.bmm.default, (left, right)), node), alpha)
            total = product if beta == 0 else _alike(gm.graph.call_function(aten.add.Tensor, (_scaled(added, beta), product)), node)
        node.replace_all_uses_with(total)
        gm.graph.erase_node(node)
    return len(nodes)


def _scaled(x: Any, factor: Any) -> fx.Node:
    return x if factor == 1 else _alike(x.graph.call_function(aten.mul.Tensor, (x, factor)), x)


def _alike(new: fx.Node, old: fx.Node) -> fx.Node:
    return like(new, old, old.meta["val"])


def _einsum(node: fx.Node) -> Product | None:
    equation, operands = node.args[:2]
    inputs, arrow, result = str(equation).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in str(equation) or len(terms) != 2 or any(len(set(t)) != len(t) for t in (*terms, result)):
        return None
    left, right = operands  # type: ignore[misc]
    if left is right:
        return None
    first, second = terms
    summed = {*first} & {*second} - {*result}
    if len(summed) != 1 or {*first, *second} - summed != {*result}:
        return None
    # A letter of one operand alone is its rows; of several the last is, and the others are batch dims that the other is broadcast over.
    own = [[letter for letter in result if letter in a and letter not in b] for a, b in ((first, second), (second, first))]
    if not all(own):
        return None
    names = {letter: f"batch{i}" for i, letter in enumerate(result)} | {own[0][-1]: "row", own[1][-1]: "col", summed.pop(): "sum"}
    product = Product(node, left, right, *(tuple(names[letter] for letter in term) for term in (first, second, result)))
    return product if _same_batch(product) else None


def _same_batch(product: Product) -> bool:
    """An einsum broadcasts dims of size 1; a product here does not, but in `matmul`'s leading dims."""
    sizes = dict(zip(product.left_dims, product.left.meta["val"].shape, strict=True))
    return all(same_size(size, sizes[name]) for name, size in zip(product.right_dims, product.right.meta["val"].shape, strict=True)
               if name in sizes)


def swapped(product: Product) -> Product:
    """The same product with its operands changed over: rows are columns."""
    other = {"row": "col", "col": "row"}

    def rename(dims: Dims) -> Dims:
        return tuple(other.get(name, name) for name in dims)

    return Product(product.node, product.right, product.left, rename(product.right_dims), rename(product.left_dims), rename(product.dims))
