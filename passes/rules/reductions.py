"""Rules of operators that mix the elements of a dim: sums leave a partial sum, everything else needs the dim whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autoseq.passes.factors import Factors, Size, product
from autoseq.passes.rules.rule import (
    LocalEmitter,
    Rule,
    argument,
    as_dim,
    dims_of,
    first_val,
    operand_shapes,
    plain_dims,
    result_shapes,
)
from autoseq.runtime import collectives, rows

aten = torch.ops.aten


def _reduced_dims(node: fx.Node, position: int, rank: int) -> set[int]:
    dims = argument(node, position, "dim")
    if dims is None or dims == []:
        return set(range(rank))
    return {as_dim(d, rank) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


def _reduction(position: int | None, *, sums: bool) -> Callable[[fx.Node], Factors]:
    """A reduction over the dims at argument `position` (None: over all)."""

    def factors(node: fx.Node) -> Factors:
        shape = first_val(node).shape
        rank = len(shape)
        gone = set(range(rank)) if position is None else _reduced_dims(node, position, rank)
        sizes: dict[str, Size] = {}
        old = dims_of(shape, plain_dims(rank), sizes)
        kept = len(result_shapes(node)[0]) == rank
        new = tuple(() if i in gone else dim for i, dim in enumerate(old) if kept or i not in gone)
        mixed = frozenset(f"d{i}" for i in gone)
        results = (new,) * len(result_shapes(node))
        return Factors((old,), results, sizes, frozenset() if sums else mixed, mixed if sums else frozenset())

    return factors


def _local_mean(position: int | None) -> Callable[[fx.Node, LocalEmitter], fx.Node]:
    """A mean over the sequence: the local rows' sum, summed over ranks, over the global count."""

    def local(node: fx.Node, emitter: LocalEmitter) -> fx.Node:
        mark = emitter.operand_mark(0)
        shape = first_val(node).shape
        gone = set(range(len(shape))) if position is None else _reduced_dims(node, position, len(shape))
        if mark is None or mark.dim not in gone:
            return emitter.emit(node.target, emitter.args, emitter.kwargs)  # type: ignore[arg-type]
        valid = emitter.emit(rows.zero_padding, (emitter.args[0],), emitter.sharding(0))
        keepdim = bool(argument(node, 2, "keepdim", False)) if position is not None else False
        dtype = node.meta["val"].dtype
        half = dtype in (torch.float16, torch.bfloat16)  # the sum of many rows may overflow where their mean does not
        summed = emitter.emit(aten.sum.dim_IntList, (valid, sorted(gone), keepdim), {"dtype": torch.float32 if half else dtype})
        total = emitter.emit(collectives.all_reduce, (summed,), {"group": emitter.sharding(0)["group"]})
        count = emitter.size(product([shape[d] for d in sorted(gone)]))
        mean = emitter.emit(aten.div.Tensor, (total, count), {})
        return emitter.emit(aten._to_copy.default, (mean,), {"dtype": dtype}) if half else mean

    return local


def _along(position: int, *, default: int | None = None) -> Callable[[fx.Node], Factors | None]:
    """An operator along one dim (softmax, cumsum, sort, topk): that dim is whole, the others pass."""

    def factors(node: fx.Node) -> Factors | None:
        shapes = operand_shapes(node)
        assert shapes[0] is not None
        rank = len(shapes[0])
        where: Any = argument(node, position, "dim", default)
        if where is None or any(s is not None and len(s) != rank for s in shapes):
            return None
        dim = as_dim(where, rank)
        sizes: dict[str, Size] = {}
        operands = []
        for i, shape in enumerate(shapes):
            names = plain_dims(rank)
            names[dim] = (f"along{i}",)
            operands.append(None if shape is None else dims_of(shape, names, sizes))
        results = []
        for i, shape in enumerate(result_shapes(node)):
            names = plain_dims(rank)
            names[dim] = (f"result{i}",)
            if len(shape) < rank:
                del names[dim]
            results.append(dims_of(shape, names, sizes))
        whole = frozenset(name for name in sizes if name.startswith(("along", "result")))
        return Factors(tuple(operands), tuple(results), sizes, whole)

    return factors


RULES = {
    aten.sum.default: Rule(_reduction(None, sums=True)),
    aten.sum.dim_IntList: Rule(_reduction(1, sums=True)),
    aten.mean.default: Rule(_reduction(None, sums=True), local=_local_mean(None)),
    aten.mean.dim: Rule(_reduction(1, sums=True), local=_local_mean(1)),
    **{op: Rule(_reduction(1, sums=False)) for op in (
        aten.amax.default, aten.amin.default, aten.logsumexp.default, aten.var.correction, aten.std.correction,
        aten.var.dim, aten.std.dim, aten.any.dim, aten.all.dim, aten.prod.dim_int, aten.max.dim, aten.min.dim,
        aten.var_mean.correction, aten.argmax.default, aten.argmin.default)},
    aten.linalg_vector_norm.default: Rule(_reduction(2, sums=False)),
    **{op: Rule(_reduction(None, sums=False)) for op in (aten.max.default, aten.min.default, aten.any.default, aten.all.default)},
    **{op: Rule(_along(1)) for op in (
        aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten._log_softmax.default, aten.cumsum.default,
        aten.cumprod.default)},
    **{op: Rule(_along(1, default=-1)) for op in (aten.sort.default, aten.argsort.default, aten.glu.default)},
    aten.topk.default: Rule(_along(2, default=-1)),
    aten.diff.default: Rule(_along(2, default=-1)),
}
