"""Check that an attention written out is what replaces it: the rewrite is done again on a small copy, and both are run.

A difference is an error of the compiler itself, never a wrong attention.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autoseq.passes.attention_site import is_attention
from autoseq.passes.check_formulas import compare
from autoseq.passes.shrink import CannotShrink, shrink
from autoseq.passes.sizes import hint
from autoseq.passes.softmax_attention import Frame, NotUnderstood, match

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Sums of numbers of order 1 in another order, in the dtype that the program computes in."""


def check_rewrite(frame: Frame, result: fx.Node, old_nodes: set[fx.Node], rewrite: Callable[[Frame], fx.Node]) -> None:
    """Raise AssertionError if `result`, which `rewrite` made of `frame`, is not what the program computes; NotUnderstood if unknown.

    `old_nodes` are those of the graph before the rewrite.
    """
    site, made_of = _made_of(result, old_nodes)
    leaves = [node for node in made_of if node is not frame.sink]  # that it is alike in all rows has to be read again
    query, key = (x.meta["val"] for x in site.args[:2])  # type: ignore[union-attr]
    try:
        small = shrink(
            frame.below.node, leaves, q_len=query.shape[2], k_len=key.shape[2], lanes=hint(query.shape[0] * query.shape[1])
        )  # fmt: skip
        again = match(small.of[frame.softmax])
    except CannotShrink as error:
        raise NotUnderstood(f"the formula of its scores could not be checked: {error}") from error
    assert again is not None, f"{frame.softmax} is no attention when it is copied"
    actual = _value(rewrite(replace(again, dropout_p=0.0)), set(small.of.values()))
    compare(f"the attention at {site.meta['attention']['source']}", actual, small.value(frame.below.node), _TOLERANCE[actual.dtype])


def _made_of(result: fx.Node, old_nodes: set[fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
    """The attention in front of `result`, and the program's own nodes that the new ones are made of."""
    queue, leaves, site = [result], dict[fx.Node, None](), None
    while queue:
        node = queue.pop()
        site = node if is_attention(node) else site
        for operand in node.all_input_nodes:
            if operand in old_nodes:
                leaves[operand] = None
            else:
                queue.append(operand)
    assert site is not None
    return site, list(leaves)


def _value(node: fx.Node, valued: set[fx.Node]) -> Any:
    """The value of a node that was added to a copy, whose own nodes hold theirs."""
    if node in valued:
        return node.meta["val"]
    args, kwargs = (fx.map_arg(a, lambda n: _value(n, valued)) for a in (node.args, node.kwargs))
    return node.target(*args, **kwargs)  # type: ignore[operator]
