"""What a rank does where a strategy's call is compiled once and serves several lengths. It is held to one device's numbers."""

from __future__ import annotations

from typing import Any

import torch

from attention_job import assemble, call_keywords, shard
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from dense_attention import Case, check_close, dense_attention
from ranks import run_ranks

TOLERANCE = 1e-10  # float64; only the order of summation differs


def dynamic_lengths(rank: int, P: int, strategy: str, layout: Layout, cases: list[Case]) -> list[tuple[torch.Tensor, ...]]:
    """The call as the compiler emits it: one opaque node in Dynamo's graph, traced in both directions by AOTAutograd."""
    from torch._dynamo.testing import CompileCounterWithBackend

    attention: Any = torch.compiler.allow_in_graph(STRATEGIES[strategy].attention)
    counter = CompileCounterWithBackend("aot_eager")
    keywords = call_keywords(cases[0], layout)

    @torch.compile(backend=counter, fullgraph=True)
    def step(qkv: list[torch.Tensor], looked_up: list[torch.Tensor], sinks: Any, seed: Any, full: torch.Tensor) -> torch.Tensor:
        lengths = dict(q_len=full.shape[0], k_len=full.shape[0])
        varied = [x * 1.0 if x.is_floating_point() else x for x in looked_up]
        return attention(*(x * 1.0 for x in qkv), varied, sinks * 1.0, seed, **(keywords | lengths)) * 1.0

    results = []
    for case in cases:
        *qkv, grad = case.tensors()
        leaves = [shard(x, rank, P, layout, padding="edge").requires_grad_() for x in qkv]
        grad = shard(grad, rank, P, layout, padding="nan").nan_to_num(0)
        looked_up, sinks, full = case.captures(), case.sinks(), torch.empty(case.q_len)
        for x in (full, *leaves, *(c for c in looked_up if case.q_len in c.shape)):
            torch._dynamo.mark_dynamic(x, {1: 0, 2: 1, 4: 2}[x.ndim])
        out = step(leaves, looked_up, sinks, case.dropout_seed(), full)
        leaves += [x for x in (*looked_up, sinks) if x is not None and x.requires_grad]
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    assert counter.frame_count == 1, "a new length must not compile again"
    return results


def check_dynamic_lengths(strategy: str, layout: Layout, P: int, cases: list[Case]) -> None:
    """One compilation gives one device's numbers for every case."""
    per_rank = run_ranks(dynamic_lengths, P, strategy, layout, cases)
    for i, case in enumerate(cases):
        parts = list(zip(*(r[i] for r in per_rank), strict=True))
        results = *(assemble(list(shards), case.q_len, layout) for shards in parts[:4]), *(torch.stack(x).sum(0) for x in parts[4:])
        check_close(results, dense_attention(case), TOLERANCE)
