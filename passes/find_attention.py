"""Find attention: every form of it becomes the one `attention` operator, heads un-repeated.

    y = sdpa(q, repeat(k), repeat(v), mask)            →    y = attention(q, k, v, [mask], predicate="Ne(c0(b, 0, q, k), 0)")
    y = softmax(q @ k.T * 0.125 + mask) @ v             →    y = attention(q, k, v, [], score="f_add(f_mul(s, const(1, 8)), …)")

Legal because `attention` computes grouped heads itself, so the repeat is dropped and not sent r times; because a dense boolean
mask is the predicate that looks its value up; and because what stands between a product and its softmax is read as a formula over
the product. `read_masks` then finds the structure in both.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from autoseq.passes.attention_site import LEFT_WHOLE, LeftWhole, add_site, is_attention, like
from autoseq.passes.check_rewrites import check_rewrite
from autoseq.passes.heads import unrepeated
from autoseq.passes.products import open_baddbmm
from autoseq.passes.read_scores import read_written_out
from autoseq.passes.sizes import same_size
from autoseq.passes.softmax_attention import SOFTMAXES, NotUnderstood, match
from autoseq.passes.source import source_line

__all__ = ["find_attention", "is_attention"]

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def find_attention(gm: fx.GraphModule) -> tuple[int, list[LeftWhole]]:
    """Rewrite each attention that the runtime can serve; returns their number and those left whole."""
    found, left = 0, []
    for node in gm.graph.find_nodes(op="call_function", target=SDPA):
        call = _Call.of(node)
        reason = call.unserved()
        if reason:
            node.meta[LEFT_WHOLE] = reason
            left.append(LeftWhole(source_line(node), reason))
            continue
        _rewrite(node, call)
        found += 1
    open_baddbmm(gm)
    for node in list(_softmaxes(gm)):
        try:
            found += _rewrite_written_out(node)
        except NotUnderstood as reason:
            left.append(LeftWhole(source_line(node), str(reason)))
    return found, left


def _softmaxes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for node in gm.graph.nodes if node.target in SOFTMAXES)


def _rewrite_written_out(softmax: fx.Node) -> bool:
    """Replace an attention written out; whether it was one."""
    frame = match(softmax)
    if frame is None:
        return False
    old = frame.below.node
    nodes = set(old.graph.nodes)
    new = read_written_out(frame)
    check_rewrite(frame, new, nodes, read_written_out)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    return True


@dataclass(frozen=True, slots=True)
class _Call:
    """One SDPA call's arguments by name."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    dropout_p: Any
    is_causal: bool
    scale: Any
    grouped: bool

    @staticmethod
    def of(node: fx.Node) -> "_Call":
        names = [a.name for a in SDPA._schema.arguments]
        bound = {a.name: a.default_value for a in SDPA._schema.arguments}
        bound.update(zip(names, node.args, strict=False))
        bound.update(node.kwargs)
        fields = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        return _Call(*(bound[name] for name in fields))

    def unserved(self) -> str | None:
        """Why this call cannot become `attention`, or None."""
        ranks = {len(_shape(x)) for x in (self.q, self.k, self.v)}
        if ranks not in ({3}, {4}):
            return f"query, key and value have {sorted(ranks)} dimensions; 3 or 4 are read"
        if self.grouped and not same_size(_shape(self.k)[1], _shape(self.v)[1]):
            return "key and value have different numbers of heads"
        if isinstance(self.dropout_p, fx.Node):
            return "attention dropout has a probability that is computed"
        if self.mask is not None and self.is_causal:
            return "both attn_mask and is_causal are given"
        return None

    def broadcast(self, anchor: fx.Node) -> "_Call":
        """The same call with equal batches, and as many heads for queries as for keys unless these are groups, as one head always is."""
        batch = _sizes_of(anchor, 0, self.q, self.k, self.v)
        if len(_shape(self.q)) == 3:  # [B, S, D] is one head
            return replace(self, **{name: _expanded(anchor, getattr(self, name), [batch]) for name in "qkv"})
        keys = _sizes_of(anchor, 1, self.k, self.v)
        heads = _sizes_of(anchor, 1, self.q) if self.grouped else _sizes_of(anchor, 1, self.q, self.k, self.v)
        kv_heads = keys if self.grouped or same_size(keys[0], 1) else heads
        given = {"q": heads, "k": kv_heads, "v": kv_heads}
        return replace(self, **{name: _expanded(anchor, getattr(self, name), [batch, sizes]) for name, sizes in given.items()})


_SizeOf = tuple[Any, Any]
"""A size, and the argument of a node that stands for it."""


def _sizes_of(anchor: fx.Node, dim: int, *operands: fx.Node) -> _SizeOf:
    """The size that a dim of some operands is broadcast to."""
    widest = next((x for x in operands if not same_size(_shape(x)[dim], 1)), operands[0])
    size = _shape(widest)[dim]
    if isinstance(size, int):
        return size, size
    read = anchor.graph.call_function(aten.sym_size.int, (widest, dim))
    read.meta["val"] = size
    return size, read


def _expanded(anchor: fx.Node, x: fx.Node, leading: list[_SizeOf]) -> fx.Node:
    """An operand with these leading dims."""
    shape = _shape(x)
    wanted = [size for size, _ in leading]
    if all(same_size(size, have) for size, have in zip(wanted, shape, strict=False)):
        return x
    sizes = [*(argument for _, argument in leading), *[-1] * (len(shape) - len(leading))]
    made = anchor.graph.call_function(aten.expand.default, (x, sizes))
    return like(made, anchor, x.meta["val"].expand(*wanted, *shape[len(leading):]))


def _shape(node: fx.Node) -> torch.Size:
    return node.meta["val"].shape


def _rewrite(node: fx.Node, call: _Call) -> None:
    graph = node.graph
    flat = len(_shape(call.q)) == 3
    with graph.inserting_before(node):
        call = call.broadcast(node)
        q, k, v = call.q, call.k, call.v
        if flat:  # [B, S, D] is one head
            q, k, v = (like(graph.call_function(aten.unsqueeze.default, (x, 1)), node, x.meta["val"].unsqueeze(1)) for x in (q, k, v))
        else:
            k, v = unrepeated(k, v, _shape(q)[1])
        captures, score, predicate = _mask_arguments(call.mask, flat)
        site = add_site(
            node, q, k, v, captures=captures, score=score, predicate=predicate, max_ahead=0 if call.is_causal else None,
            scale=call.scale if call.scale is not None else float(_shape(q)[-1]) ** -0.5, dropout_p=call.dropout_p,
        )  # fmt: skip
        result = like(graph.call_function(aten.squeeze.dim, (site, 1)), node, node.meta["val"]) if flat else site
    if not flat:
        site.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _mask_arguments(mask: fx.Node | None, flat: bool) -> tuple[list[fx.Node], str, str]:
    """Captures, score and predicate of a mask: a boolean one allows keys, any other is added to the score."""
    if mask is None:
        return [], "", ""
    lookup = f"c0({', '.join(mask_index(mask, flat))})"
    return ([mask], "", f"Ne({lookup}, 0)") if mask.meta["val"].dtype == torch.bool else ([mask], f"f_add(s, {lookup})", "")


def mask_index(mask: fx.Node, flat: bool = False) -> list[str]:
    """The index a dense mask is read at: its trailing dims are (b, h, q, k), or (b, q, k) beside flat heads; size 1 broadcasts."""
    names = ["b", "q", "k"] if flat else ["b", "h", "q", "k"]
    shape = _shape(mask)
    return ["0" if same_size(size, 1) else name for name, size in zip(names[len(names) - len(shape):], shape, strict=True)]
