"""The sharding rules: one table per family, and pointwise operators by torch's own tag."""

import torch
from torch import fx

from autoseq.passes.factors import Factors, Pattern, bind
from autoseq.passes.rules import linear_algebra, losses, reductions, shapes
from autoseq.passes.rules.rule import LocalEmitter, Rule, operand_shapes, result_shapes

__all__ = ["LocalEmitter", "Rule", "rule_for"]

aten = torch.ops.aten


def _pointwise(node: fx.Node) -> Factors | None:
    """Every operand broadcasts against every other: `..., ..., ... -> ...`."""
    operands = operand_shapes(node)
    spread = Pattern(((None,),) * len(operands), (True,) * len(operands), ((None,),), frozenset(), frozenset())
    return bind(spread, operands, result_shapes(node))


_POINTWISE = Rule(_pointwise)
_ALSO_POINTWISE = {
    aten.clone.default, aten._to_copy.default, aten.contiguous.default, aten.detach.default, aten.to.dtype,
    aten.alias.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.masked_fill.Tensor, aten.empty_like.default,
}  # fmt: skip
TABLE: dict[object, Rule] = {**linear_algebra.RULES, **shapes.RULES, **reductions.RULES, **losses.RULES}


def rule_for(node: fx.Node) -> Rule | None:
    """The rule of a node's operator, or None: then it runs on whole values."""
    target = node.target
    if target in TABLE:
        return TABLE[target]
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if target in _ALSO_POINTWISE:
        return _POINTWISE
    tags = target.tags
    is_pointwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    return _POINTWISE if is_pointwise else None
