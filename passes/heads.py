"""Batch, heads, rows, features: how the dims of an attention written out map to the one form [B, H, S, D].

    q [B·H, S, D]  (bmm)      →   reshape to [B, H, S, D]          dims tagged n q d
    q [S, D]                  →   unsqueeze twice                   q d
    q [B, K, r, S, D]         →   reshape to [B, K·r, S, D]         b g r q d
    einsum "bqhd,bkhd->bhqk"  →   permute                           b q h d
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, fx

from autoseq.passes.attention_site import like
from autoseq.passes.formula import Reader
from autoseq.passes.formula.values import Index, b, capture_number, divide, h, is_capture, k, q
from autoseq.passes.products import swapped
from autoseq.passes.sizes import same_size
from autoseq.passes.softmax_attention import Frame, NotUnderstood

aten = torch.ops.aten
Size = int | SymInt
Tags = tuple[str, ...]
_BATCH_TAGS: dict[int, Tags] = {0: (), 1: ("n",), 2: ("b", "h"), 3: ("b", "g", "r")}


@dataclass(frozen=True, slots=True)
class Layout:
    """The tags of each tensor's dims, and the sizes of batch and heads.

    q: rows, k: keys, d: key features, e: value features; b h: batch and heads, n: both in one, g r: heads as groups and their members.
    """

    left: Tags
    right: Tags
    product: Tags
    scores: Tags
    value: Tags
    result: Tags
    batch: Size
    heads: int

    def index(self, tags: Tags, sizes: Sequence[Size]) -> Index:
        """The index of a tensor with these dims at (b, h, q, k); r's size says how heads split into groups. In a dim of 1 it is 0."""
        zero = sympy.Integer(0)
        row, head = (zero if same_size(self.batch, 1) else b), (zero if self.heads == 1 else h)
        groups = dict(zip(tags, sizes, strict=True)).get("r")
        group, member = divide(head, int(groups), {h: self.heads}) if groups is not None else (zero, zero)
        at = {"b": row, "h": head, "q": q, "k": k, "n": row * self.heads + head, "g": group, "r": member}
        return tuple(zero if same_size(size, 1) else sympy.sympify(at[tag]) for tag, size in zip(tags, sizes, strict=True))


def layout_of(frame: Frame) -> Layout:
    """Tag the dims of everything in a frame. Raises NotUnderstood."""
    above = frame.above if frame.above.dims[-1] == "col" else swapped(frame.above)
    product = _tagged(above.dims, above.batch, {"row": "q", "col": "k"})
    scores = _with_rank(frame.scores, product)
    below = frame.below
    probabilities = _with_rank(below.left, scores)
    names = dict(zip(below.left_dims, probabilities, strict=True))
    if (names["row"], names["sum"]) != ("q", "k"):
        raise NotUnderstood("its probabilities are multiplied along the queries")
    if not set(below.dims) <= {*names, "col"}:
        raise NotUnderstood("its values have batch dims that its probabilities do not have")
    batch_names = dict(zip(above.batch, [tag for tag in product if tag not in "qk"], strict=True))
    return Layout(
        left=tuple({**batch_names, "row": "q", "sum": "d"}[name] for name in above.left_dims),
        right=tuple({**batch_names, "col": "k", "sum": "d"}[name] for name in above.right_dims),
        product=product, scores=scores,
        value=tuple({**names, "sum": "k", "col": "e"}[name] for name in below.right_dims),
        result=tuple({**names, "row": "q", "col": "e"}[name] for name in below.dims),
        **_batch_and_heads(frame, product, scores, probabilities),
    )


def _tagged(dims: Sequence[str], batch: Sequence[str], others: dict[str, str]) -> Tags:
    if len(batch) not in _BATCH_TAGS:
        raise NotUnderstood(f"its product has {len(batch)} batch dims; up to 3 are read")
    names = {**dict(zip(batch, _BATCH_TAGS[len(batch)], strict=True)), **others}
    return tuple(names[name] for name in dims)


def _with_rank(node: fx.Node, tags: Tags) -> Tags:
    """The tags of a tensor of scores: as they were, or, behind a view of the batch dims, by their number."""
    rank = node.meta["val"].dim()
    if rank == len(tags):
        return tags
    if rank - 2 not in _BATCH_TAGS:
        raise NotUnderstood(f"its scores have {rank} dimensions")
    return (*_BATCH_TAGS[rank - 2], "q", "k")


def _batch_and_heads(frame: Frame, product: Tags, scores: Tags, probabilities: Tags) -> dict[str, Any]:
    tensors = [(frame.above.node, product), (frame.scores, scores), (frame.below.left, probabilities)]
    for node, tags in tensors:
        sizes = dict(zip(tags, node.meta["val"].shape, strict=True))
        if "h" in tags or "g" in tags:
            heads = sizes["h"] if "h" in tags else sizes["g"] * sizes["r"]
            return {"batch": sizes["b"], "heads": _number(heads)}
    if "n" not in product:
        return {"batch": 1, "heads": 1}
    merged = frame.above.node.meta["val"].shape[product.index("n")]
    split = next(filter(None, (_split_of(node, merged) for node in _neighbours(frame))), (merged, 1))
    return {"batch": split[0], "heads": _number(split[1])}


def _number(heads: Size) -> int:
    if not isinstance(heads, int):
        raise NotUnderstood("its number of heads is symbolic")
    return heads


def _neighbours(frame: Frame) -> list[fx.Node]:
    """Nodes that may show how a merged dim splits into batch and heads."""
    operands = [frame.above.left, frame.above.right, frame.below.right]
    above = [x.args[0] if x.target in (aten.transpose.int, aten.permute.default) else x for x in operands]
    return [*operands, *above, *frame.below.node.users]  # type: ignore[list-item]


def _split_of(node: fx.Node, merged: Size) -> tuple[Size, Size] | None:
    """(B, H) if the node is a reshape between [B, H, ...] and [B·H, ...]."""
    if node.target is not aten.reshape.default:
        return None
    shapes = sorted((node.meta["val"].shape, node.args[0].meta["val"].shape), key=len)  # type: ignore[union-attr]
    small, large = shapes
    joined = len(small) == 3 and len(large) == 4 and same_size(small[0], merged) and same_size(large[0] * large[1], merged)
    same = joined and same_size(small[1], large[2])
    return (large[0], large[1]) if same else None


class Canonical:
    """Brings operands to [B, H, rows, features] and the result back, with views inserted before `anchor`."""

    def __init__(self, anchor: fx.Node, batch: Size, heads: int) -> None:
        self.anchor, self.batch, self.heads = anchor, batch, heads

    def operand(self, x: fx.Node, tags: Tags, product: Tags, rows: str) -> fx.Node:
        """`x` as [B, H or fewer, rows, features]; batch dims that only the product has are broadcast."""
        features = next(tag for tag in ("d", "e") if tag in tags)
        batch = tuple(tag for tag in ("b", "n", "h", "g", "r") if tag in product)
        order = [tags.index(tag) for tag in (*batch, rows, features) if tag in tags]
        if order != sorted(order):
            x = self.emit(aten.permute.default, x, order)
        for position, tag in enumerate(batch):
            if tag not in tags:
                x = self.emit(aten.unsqueeze.default, x, position)
        if "n" in batch:
            x = self._split_batch(x)
        if "r" in batch:
            if "g" not in tags:
                raise NotUnderstood("its key heads are tiled, not repeated one by one")
            x = self._merge_groups(x)
        for _ in range(4 - x.meta["val"].dim()):
            x = self.emit(aten.unsqueeze.default, x, 0)
        shape = x.meta["val"].shape
        return x if same_size(shape[0], self.batch) else self.emit(aten.expand.default, x, [self.batch, *shape[1:]])

    def result(self, out: fx.Node, tags: Tags) -> fx.Node:
        """[B, H, q, e] as a tensor whose dims have these tags."""
        batch = tuple(tag for tag in ("b", "n", "h", "g", "r") if tag in tags)
        shape = dict(zip(tags, self.anchor.meta["val"].shape, strict=True))
        if batch != ("b", "h"):
            out = self.emit(aten.reshape.default, out, [shape[tag] for tag in (*batch, "q", "e")])
        made = (*batch, "q", "e")
        order = [made.index(tag) for tag in tags]
        return out if order == sorted(order) else self.emit(aten.permute.default, out, order)

    def _split_batch(self, x: fx.Node) -> fx.Node:
        shape = x.meta["val"].shape
        source: Any = x.args[0] if x.target is aten.reshape.default else None
        target = (self.batch, self.heads, *shape[1:])
        if source is not None and len(source.meta["val"].shape) == 4 and all(
            same_size(old, new) for old, new in zip(source.meta["val"].shape, target, strict=True)
        ):
            return source
        return self.emit(aten.reshape.default, x, list(target))

    def _merge_groups(self, x: fx.Node) -> fx.Node:
        """[B, K, r, rows, d] to [B, K·r, rows, d]; keys that are broadcast over r stay K heads."""
        B, groups, members, *rest = x.meta["val"].shape
        if same_size(members, 1):
            return self.emit(aten.squeeze.dim, x, 2)
        return self.emit(aten.reshape.default, x, [B, groups * members, *rest])

    def emit(self, target: Any, x: fx.Node, *args: Any) -> fx.Node:
        """Add a view of `x` to the graph."""
        with self.anchor.graph.inserting_before(self.anchor):
            made = self.anchor.graph.call_function(target, (x, *(_arguments(a) for a in args)))
        return like(made, self.anchor, target(x.meta["val"], *args))


def _arguments(value: Any) -> Any:
    """Sizes as arguments of a node: a symbolic one is inferred (at most one is)."""
    if not isinstance(value, (list, tuple)):
        return value
    if sum(isinstance(item, SymInt) for item in value) > 1:
        raise NotUnderstood("more than one of its lengths is symbolic")
    return [-1 if isinstance(item, SymInt) else item for item in value]


def unrepeated(k: fx.Node, v: fx.Node, heads: Size) -> tuple[fx.Node, fx.Node]:
    """Keys and values before their heads were repeated to `heads`, if both were alike; else as they are."""
    if not isinstance(heads, int):
        return k, v
    bare_k, bare_v = _unrepeated(k, heads), _unrepeated(v, heads)
    return (bare_k, bare_v) if same_size(bare_k.meta["val"].shape[1], bare_v.meta["val"].shape[1]) else (k, v)


def _unrepeated(x: fx.Node, heads: int) -> fx.Node:
    """The tensor [B, K, S, D] whose heads were repeated to make `x` [B, H, S, D], however that is spelled; else `x` itself.

    The value of `x` at (b, h, s, d), followed through views and gathers by index alone, is a lookup at head `h // r`.
    """
    d = sympy.Symbol("d", integer=True, nonnegative=True)
    reader = Reader(only_movement=True, limits={h: heads})
    value = reader.at(x, (b, h, k, d))
    if not is_capture(value):
        return x
    source = reader.captures[capture_number(value)]
    places = _places(value.args, source.meta["val"].shape, heads, d)
    if places is None:
        return x
    views = Canonical(x, 0, 0)
    for i in sorted(set(range(len(value.args))) - set(places), reverse=True):
        source = views.emit(aten.squeeze.dim, source, i)
    order = [sorted(places).index(place) for place in places]
    bare = source if order == [0, 1, 2, 3] else views.emit(aten.permute.default, source, order)
    (B, _, *rest), (wide_B, _, *wide) = bare.meta["val"].shape, x.meta["val"].shape
    return bare if all(same_size(old, new) for old, new in zip((B, *rest), (wide_B, *wide), strict=True)) else x


def _places(index: Index, shape: Sequence[Size], heads: int, d: sympy.Symbol) -> list[int] | None:
    """Which dims of a tensor that is read at `index` are batch, KV head, row and feature, if its heads were repeated; else None."""
    ones = [i for i, (at, size) in enumerate(zip(index, shape, strict=True)) if at == 0 and same_size(size, 1)]
    found: dict[Any, int] = {}
    for i, at in enumerate(index):
        grouped = h in at.free_symbols
        kv_heads = shape[i] if grouped else 1
        if grouped and not (isinstance(kv_heads, int) and heads % kv_heads == 0 and at == sympy.floor(h / (heads // kv_heads))):
            return None
        found |= {h: i} if grouped else {} if i in ones else {at: i}
    missing = [symbol for symbol in (b, h, k, d) if symbol not in found]
    # A dim of size 1, or the one KV head of all, is read at 0.
    known = set(found) <= {b, h, k, d} and len(found) + len(ones) == len(index) and len(missing) <= len(ones)
    if not known or (h in found and shape[found[h]] == heads):
        return None
    found |= dict(zip(missing, ones, strict=False))
    return [found[symbol] for symbol in (b, h, k, d)]
