"""Rules of losses and of randomness: operators whose sharded form is not the same operator on local rows."""

from typing import Any

import torch
from torch import fx

from autoseq.passes.factors import Factors, Size
from autoseq.passes.rules.rule import LocalEmitter, Rule, argument, dims_of, operand_shapes, plain_dims, result_shapes
from autoseq.runtime import rows

aten = torch.ops.aten


def _cross_entropy(node: fx.Node) -> Factors | None:
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


def _local_cross_entropy(node: fx.Node, local: LocalEmitter) -> fx.Node:
    names = [a.name for a in aten.cross_entropy_loss.default._schema.arguments]
    defaults: dict[str, Any] = {a.name: a.default_value for a in aten.cross_entropy_loss.default._schema.arguments}
    bound = {**defaults, **dict(zip(names, local.args, strict=False)), **local.kwargs}
    return local.emit(
        rows.cross_entropy,
        (bound["self"], bound["target"], bound["weight"]),
        {"reduction": _REDUCTIONS[bound["reduction"]], "ignore_index": bound["ignore_index"],
         "label_smoothing": bound["label_smoothing"], **local.sharding(1)},
    )


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
    aten.cross_entropy_loss.default: Rule(_cross_entropy, local=_local_cross_entropy),
    aten.dropout.default: Rule(_every_dim, local=_local_dropout),
}
