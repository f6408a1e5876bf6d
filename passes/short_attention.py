"""Leave short attention whole: where fewer rows than ranks are to be shared, every rank computes all of it.

    attention(q [B, H, 1, D], k [B, K, T, D], v)      →      the same node, which is no site any more: a pooling head's one query

Legal because `attention` without a group is one device's attention. `shard` gathers its operands as for any operator without a rule,
and shards what follows as before. A symbolic length is guarded: a program made for lengths that can be shared serves no shorter one.
"""

from dataclasses import dataclass

from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from autoseq.passes.attention_site import LEFT_WHOLE, is_attention
from autoseq.passes.sizes import hint


@dataclass(frozen=True, slots=True)
class ShortAttention:
    """An attention that is left whole: its module path, the model's line, and its length in words."""

    name: str
    source: str
    reason: str


def leave_short_whole(gm: fx.GraphModule, *, group_size: int) -> list[ShortAttention]:
    """Make each attention with fewer queries or keys than ranks an operator that runs whole; returns them."""
    left = []
    for node in [node for node in gm.graph.nodes if is_attention(node)]:
        q_len, k_len = (x.meta["val"].shape[2] for x in node.args[:2])  # type: ignore[union-attr]
        if guard_or_false(q_len < group_size) or guard_or_false(k_len < group_size):
            words = node.meta.pop("attention")
            node.meta[LEFT_WHOLE] = f"it has only {_shorter(hint(q_len), hint(k_len))} for {group_size} ranks"
            left.append(ShortAttention(words["name"], words["source"], node.meta[LEFT_WHOLE]))
    return left


def _shorter(queries: int, keys: int) -> str:
    count, what = (queries, "query") if queries <= keys else (keys, "key")
    return f"{count} {what}" if count == 1 else f"{count} {'queries' if what == 'query' else 'keys'}"
