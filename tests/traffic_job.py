"""What a rank does where traffic is counted: attend, and tell what was sent. And the cases in which that is compared with costs."""

from __future__ import annotations

from dataclasses import replace

import torch

from attention_job import Run, axes_of, call_keywords, shard
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Cost
from dense_attention import Case

FULL = {
    "even": Case(16, 16, batch=2),
    "float32": Case(16, 16, heads=8, kv_heads=4, dtype=torch.float32),
    "bfloat16: gradients of keys travel in float32": Case(16, 16, heads=8, kv_heads=4, dtype=torch.bfloat16),
    "more ranks than KV heads": Case(16, 16, heads=8, kv_heads=1, dtype=torch.float32),
    "uneven heads": Case(16, 16, heads=9, kv_heads=3),
    "some ranks without heads": Case(16, 16, heads=2, kv_heads=1),
}
FULL = {name: replace(case, mask="none") for name, case in FULL.items()}
CASES = FULL | {
    "padded rows": Case(13, 13, batch=2, kv_heads=2, mask="none"),
    "cross attention, other value dim": Case(7, 21, value_dim=5, mask="none"),
    "few queries": Case(8, 64, kv_heads=2, mask="none", dtype=torch.bfloat16),
    "causal": Case(16, 16, kv_heads=2, dtype=torch.bfloat16),
    "causal, padded": Case(13, 13),
    "a window": Case(32, 32, mask="window"),
    "a window on both sides, other lengths": Case(24, 19, mask="window on both sides"),
    "chunks that no tensor decides": Case(24, 24, mask="chunks"),
    "rows without keys that are worth a mean of all": Case(16, 16, mask="only the future", empty_rows="uniform"),
}


def count_on_rank(rank: int, P: int, runs: list[Run], mesh: tuple[int, ...] = ()) -> list[Cost]:
    """Counted traffic of attentions: forward, then backward."""
    axes = axes_of(mesh)
    return [_counted(rank, P, *run, axes) for run in runs]


def _counted(rank: int, P: int, strategy: str, layout: Layout, case: Case, axes: tuple[str, ...]) -> Cost:
    from autoseq.runtime.counting import counters, reset_counters

    *qkv, grad = (shard(x, rank, P, layout, padding="edge") for x in case.tensors())
    leaves = [x.requires_grad_() for x in qkv]
    keywords = call_keywords(case, layout) | dict(axes=axes)
    reset_counters()
    out = STRATEGIES[strategy].attention(*leaves, case.captures(), **keywords)
    forward = list(counters().values())
    reset_counters()
    torch.autograd.grad(out, leaves, grad)
    backward = list(counters().values())
    totals = [sum(part) for counts in (forward, backward) for part in zip(*(counts or [(0, 0)]), strict=True)]
    return Cost(forward_messages=totals[0], forward_bytes=totals[1], backward_messages=totals[2], backward_bytes=totals[3])
