"""Lower: each `attention` node calls the runtime of the strategy that was planned for it.

    attention(q, k, v, …, group="0")      →      ring.attention(q, k, v, …, group="0")

On a mesh of two dims the call also gets the names of this rank's groups along them.

Legal because every strategy computes the same function of the same local shards; only what is sent differs. Under
activation checkpointing the attention keeps its result, and so does every collective: computing it again would send again.
"""

from collections.abc import Mapping

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from autoseq.passes.attention_site import is_attention
from autoseq.runtime import collectives, rows
from autoseq.runtime.strategies import STRATEGIES

_ATTENTIONS = {strategy.attention for strategy in STRATEGIES.values()}


def lower(gm: fx.GraphModule, *, strategies: Mapping[str, str], axes: tuple[str, ...] = ()) -> int:
    """Give each site (by its unique name) the strategy planned for it; returns the number of sites."""
    sites = [node for node in gm.graph.nodes if is_attention(node)]
    for node in sites:
        node.meta["attention"]["strategy"] = strategies[node.meta["attention"]["name"]]
        node.target = STRATEGIES[strategies[node.meta["attention"]["name"]]].attention
        if axes:
            node.kwargs = {**node.kwargs, "axes": axes}
    for node in gm.graph.nodes:
        if node.target in _ATTENTIONS and "recompute" in node.meta:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    _save_what_is_sent(gm)
    return len(sites)


def _save_what_is_sent(gm: fx.GraphModule) -> None:
    """AOTAutograd saves a collective by itself unless a tag wants it recomputed; what else a runtime function computes, it may repeat."""
    runtime = str(collectives.__package__)
    for node in gm.graph.nodes:
        if not str(getattr(node.target, "__module__", "")).startswith(runtime) or node.target is rows.dropout:
            continue
        if node.meta.get("recompute") is not CheckpointPolicy.MUST_SAVE:
            node.meta.pop("recompute", None)
