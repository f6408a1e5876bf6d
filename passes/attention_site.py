"""The one `attention` node that every form of attention becomes, and the words that reports use for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autoseq.passes.source import module_path, source_line
from autoseq.runtime import local

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class LeftWhole:
    """An attention that stays as it is, to be run on gathered tensors, and why."""

    source: str
    reason: str


LEFT_WHOLE = "left_whole"
"""On an attention that runs on gathered tensors: why."""


def is_attention(node: fx.Node) -> bool:
    """Whether a node is an attention that is to be split."""
    return node.op == "call_function" and node.target is local.attention and LEFT_WHOLE not in node.meta


def add_site(
    anchor: fx.Node,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    *,
    captures: Sequence[fx.Node] = (),
    sinks: fx.Node | None = None,
    scale: Any,
    score: str = "",
    predicate: str = "",
    max_ahead: int | None = None,
    empty_rows: str = "zero",
    dropout_p: Any = 0.0,
) -> fx.Node:
    """An `attention` of q [B,H,S,D] to k [B,K,T,D], v [B,K,T,Dv] before `anchor`, from which it takes its source line."""
    graph = anchor.graph
    with graph.inserting_before(anchor):
        seed = _seed(anchor, q.meta["val"].device) if dropout_p else None
        site = graph.call_function(
            local.attention, (q, k, v, list(captures), sinks, seed),
            {"scale": scale, "score": score, "predicate": predicate, "max_ahead": max_ahead, "max_behind": None, "empty_rows": empty_rows,
             "dropout_p": dropout_p, "q_len": _length(graph, q), "k_len": _length(graph, k), "layout": "contiguous", "group": ""},
        )  # fmt: skip
    shape = (*q.meta["val"].shape[:3], v.meta["val"].shape[3])
    like(site, anchor, q.meta["val"].new_empty(shape))
    site.meta["attention"] = {"name": module_path(anchor), "source": source_line(anchor)}
    return site


def like(new: fx.Node, old: fx.Node, val: torch.Tensor | None) -> fx.Node:
    """Give `new` the metadata (source line, modules, recompute tag) of `old` and its own value."""
    new.meta.update({key: value for key, value in old.meta.items() if key != "tensor_meta"})
    new.meta["val"] = val
    return new


def _seed(anchor: fx.Node, device: torch.device) -> fx.Node:
    """One draw from the global generator: the mask is a hash of it, alike at any number of ranks."""
    drawn = anchor.graph.call_function(aten.randint.low, (0, 2**31 - 1, []), {"dtype": torch.int64, "device": device})
    return like(drawn, anchor, torch.empty((), dtype=torch.int64, device="meta"))


def _length(graph: fx.Graph, x: fx.Node) -> int | fx.Node:
    size = x.meta["val"].shape[2]
    if isinstance(size, int):
        return size
    node = graph.call_function(aten.sym_size.int, (x, 2))
    node.meta["val"] = size
    return node
