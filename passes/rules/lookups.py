"""Rules of operators that read or write at computed places: the dim that is indexed must be whole, the others pass.

    x[ids]                          "v! e, ... -> ... e": a lookup in a table, as `embedding` is
    x[:, ids]                       the index stands where the dim was
    scatter(x, 1, ids, value)       rows of a router's scores, each on its own
"""

import torch
from torch import fx

from autoseq.passes.factors import Dims, Factors, Size
from autoseq.passes.rules.rule import Rule, argument, as_dim, dims_of, first_val, operand_shapes, plain_dims, result_shapes
from autoseq.passes.sizes import same_size

aten = torch.ops.aten


def _index(node: fx.Node) -> Factors | None:
    """`x[i, :, j]`: the indexed dims become the broadcast dims of the indices, in place if they are neighbours, else in front."""
    indices = list(node.args[1])  # type: ignore[arg-type]
    if any(i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices):
        return None  # a mask: how many rows it takes is known only when it runs
    shape, result = first_val(node).shape, result_shapes(node)[0]
    indexed = [d for d, i in enumerate(indices) if i is not None]
    spread = max(i.meta["val"].dim() for i in indices if i is not None)
    neighbours = indexed == list(range(indexed[0], indexed[-1] + 1))
    first = indexed[0] if neighbours else 0
    sizes: dict[str, Size] = {}
    table = dims_of(shape, plain_dims(len(shape)), sizes)
    places = dims_of(result[first : first + spread], plain_dims(spread, "i"), sizes)
    kept = [dim for d, dim in enumerate(table) if d not in indexed]
    ids = [None if i is None else _broadcast(i.meta["val"].shape, places) for i in indices]
    return Factors((table, *ids), ((*kept[:first], *places, *kept[first:]),), sizes, frozenset(f"d{d}" for d in indexed))


def _broadcast(shape: torch.Size, places: Dims) -> Dims:
    return tuple(() if same_size(size, 1) else dim for size, dim in zip(shape, places[len(places) - len(shape):], strict=True))


def _index_select(node: fx.Node) -> Factors:
    shape = first_val(node).shape
    dim = as_dim(argument(node, 1, "dim"), len(shape))
    sizes: dict[str, Size] = {}
    names = plain_dims(len(shape))
    table = dims_of(shape, names, sizes)
    names[dim] = ("i0",)
    result = dims_of(result_shapes(node)[0], names, sizes)
    ids = (result[dim],) if operand_shapes(node)[1] else ()
    return Factors((table, ids), (result,), sizes, frozenset({f"d{dim}"}))


def _aligned(node: fx.Node) -> Factors | None:
    """`gather`, `scatter`: every operand has the same dims but for the one that is read or written at computed places."""
    shapes = [s for s in operand_shapes(node) if s is not None]
    rank = len(shapes[0])
    if any(len(s) != rank for s in shapes):
        return None
    dim = as_dim(argument(node, 1, "dim"), rank)
    if not all(same_size(s[d], shapes[0][d]) for s in shapes[1:] for d in range(rank) if d != dim):
        return None  # an index of fewer rows reads or writes the first ones
    sizes: dict[str, Size] = {}
    dims = []
    for i, shape in enumerate((*shapes, *result_shapes(node))):
        names = plain_dims(rank)
        names[dim] = (f"along{i}",)
        dims.append(dims_of(shape, names, sizes))
    return Factors(tuple(dims[:-1]), (dims[-1],), sizes, frozenset(name for name in sizes if name.startswith("along")))


def _part_written(node: fx.Node) -> Factors:
    """`slice_scatter`, `select_scatter`: the dim of which a part is replaced must be whole."""
    shape, part = first_val(node).shape, operand_shapes(node)[1]
    assert part is not None
    dim = as_dim(argument(node, 2, "dim", 0), len(shape))
    sizes: dict[str, Size] = {}
    names = plain_dims(len(shape))
    old = dims_of(shape, names, sizes)
    names[dim] = ("part",)
    written = dims_of(part, names if len(part) == len(shape) else names[:dim] + names[dim + 1:], sizes)
    return Factors((old, written), (old,), sizes, frozenset({f"d{dim}", "part"}))


def _one_hot(node: fx.Node) -> Factors:
    shape = first_val(node).shape
    sizes: dict[str, Size] = {}
    dims = dims_of(shape, plain_dims(len(shape)), sizes)
    sizes["classes"] = result_shapes(node)[0][-1]
    classes = () if same_size(sizes["classes"], 1) else ("classes",)
    return Factors((dims,), ((*dims, classes),), sizes, frozenset({"classes"}))


RULES = {
    aten.index.Tensor: Rule(_index),
    aten.index_select.default: Rule(_index_select),
    **{op: Rule(_aligned) for op in (
        aten.gather.default, aten.scatter.value, aten.scatter.src, aten.scatter.reduce, aten.scatter.value_reduce,
        aten.scatter_add.default, aten.scatter_reduce.two)},
    **{op: Rule(_part_written) for op in (aten.slice_scatter.default, aten.select_scatter.default)},
    aten.one_hot.default: Rule(_one_hot),
}  # fmt: skip
