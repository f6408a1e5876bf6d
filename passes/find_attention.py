"""Find attention: every `scaled_dot_product_attention` becomes the one `attention` operator, heads un-repeated.

    k2 = reshape(expand(unsqueeze(k, 2), [B, K, r, S, D]), [B, H, S, D])
    y = sdpa(q, k2, v2, mask)                   →    y = attention(q, k, v, [mask], predicate="Ne(c0(b, 0, q, k), 0)")

Legal because `attention` computes grouped heads itself, so the repeat is dropped and not sent r times, and because a
dense boolean mask is the predicate that looks its value up. `read_masks` then replaces the lookup by a formula.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoseq.passes.sizes import same_size
from autoseq.passes.source import module_path, source_line
from autoseq.runtime import local

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True, slots=True)
class LeftWhole:
    """An attention call that stays as it is, to be run on gathered tensors, and why."""

    source: str
    reason: str


def is_attention(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is local.attention


def find_attention(gm: fx.GraphModule) -> tuple[int, list[LeftWhole]]:
    """Rewrite each attention call that the runtime can serve; returns their number and the calls left whole."""
    found, left = 0, []
    for node in gm.graph.find_nodes(op="call_function", target=SDPA):
        call = _Call.of(node)
        reason = call.unserved()
        if reason:
            node.meta["left_whole"] = reason
            left.append(LeftWhole(source_line(node), reason))
            continue
        _rewrite(gm, node, call)
        found += 1
    return found, left


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
        if not self._aligned():
            return "query, key and value are broadcast against each other"
        if isinstance(self.dropout_p, fx.Node) or self.dropout_p > 0:
            return "attention dropout is drawn over the whole score matrix"
        if self.mask is not None and self.mask.meta["val"].dtype != torch.bool and requires_grad(self.mask):
            return "the additive attention bias needs a gradient"
        if self.mask is not None and self.is_causal:
            return "both attn_mask and is_causal are given"
        return None


    def _aligned(self) -> bool:
        """Equal batches, one value row a key row, and heads that pair up or, with `enable_gqa`, in groups."""
        q, k, v = (_shape(x) for x in (self.q, self.k, self.v))
        pairs = [(q[0], k[0]), (k[0], v[0]), (k[-2], v[-2]), (q[-1], k[-1])]
        if len(q) == 4:
            pairs += [(k[1], v[1]), (q[1] % k[1], 0) if self.grouped else (q[1], k[1])]
        return all(same_size(a, b) for a, b in pairs)


def _shape(node: fx.Node) -> torch.Size:
    return node.meta["val"].shape


def requires_grad(node: fx.Node) -> bool:
    meta = node.meta.get("tensor_meta")
    return bool(meta is not None and meta.requires_grad) or bool(node.meta["val"].requires_grad)


def _rewrite(gm: fx.GraphModule, node: fx.Node, call: _Call) -> None:
    q, k, v = call.q, call.k, call.v
    graph = gm.graph
    with graph.inserting_before(node):
        flat = len(_shape(q)) == 3
        if flat:  # [B, S, D] is one head
            q, k, v = (_like(graph.call_function(aten.unsqueeze.default, (x, 1)), node, x.meta["val"].unsqueeze(1)) for x in (q, k, v))
        else:
            k, v = _unrepeat(k, v, heads=_shape(q)[1])
        lengths = (_length(graph, q), _length(graph, k))
        captures, score, predicate = _mask_arguments(call.mask, flat)
        scale = call.scale if call.scale is not None else float(_shape(q)[-1]) ** -0.5
        site = graph.call_function(
            local.attention, (q, k, v, captures, None, None),
            {"scale": scale, "score": score, "predicate": predicate, "max_ahead": 0 if call.is_causal else None, "max_behind": None,
             "empty_rows": "zero", "dropout_p": 0.0, "q_len": lengths[0], "k_len": lengths[1], "layout": "contiguous", "group": ""},
        )
        out = node.meta["val"].unsqueeze(1) if flat else node.meta["val"]
        _like(site, node, out)
        site.meta["attention"] = {"name": module_path(node), "source": source_line(node)}
        result = _like(graph.call_function(aten.squeeze.dim, (site, 1)), node, node.meta["val"]) if flat else site
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _like(new: fx.Node, old: fx.Node, val: torch.Tensor | None) -> fx.Node:
    """Give `new` the metadata (source line, modules, recompute tag) of `old` and its own value."""
    new.meta.update({key: value for key, value in old.meta.items() if key != "tensor_meta"})
    new.meta["val"] = val
    return new


def _length(graph: fx.Graph, x: fx.Node) -> int | fx.Node:
    size = _shape(x)[2]
    if isinstance(size, int):
        return size
    node = graph.call_function(aten.sym_size.int, (x, 2))
    node.meta["val"] = size
    return node


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


def _unrepeat(k: fx.Node, v: fx.Node, heads: int | torch.SymInt) -> tuple[fx.Node, fx.Node]:
    bare_k, bare_v = _before_repeat(k, heads), _before_repeat(v, heads)
    if bare_k is None or bare_v is None or not same_size(_shape(bare_k)[1], _shape(bare_v)[1]):
        return k, v
    return bare_k, bare_v


_COPIES = (aten.clone.default, aten.contiguous.default)


def _before_repeat(x: fx.Node, heads: int | torch.SymInt) -> fx.Node | None:
    """The tensor whose KV heads were repeated to make `x` [B, H, S, D], or None if `x` is not such a repeat."""
    if x.target is aten.repeat_interleave.self_int and len(x.args) > 2 and x.args[2] == 1:
        return x.args[0]  # type: ignore[return-value]
    if x.target is not aten.reshape.default or len(_shape(x)) != 4:
        return None
    wide = x.args[0]  # pyright: ignore[reportGeneralTypeIssues]
    while isinstance(wide, fx.Node) and wide.target in _COPIES:
        wide = wide.args[0]
    if not (isinstance(wide, fx.Node) and wide.target is aten.expand.default and len(_shape(wide)) == 5):
        return None
    narrow = wide.args[0]
    if not (isinstance(narrow, fx.Node) and narrow.target is aten.unsqueeze.default and narrow.args[1] == 2):
        return None
    bare = narrow.args[0]
    assert isinstance(bare, fx.Node)
    (B, K, S, D), expanded = _shape(bare), _shape(wide)
    same = [same_size(a, b) for a, b in zip((B, K, S, D), (expanded[0], expanded[1], expanded[3], expanded[4]), strict=True)]
    joined = [same_size(a, b) for a, b in zip(_shape(x), (B, expanded[1] * expanded[2], S, D), strict=True)]
    return bare if all(same) and all(joined) and same_size(_shape(x)[1], heads) else None
