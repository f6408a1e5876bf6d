"""Whether the two bodies of a custom autograd function compute row by row, so that they may run on local rows alone.

    forward:  y = x * sigmoid(x)                        each element of a result comes from the same element of the operands
    backward: g * (s + x * s * (1 - s))                 … and is 0 where the gradient that comes in is 0

The second is needed because a shard's padding rows get no gradient, and must give none: they stand beside real rows in every sum
that follows. Both are read off the ATen operators of the bodies; what is not known to be so is not so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autoseq.passes.inline import trace_body
from autoseq.passes.sizes import same_shape, same_size

aten = torch.ops.aten

_COPIES = {aten._to_copy.default, aten.clone.default, aten.detach.default, aten.alias.default}
_MADE_ALIKE = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default}
_ODD = {  # 0 where their one operand is 0
    *_COPIES, aten.scalar_tensor.default, aten.neg.default, aten.abs.default, aten.sign.default,
    aten.tanh.default, aten.sin.default, aten.relu.default, aten.square.default, aten.sqrt.default, aten.erf.default,
    aten.gelu.default, aten.silu.default,
}  # fmt: skip
_ANY = {aten.mul.Tensor, aten.mul.Scalar}
_ALL = {aten.add.Tensor, aten.sub.Tensor}
_FIRST = {
    aten.div.Tensor, aten.div.Scalar, aten.tanh_backward.default, aten.sigmoid_backward.default, aten.threshold_backward.default,
    aten.gelu_backward.default, aten.silu_backward.default, aten.pow.Tensor_Scalar,
}  # fmt: skip


def is_row_wise(forward: Callable[..., Any], backward: Callable[..., Any], examples: Sequence[Any]) -> bool:
    """Whether a function whose bodies are `forward(*operands) → (results, saved)` and `backward(*gradients, *saved)` is row-wise."""
    ahead = trace_body(forward, examples)
    outputs: Any = ahead.graph.output_node().args[0]
    results, saved = outputs
    values = [_value(x) for x in (*results, *saved)]
    tensors = [x for x in examples if isinstance(x, Tensor)]
    shape = max((x.shape for x in tensors), key=len)
    if not all(_broadcasts(x.shape, shape) for x in tensors):
        return False
    if not all(isinstance(x, Tensor) and same_shape(x.shape, shape) for x in values[: len(results)]):
        return False
    back = trace_body(backward, [x.detach() if isinstance(x, Tensor) else x for x in values])
    vanishing = _vanishing(back.graph, set(back.graph.find_nodes(op="placeholder")[: len(results)]))
    gradients: Any = back.graph.output_node().args[0]
    return all(_is_pointwise(node) for body in (ahead, back) for node in body.graph.nodes) and all(
        gradient is None or gradient in vanishing for gradient in gradients
    )


def _value(x: Any) -> Any:
    return x.meta["val"] if isinstance(x, fx.Node) else x


def _broadcasts(shape: Sequence[Any], result: Sequence[Any]) -> bool:
    """Whether a shape provably broadcasts to that of the result."""
    return all(same_size(a, b) or same_size(a, 1) for a, b in zip(reversed(shape), reversed(result), strict=False))


def _is_pointwise(node: fx.Node) -> bool:
    if node.op == "placeholder":  # a size may be handed on, but nothing may be made of it
        return isinstance(node.meta["val"], Tensor) or all(user.op == "output" for user in node.users)
    if node.op == "output":
        return True
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is aten.scalar_tensor.default:  # a number in `where`
        return True
    tags = node.target.tags
    pointwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    return (pointwise and not node.target._schema.is_mutable) or node.target in _COPIES | _MADE_ALIKE


def _vanishing(graph: fx.Graph, zeros: set[fx.Node]) -> set[fx.Node]:
    """The nodes that are 0 wherever all of `zeros` are 0, whatever finite values the rest has."""
    found = set(zeros)

    def is_zero(x: Any) -> bool:
        return x in found if isinstance(x, fx.Node) else x == 0

    for node in graph.nodes:
        args = [*node.args, None, None, None]
        zero = (
            node.target is aten.zeros_like.default
            or (node.target in _ODD and is_zero(args[0]))
            or (node.target in _ANY and (is_zero(args[0]) or is_zero(args[1])))
            or (node.target in _ALL and is_zero(args[0]) and is_zero(args[1]))
            or (node.target in _FIRST and is_zero(args[0]) and (node.target is not aten.pow.Tensor_Scalar or args[1] > 0))
            or (node.target is aten.where.self and is_zero(args[1]) and is_zero(args[2]))
            or (node.target is aten.masked_fill.Scalar and is_zero(args[0]) and is_zero(args[2]))
            or (node.target is aten.clamp.default and is_zero(args[0]) and (args[1] or 0) <= 0 <= (args[2] or 0))
        )
        if zero:
            found.add(node)
    return found
