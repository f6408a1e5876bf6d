"""Recognise attention written out: a softmax over scores that come from one product q·kᵀ, times v.

    scores = matmul(q, transpose(k)) * 0.125 + mask
    y = matmul(dropout(softmax(scores, -1)), v)

What stands between the product and the softmax may be any chain of elementwise operators, masks and views: it is read as a formula
later (`formula/`). Here only the frame is matched: the softmax, the one product above it, the one product below it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoseq.passes.products import Product, product_of
from autoseq.passes.sizes import hint, same_size

aten = torch.ops.aten
SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_CASTS = (aten._to_copy.default, aten.to.dtype, aten.type_as.default)
_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, *_CASTS)
_VIEWS = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default)
_KEEPS_ELEMENTS = (
    *_COPIES, *_VIEWS, aten.cat.default, aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.masked_fill.Tensor,
    aten.where.ScalarOther, aten.where.ScalarSelf,
)  # fmt: skip
_LONGEST_CHAIN = 200


class NotUnderstood(Exception):
    """It looks like attention, and this is why it is not read as one."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One attention written out: scores → softmax → probabilities → value product."""

    softmax: fx.Node
    scores: fx.Node  # what is exponentiated, without the sinks' column and without a subtracted maximum
    sink: fx.Node | None  # the last column, [..., q, 1]
    above: Product
    below: Product
    dropout_p: float

    @property
    def empty_rows(self) -> str:
        return "zero" if self.softmax.target is aten._safe_softmax.default else "nan"


def match(softmax: fx.Node) -> Frame | None:
    """The frame around a softmax; None if it is no attention. Raises NotUnderstood if it looks like one."""
    above = _products_above(softmax)
    if not above or not _reaches_product(softmax):
        return None
    if len(above) > 1:
        raise NotUnderstood("its scores are made of several products")
    rank = softmax.meta["val"].dim()
    if int(softmax.args[1]) % rank != rank - 1:  # type: ignore[arg-type]
        raise NotUnderstood("the softmax is not over the last dimension")
    scores, sink = _strip_sink(_strip_maximum(softmax.args[0]))  # type: ignore[arg-type]
    below, dropout_p = _follow(softmax, has_sink=sink is not None)
    return Frame(softmax, scores, sink, above[0], below, dropout_p)


def _products_above(softmax: fx.Node) -> list[Product]:
    """The products of two tensors that the scores are made of, found through operators that keep the number of elements."""
    queue: list[fx.Node] = [softmax.args[0]]  # type: ignore[list-item]
    seen: set[fx.Node] = set()
    found: list[Product] = []
    size = _elements(_strip_sink(_strip_maximum(queue[0]))[0])
    while queue and len(seen) < _LONGEST_CHAIN:
        node = queue.pop()
        if node in seen or node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor) or _elements(node) < size:
            continue
        seen.add(node)
        product = product_of(node)
        if product is not None:
            found.append(product)
        elif _keeps_elements(node):
            queue.extend(node.all_input_nodes)
    return found


def _elements(node: fx.Node) -> int:
    return hint(node.meta["val"].numel())


def _keeps_elements(node: fx.Node) -> bool:
    return node.target in _KEEPS_ELEMENTS or (isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags)


def _before_casts(node: Any) -> Any:
    while node.target in _CASTS:
        node = node.args[0]
    return node


def _strip_maximum(scores: fx.Node) -> fx.Node:
    """Softmax does not change when a row's maximum is subtracted, and neither do its gradients."""
    inner = _before_casts(scores)
    if inner.target is not aten.sub.Tensor or not all(isinstance(a, fx.Node) for a in inner.args[:2]):
        return scores
    top: Any = inner.args[1]
    while top.target in (aten.detach.default, aten.alias.default) or getattr(top.target, "__name__", "") == "getitem":
        top = top.args[0]
    if top.target not in (aten.amax.default, aten.max.dim) or top.args[0] is not inner.args[0] or len(top.args) < 3 or not top.args[2]:
        return scores  # without `keepdim` it is subtracted along another dim
    dims = top.args[1] if isinstance(top.args[1], (list, tuple)) else [top.args[1]]
    last = inner.meta["val"].dim() - 1
    return inner.args[0] if [d % (last + 1) for d in dims] == [last] else scores


def _strip_sink(scores: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """`cat([scores, sinks], -1)` with one column of sinks."""
    inner = _before_casts(scores)
    if inner.target is not aten.cat.default or len(inner.args[0]) != 2:
        return scores, None
    first, last = inner.args[0]
    dim = int((*inner.args, 0)[1]) % inner.meta["val"].dim()
    if dim != inner.meta["val"].dim() - 1 or not same_size(last.meta["val"].shape[-1], 1):
        return scores, None
    return first, last


def _reaches_product(node: fx.Node) -> bool:
    """Whether probabilities end as the left factor of a product."""
    queue, seen = list(node.users), set()
    while queue and len(seen) < _LONGEST_CHAIN:
        user = queue.pop()
        if user in seen:
            continue
        seen.add(user)
        if product_of(user) is not None:
            return True
        if _keeps_elements(user) or user.target is aten.dropout.default:
            queue.extend(user.users)
    return False


def _follow(softmax: fx.Node, *, has_sink: bool) -> tuple[Product, float]:
    """From the softmax to its value product: casts, copies, views of leading dims, one dropout, the cut of the sinks' column."""
    node, dropout_p, cut = softmax, 0.0, False
    while True:
        if len(node.users) != 1:
            raise NotUnderstood("its probabilities are used besides")
        user = next(iter(node.users))
        product = product_of(user)
        if product is not None:
            if product.left is not node or product.right is node:
                raise NotUnderstood("its probabilities are not the left factor of the product with the values")
            if has_sink and not cut:
                raise NotUnderstood("a column is appended to its scores and multiplied by values")
            return product, dropout_p
        if user.target is aten.dropout.default:
            p, train = user.args[1:3]
            if train and p:
                if dropout_p or not isinstance(p, float):
                    raise NotUnderstood("its dropout is not one constant")
                dropout_p = p
        elif user.target is aten.slice.Tensor and has_sink and not cut and _cuts_last(user):
            cut = True
        elif not (user.target in _COPIES or (user.target in _VIEWS and _keeps_rows(user))):
            raise NotUnderstood(f"{user.target} stands between its softmax and the product with the values")
        node = user


def _cuts_last(node: fx.Node) -> bool:
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    shape, rest = source.meta["val"].shape, node.meta["val"].shape
    dim, start = int(node.args[1]) % len(shape), node.args[2] or 0  # type: ignore[arg-type]
    return dim == len(shape) - 1 and bool(start == 0) and same_size(rest[-1], shape[-1] - 1)


def _keeps_rows(node: fx.Node) -> bool:
    """Whether a view leaves the last two dims alone."""
    old, new = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    return len(old) >= 2 and len(new) >= 2 and same_size(old[-1], new[-1]) and same_size(old[-2], new[-2])
