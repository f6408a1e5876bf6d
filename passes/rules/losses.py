"""Rules of losses and of randomness: operators whose sharded form is not the same operator on local rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autoseq.passes.factors import Factors, Size, product
from autoseq.passes.rules.rule import LocalEmitter, Rule, argument, dims_of, operand_shapes, plain_dims, result_shapes
from autoseq.passes.sizes import same_shape
from autoseq.runtime import collectives, rows

aten = torch.ops.aten


def _class_rows(node: fx.Node) -> Factors | None:
    """logits [N, C] or [B, C, d…], target [N] or [B, d…]: the classes must be whole, rows are summed or kept."""
    logits, target, *_ = operand_shapes(node)
    if logits is None or target is None or len(logits) < 2 or len(target) != len(logits) - 1:
        return None  # one unbatched row, or class probabilities
    sizes: dict[str, Size] = {}
    names = plain_dims(len(logits))
    logits_dims = dims_of(logits, names, sizes)
    rows_only = logits_dims[:1] + logits_dims[2:]
    result = rows_only if len(result_shapes(node)[0]) else ()
    weight = None if operand_shapes(node)[2] is None else (logits_dims[1],)
    sums = frozenset() if result else frozenset(f for dim in rows_only for f in dim)
    return Factors((logits_dims, rows_only, weight), (result,), sizes, frozenset({"d1"}), sums)


_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}


def _bound(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A node's arguments by name, with the schema's defaults."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    return {**{a.name: a.default_value for a in arguments}, **dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}


def _local_class_loss(on_rows: Callable[..., Any], *keywords: str) -> Callable[[fx.Node, LocalEmitter], fx.Node]:
    def local_form(node: fx.Node, local: LocalEmitter) -> fx.Node:
        bound = _bound(node, local.args, local.kwargs)
        settings = {"reduction": _REDUCTIONS[bound["reduction"]], **{name: bound[name] for name in keywords}}
        return local.emit(on_rows, (bound["self"], bound["target"], bound["weight"]), {**settings, **local.sharding(1)})

    return local_form


def _each_element(node: fx.Node) -> Factors | None:
    """A loss of two tensors of one shape, element by element (`mse_loss`, `kl_div`): kept, or added up."""
    shape, *others = operand_shapes(node)
    assert shape is not None
    if not all(s is None or same_shape(s, shape) for s in others):
        return None
    sizes: dict[str, Size] = {}
    dims = dims_of(shape, plain_dims(len(shape)), sizes)
    operands = tuple(None if s is None else dims for s in (shape, *others))
    if _bound(node, node.args, node.kwargs)["reduction"] == 0:
        return Factors(operands, (dims,), sizes)
    return Factors(operands, ((),), sizes, sums=frozenset(sizes))


def _local_each_element(node: fx.Node, local: LocalEmitter) -> fx.Node:
    """The sum of the local rows' losses, summed over ranks; for a mean, over the count of all elements."""
    reduction = _bound(node, node.args, node.kwargs)["reduction"]
    args, kwargs = list(local.args), dict(local.kwargs)
    position = [a.name for a in node.target._schema.arguments].index("reduction")  # type: ignore[union-attr]
    if position < len(args):
        args[position] = 0
    else:
        kwargs["reduction"] = 0
    if reduction == 0:
        return local.emit(node.target, tuple(args), kwargs)  # type: ignore[arg-type]
    for i in range(2):  # `binary_cross_entropy` refuses values outside [0, 1], in the padding too
        args[i] = local.emit(rows.zero_padding, (args[i],), local.sharding(i))
    each = local.emit(node.target, tuple(args), kwargs)  # type: ignore[arg-type]
    valid = local.emit(rows.zero_padding, (each,), local.sharding(0))
    dtype = node.meta["val"].dtype
    half = dtype in (torch.float16, torch.bfloat16)  # the sum of many rows may overflow where their mean does not
    summed = local.emit(aten.sum.default, (valid,), {"dtype": torch.float32 if half else dtype})
    total = local.emit(collectives.all_reduce, (summed,), {"group": local.sharding(0)["group"]})
    if reduction == 1:
        total = local.emit(aten.div.Tensor, (total, local.size(product(operand_shapes(node)[0]))), {})  # type: ignore[arg-type]
    return local.emit(aten._to_copy.default, (total,), {"dtype": dtype}) if half else total


def _every_dim(node: fx.Node) -> Factors:
    shape = operand_shapes(node)[0]
    assert shape is not None
    sizes: dict[str, Size] = {}
    dims = dims_of(shape, plain_dims(len(shape)), sizes)
    return Factors((dims,), (dims,), sizes)


def _local_dropout(node: fx.Node, local: LocalEmitter) -> fx.Node:
    if argument(node, 1, "p") == 0 or not argument(node, 2, "train", True):
        return local.emit(node.target, local.args, local.kwargs)  # type: ignore[arg-type]
    return local.emit(rows.dropout, (local.args[0], argument(node, 1, "p")), {"group": local.sharding(0)["group"]})


RULES = {
    aten.cross_entropy_loss.default: Rule(_class_rows, local=_local_class_loss(rows.cross_entropy, "ignore_index", "label_smoothing")),
    **{op: Rule(_class_rows, local=_local_class_loss(rows.nll_loss, "ignore_index")) for op in (
        aten.nll_loss_nd.default, aten.nll_loss.default, aten.nll_loss2d.default)},
    **{op: Rule(_each_element, local=_local_each_element) for op in (
        aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default, aten.kl_div.default,
        aten.binary_cross_entropy.default, aten.binary_cross_entropy_with_logits.default, aten.soft_margin_loss.default)},
    aten.dropout.default: Rule(_every_dim, local=_local_dropout),
}  # fmt: skip
