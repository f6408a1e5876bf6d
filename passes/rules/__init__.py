"""The sharding rules: one table per family, and pointwise operators by torch's own tag."""

from dataclasses import replace

import torch
from torch import fx

from autoseq.passes.autograd_functions import AUTOGRAD_FUNCTION, FUNCTIONS
from autoseq.passes.factors import Factors, Pattern, bind
from autoseq.passes.rules import linear_algebra, lookups, losses, reductions, shapes
from autoseq.passes.rules.rule import LocalEmitter, Rule, operand_shapes, result_shapes
from autoseq.runtime.written import WRITTEN

__all__ = ["LocalEmitter", "Rule", "rule_for"]

aten = torch.ops.aten


def _pointwise(node: fx.Node) -> Factors | None:
    """Every operand broadcasts against every other: `..., ..., ... -> ...`; every result (`broadcast_tensors`) has that shape."""
    operands, results = operand_shapes(node), result_shapes(node)
    spread = Pattern(((None,),) * len(operands), (True,) * len(operands), ((None,),) * len(results), frozenset(), frozenset())
    return bind(spread, operands, results)


def _row_wise(node: fx.Node) -> Factors | None:
    """A custom autograd function whose two bodies are pointwise."""
    return _pointwise(node) if FUNCTIONS[str(node.args[3])].row_wise else None


def _like_first(node: fx.Node) -> Factors | None:
    """`type_as`: of the operands behind the first only the dtype is read."""
    operands = operand_shapes(node)
    factors = bind(_EACH, operands[:1], result_shapes(node))
    return factors and replace(factors, operands=(*factors.operands, *(None,) * (len(operands) - 1)))


_EACH = Pattern(((None,),), (False,), ((None,),), frozenset(), frozenset())
_POINTWISE = Rule(_pointwise)
_ALSO_POINTWISE = {
    aten.clone.default, aten._to_copy.default, aten.contiguous.default, aten.detach.default, aten.to.dtype, aten.to.dtype_layout,
    aten.alias.default, aten.masked_fill.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar,
    aten.broadcast_tensors.default,
}  # fmt: skip
_LIKES = {  # their operand is read for its shape alone
    op: Rule(_pointwise, unread=frozenset({0})) for op in (
        aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default)
}  # fmt: skip
_DRAWS = {  # no rule: each rank would draw the same numbers for other rows; the operand is not read, so it is not gathered
    op: Rule(lambda node: None, unread=frozenset({0})) for op in (
        aten.rand_like.default, aten.randn_like.default, aten.randint_like.default, aten.randint_like.low_dtype, aten.uniform.default,
        aten.normal_functional.default, aten.exponential.default, aten.bernoulli.p)
}  # fmt: skip
TABLE: dict[object, Rule] = {
    **linear_algebra.RULES, **shapes.RULES, **lookups.RULES, **reductions.RULES, **losses.RULES, **_LIKES, **_DRAWS,
    AUTOGRAD_FUNCTION: Rule(_row_wise), WRITTEN: Rule(_pointwise),
    aten.type_as.default: Rule(_like_first, unread=frozenset({1})), aten.expand_as.default: Rule(_pointwise, unread=frozenset({1})),
}  # fmt: skip


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
