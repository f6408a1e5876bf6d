"""Read an attention written out: its scores as a formula over the product of queries and keys, its operands in one form."""

from typing import Any

import sympy
import torch
from torch import fx

from autoseq.passes.attention_site import add_site
from autoseq.passes.formula import Known, NotAtItsIndex, Reader
from autoseq.passes.formula.floats import requires_grad
from autoseq.passes.formula.values import capture_number, captures_in, h, is_capture, s
from autoseq.passes.heads import Canonical, Layout, layout_of, unrepeated
from autoseq.passes.products import swapped
from autoseq.passes.sizes import same_size
from autoseq.passes.softmax_attention import Frame, NotUnderstood

aten = torch.ops.aten


def read_written_out(frame: Frame) -> fx.Node:
    """The `attention` of a frame, in front of its value product and in its form. Raises NotUnderstood."""
    layout = layout_of(frame)
    reader = Reader(Known(frame.above.node, layout.index(layout.product, frame.above.node.meta["val"].shape), s), limits={h: layout.heads})
    _check_gradients(frame)
    formula = _read(frame, layout, reader)
    canonical = Canonical(frame.below.node, layout.batch, layout.heads)
    sinks = _sinks(frame, layout, reader, canonical)
    query, key, value = _operands(frame, layout, canonical)
    site = add_site(
        frame.below.node, query, key, value, captures=reader.captures, sinks=sinks, scale=1.0, empty_rows=frame.empty_rows,
        score="" if formula == s else sympy.sstr(formula), dropout_p=frame.dropout_p,
    )  # fmt: skip
    return canonical.result(site, layout.result)


def _operands(frame: Frame, layout: Layout, canonical: Canonical) -> tuple[fx.Node, fx.Node, fx.Node]:
    above = frame.above if frame.above.dims[-1] == "col" else swapped(frame.above)
    query = canonical.operand(above.left, layout.left, layout.product, "q")
    key = canonical.operand(above.right, layout.right, layout.product, "k")
    value = canonical.operand(frame.below.right, layout.value, layout.result, "k")
    key, value = unrepeated(key, value, layout.heads)
    _check_operands(query, key, value)
    return query, key, value


def _read(frame: Frame, layout: Layout, reader: Reader) -> Any:
    scores = frame.scores
    try:
        formula = reader.at(scores, layout.index(layout.scores, scores.meta["val"].shape))
    except NotAtItsIndex as error:
        raise NotUnderstood("the product of queries and keys is moved or cut before its softmax") from error
    if not formula.has(s):
        raise NotUnderstood("its scores are not made of the product of queries and keys by operators that are read")
    inside = _made_of(frame.above.node)
    for lookup in captures_in(formula):
        node = reader.captures[capture_number(lookup)]
        if node in inside:
            raise NotUnderstood(f"{node.target} stands between the product of queries and keys and its softmax")
    return formula


def _check_gradients(frame: Frame) -> None:
    """A gradient that the program stops between the product and its result would flow through the one attention."""
    between, queue = {frame.above.node, frame.below.node}, [frame.below.node]
    inside = _made_of(frame.above.node)
    while queue:
        operands = [n for n in queue.pop().all_input_nodes if n in inside and n not in between]
        between.update(operands)
        queue.extend(operands)
    floats = [n for n in between if isinstance(n.meta["val"], torch.Tensor) and n.meta["val"].is_floating_point()]
    if not any(map(requires_grad, floats)):
        return
    for node in floats:
        if not requires_grad(node) and any(_needs_gradient(operand) for operand in node.all_input_nodes):
            raise NotUnderstood(f"a gradient is stopped at {node.target} between its product and its result")


def _needs_gradient(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].is_floating_point() and requires_grad(node)


def _made_of(product: fx.Node) -> set[fx.Node]:
    """Every node that depends on a product."""
    found: set[fx.Node] = set()
    queue = list(product.users)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue.extend(node.users)
    return found


def _sinks(frame: Frame, layout: Layout, reader: Reader, canonical: Canonical) -> fx.Node | None:
    """The sinks [H], if there are any: one value a head, whatever the row."""
    if frame.sink is None:
        return None
    at = layout.index(layout.scores, frame.scores.meta["val"].shape)
    value = reader.at(frame.sink, (*at[:-1], sympy.Integer(0)))
    if is_capture(value) and value.args == (h,):
        return reader.captures[capture_number(value)]
    if not value.free_symbols <= {h} or layout.scores != ("b", "h", "q", "k"):
        raise NotUnderstood("a column is appended to its scores that is not one number a head")
    return canonical.emit(aten.select.int, canonical.emit(aten.select.int, canonical.emit(aten.select.int, frame.sink, 0, 0), 1, 0), 1, 0)


def _check_operands(query: fx.Node, key: fx.Node, value: fx.Node) -> None:
    qs, ks, vs = (x.meta["val"].shape for x in (query, key, value))
    grouped = isinstance(qs[1], int) and isinstance(ks[1], int) and qs[1] % ks[1] == 0
    if not (grouped and same_size(ks[1], vs[1]) and same_size(ks[2], vs[2])):
        raise NotUnderstood("its queries, keys and values do not share their heads")
    dtypes = {x.meta["val"].dtype for x in (query, key, value)}
    if len(dtypes) != 1:
        raise NotUnderstood(f"its queries, keys and values have dtypes {', '.join(sorted(map(str, dtypes)))}")
