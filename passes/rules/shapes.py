"""Rules of operators that move elements: reshape, reorder, cut, join, repeat, fill."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autoseq.passes.factors import Dims, Factors, Size, parse_pattern, reshape_dims
from autoseq.passes.rules.moves import keeps_most
from autoseq.passes.rules.rule import (
    LocalEmitter,
    Rule,
    argument,
    as_dim,
    bind_node,
    dims_of,
    first_val,
    operand_shapes,
    plain_dims,
    result_shapes,
)
from autoseq.passes.sizes import hint, same_size
from autoseq.runtime import rows

aten = torch.ops.aten
_FEW = 8  # rows that are sent to every rank; more are moved


def _reshape(node: fx.Node) -> Factors | None:
    old, new, sizes, whole = reshape_dims(first_val(node).shape, result_shapes(node)[0])
    return Factors((old,), (new,), sizes, whole)


def _local_squeeze(node: fx.Node, local: LocalEmitter) -> fx.Node:
    """Drops the dims that have size 1 on one device, not a dim of many rows of which this rank holds one."""
    shape = first_val(node).shape
    asked = node.args[1] if len(node.args) > 1 else list(range(len(shape)))
    dims = [d for d in (asked if isinstance(asked, (list, tuple)) else [asked]) if shape and same_size(shape[d], 1)]  # type: ignore[index]
    return local.emit(aten.squeeze.dims, (local.args[0], dims), {})


def _reorder(order_of: Callable[[fx.Node, int], list[int]]) -> Callable[[fx.Node], Factors]:
    def factors(node: fx.Node) -> Factors:
        shape = first_val(node).shape
        names, sizes = plain_dims(len(shape)), {}
        old = dims_of(shape, names, sizes)
        return Factors((old,), (tuple(old[i] for i in order_of(node, len(shape))),), sizes)

    return factors


def _swapped(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    a, b = (as_dim(d, rank) for d in node.args[1:3])
    order[a], order[b] = order[b], order[a]
    return order


def _slice(node: fx.Node) -> Factors | None:
    """Cutting a dim needs it whole, but for two ways: a little of the end is cut, or few rows are taken.

    Cutting only the end keeps rows where they are. Few rows are sent to every rank by the ranks that have them. What is
    between, half of a sequence, `moves` lays out anew.
    """
    shape, result = first_val(node).shape, result_shapes(node)[0]
    dim = as_dim(argument(node, 1, "dim", 0), len(shape))
    names = plain_dims(len(shape))
    sizes: dict[str, Size] = {}
    old = dims_of(shape, names, sizes)
    if _keeps_start(node, shape[dim], result[dim]) and not same_size(result[dim], 1) and not same_size(result[dim], 0):
        shorter = frozenset() if same_size(shape[dim], result[dim]) else frozenset({f"d{dim}"})
        return Factors((old,), (old,), sizes, cut=shorter)
    cut = list(old)
    cut[dim] = () if same_size(result[dim], 1) else ("cut",)
    sizes["cut"] = result[dim]
    if _takes_few_rows(node, shape[dim], result[dim]):
        taken = frozenset({f"d{dim}"})
        return Factors((old,), (tuple(cut),), sizes, frozenset({"cut"}), sums=taken, cut=taken)
    return Factors((old,), (tuple(cut),), sizes, frozenset({f"d{dim}", "cut"}))


def _keeps_start(node: fx.Node, size: Size, taken: Size) -> bool:
    from_start = argument(node, 2, "start") in (None, 0) and argument(node, 4, "step", 1) == 1
    return from_start and not (isinstance(size, int) and isinstance(taken, int) and not keeps_most(taken, size))


def _takes_few_rows(node: fx.Node, size: Size, taken: Size) -> bool:
    """Whether summing `taken` rows over ranks is less than gathering all: it sends each of them twice."""
    return argument(node, 4, "step", 1) == 1 and isinstance(taken, int) and 0 < 4 * taken <= hint(size) and taken <= _FEW


def _from_front(index: Any, size: Size) -> Size:
    """An index that may be counted from behind, counted from the front; None is 0."""
    place = index.meta["val"] if isinstance(index, fx.Node) else index or 0
    return place + size if hint(place) < 0 else place


def _local_slice(node: fx.Node, local: LocalEmitter) -> fx.Node:
    """Dropping the last rows of the sequence keeps the others where they are; any other dim is cut as before."""
    mark, shape, result = local.operand_mark(0), first_val(node).shape, result_shapes(node)[0]
    dim = as_dim(argument(node, 1, "dim", 0), len(shape))
    if mark is None or mark.dim != dim:
        return local.emit(node.target, local.args, local.kwargs)  # type: ignore[arg-type]
    if same_size(shape[dim], result[dim]):
        return local.args[0]
    if _keeps_start(node, shape[dim], result[dim]) and not same_size(result[dim], 1):
        return local.emit(rows.drop_last_rows, (local.args[0],), {**local.sharding(0), "length": local.size(result[dim])})
    return local.emit(rows.few_rows, (local.args[0],), {
        "start": local.size(_from_front(argument(node, 2, "start"), shape[dim])), "count": result[dim], **local.sharding(0)})


def _select(node: fx.Node) -> Factors:
    """One row of a sequence (the first token's, to classify by) is sent to every rank by the rank that has it."""
    shape = first_val(node).shape
    dim = as_dim(node.args[1], len(shape))
    sizes: dict[str, Size] = {}
    old = dims_of(shape, plain_dims(len(shape)), sizes)
    taken = frozenset({f"d{dim}"})
    return Factors((old,), (old[:dim] + old[dim + 1:],), sizes, sums=taken, cut=taken)


def _local_select(node: fx.Node, local: LocalEmitter) -> fx.Node:
    mark, shape = local.operand_mark(0), first_val(node).shape
    dim = as_dim(node.args[1], len(shape))
    if mark is None or mark.dim != dim:
        return local.emit(node.target, local.args, local.kwargs)  # type: ignore[arg-type]
    row = local.emit(rows.few_rows, (local.args[0],), {
        "start": local.size(_from_front(node.args[2], shape[dim])), "count": 1, **local.sharding(0)})
    return local.emit(aten.squeeze.dim, (row, dim), {})


def _unsqueeze(node: fx.Node) -> Factors:
    shape = first_val(node).shape
    dim = as_dim(node.args[1], len(shape) + 1)
    sizes: dict[str, Size] = {}
    old = dims_of(shape, plain_dims(len(shape)), sizes)
    return Factors((old,), (old[:dim] + ((),) + old[dim:],), sizes)


def _expand(node: fx.Node) -> Factors:
    shape, result = first_val(node).shape, result_shapes(node)[0]
    sizes: dict[str, Size] = {}
    new = dims_of(result, plain_dims(len(result)), sizes)
    tail = new[len(result) - len(shape):]
    old = tuple(() if same_size(size, 1) else dim for size, dim in zip(shape, tail, strict=True))
    return Factors((old,), (new,), sizes)


def _join(node: fx.Node) -> Factors | None:
    """`cat`: the joined dim must be whole in every operand; the others are shared."""
    shapes = [s for s in operand_shapes(node) if s is not None]
    rank = len(result_shapes(node)[0])
    if any(len(s) != rank for s in shapes):
        return None
    dim = as_dim(argument(node, 1, "dim", 0), rank)
    sizes: dict[str, Size] = {}
    names = plain_dims(rank)
    operands: list[Dims] = []
    for i, shape in enumerate(shapes):
        names[dim] = (f"part{i}",)
        operands.append(dims_of(shape, names, sizes))
    names[dim] = ("joined",)
    result = dims_of(result_shapes(node)[0], names, sizes)
    whole = frozenset({"joined", *(f"part{i}" for i in range(len(shapes)))})
    return Factors(tuple(operands), (result,), sizes, whole)


def _stack(node: fx.Node) -> Factors:
    shapes = [s for s in operand_shapes(node) if s is not None]
    dim = as_dim(argument(node, 1, "dim", 0), len(shapes[0]) + 1)
    sizes: dict[str, Size] = {}
    operands = tuple(dims_of(s, plain_dims(len(s)), sizes) for s in shapes)
    sizes["stacked"] = len(shapes)
    stacked = (("stacked",),) if len(shapes) > 1 else ((),)
    return Factors(operands, (operands[0][:dim] + stacked + operands[0][dim:],), sizes, frozenset({"stacked"}))


def _cut_up(node: fx.Node) -> Factors:
    """`split`, `chunk`: the cut dim must be whole."""
    shape = first_val(node).shape
    dim = as_dim(argument(node, 2, "dim", 0), len(shape))
    sizes: dict[str, Size] = {}
    names = plain_dims(len(shape))
    old = dims_of(shape, names, sizes)
    results = []
    for i, part in enumerate(result_shapes(node)):
        names[dim] = (f"part{i}",)
        results.append(dims_of(part, names, sizes))
    whole = frozenset({f"d{dim}", *(f"part{i}" for i in range(len(results)))})
    return Factors((old,), tuple(results), sizes, whole)


def _unbind(node: fx.Node) -> Factors:
    shape = first_val(node).shape
    dim = as_dim(argument(node, 1, "dim", 0), len(shape))
    sizes: dict[str, Size] = {}
    old = dims_of(shape, plain_dims(len(shape)), sizes)
    return Factors((old,), (old[:dim] + old[dim + 1:],) * len(result_shapes(node)), sizes, frozenset({f"d{dim}"}))


def _repeat(node: fx.Node) -> Factors:
    """[d] repeated r times is [(r d)]; the number of copies stays as it is, so `r` is whole."""
    shape, result = first_val(node).shape, result_shapes(node)[0]
    sizes: dict[str, Size] = {}
    names = plain_dims(len(result))
    old = dims_of(shape, names[len(result) - len(shape):], sizes)
    new = []
    for i, size in enumerate(result):
        inside = i - (len(result) - len(shape))
        dim = old[inside] if inside >= 0 else ()
        times = size if inside < 0 else node.args[1][i]  # type: ignore[index]
        if isinstance(times, fx.Node):
            times = times.meta["val"]
        if not same_size(times, 1):
            sizes[f"r{i}"] = times
            dim = (f"r{i}", *dim)
        new.append(dim)
    return Factors((old,), (tuple(new),), sizes, frozenset(name for name in sizes if name.startswith("r")))


def _pad(node: fx.Node) -> Factors:
    """Padded dims must be whole, also where one end gains what the other loses: a shift keeps the shape."""
    shape, result = first_val(node).shape, result_shapes(node)[0]
    sizes: dict[str, Size] = {}
    names = plain_dims(len(shape))
    old = dims_of(shape, names, sizes)
    amounts: list[object] = list(node.args[1])  # type: ignore[arg-type]  # (before, after) of the last dim first
    padded = {len(shape) - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}
    new_names = [(f"p{i}",) if i in padded else name for i, name in enumerate(names)]
    new = dims_of(result, new_names, sizes)
    return Factors((old,), (new,), sizes, frozenset({name for i in padded for name in (f"d{i}", f"p{i}")}))


def _reversed(position: int) -> Callable[[fx.Node], Factors]:
    """`flip`, `roll`: the dims at argument `position` (none: all of them) must be whole."""

    def factors(node: fx.Node) -> Factors:
        shape = first_val(node).shape
        dims: list[int] = list(argument(node, position, "dims") or range(len(shape)))  # type: ignore[arg-type]
        sizes: dict[str, Size] = {}
        old = dims_of(shape, plain_dims(len(shape)), sizes)
        return Factors((old,), (old,), sizes, frozenset(f"d{as_dim(d, len(shape))}" for d in dims))

    return factors


def _repeat_each(node: fx.Node) -> Factors | None:
    """`repeat_interleave`: [d] becomes [(d r)]."""
    shape, times, where = first_val(node).shape, node.args[1], argument(node, 2, "dim")
    if where is None or node.kwargs.get("output_size") is not None:
        return None
    dim = as_dim(where, len(shape))
    sizes: dict[str, Size] = {}
    old = dims_of(shape, plain_dims(len(shape)), sizes)
    sizes["r"] = times.meta["val"] if isinstance(times, fx.Node) else times  # type: ignore[assignment]
    repeated = old[dim] if same_size(sizes["r"], 1) else (*old[dim], "r")
    return Factors((old,), ((*old[:dim], repeated, *old[dim + 1:]),), sizes, frozenset({"r"}))


def _fill(node: fx.Node) -> Factors:
    """A constant tensor: every dim is free."""
    sizes: dict[str, Size] = {}
    result = dims_of(result_shapes(node)[0], plain_dims(len(result_shapes(node)[0]), "r"), sizes)
    return Factors((None,) * len(operand_shapes(node)), (result,), sizes)


def _triangle(node: fx.Node) -> Factors | None:
    return bind_node(parse_pattern("... m! n! -> ... m! n!"), node)


RULES = {
    aten.reshape.default: Rule(_reshape, sizes_arg=1),
    aten.flatten.using_ints: Rule(_reshape),
    **{op: Rule(_reshape, local=_local_squeeze) for op in (aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims)},
    aten.unsqueeze.default: Rule(_unsqueeze),
    aten.expand.default: Rule(_expand, sizes_arg=1),
    aten.transpose.int: Rule(_reorder(_swapped)),
    aten.t.default: Rule(_reorder(lambda node, rank: list(range(rank))[::-1])),
    aten.permute.default: Rule(_reorder(lambda node, rank: [as_dim(d, rank) for d in node.args[1]])),  # type: ignore[union-attr]
    aten.slice.Tensor: Rule(_slice, local=_local_slice),
    aten.select.int: Rule(_select, local=_local_select),
    aten.cat.default: Rule(_join),
    aten.stack.default: Rule(_stack),
    **{op: Rule(_cut_up) for op in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)},
    aten.unbind.int: Rule(_unbind),
    aten.repeat.default: Rule(_repeat), aten.repeat_interleave.self_int: Rule(_repeat_each),
    aten.flip.default: Rule(_reversed(1)), aten.roll.default: Rule(_reversed(2)),
    aten.pad.default: Rule(_pad), aten.constant_pad_nd.default: Rule(_pad),
    aten.tril.default: Rule(_triangle), aten.triu.default: Rule(_triangle),
    **{op: Rule(_fill, sizes_arg=0) for op in (aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format)},
    **{op: Rule(_fill, sizes_arg=1, unread=frozenset({0})) for op in (
        aten.new_full.default, aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default)},
}
