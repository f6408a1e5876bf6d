"""The strategies' calls, as the compiler emits them, go through AOTAutograd and Inductor in both directions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attention_job import assemble, call_keywords, captures, shard
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
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, looked_up: list[torch.Tensor], full: torch.Tensor) -> torch.Tensor:
        lengths = dict(q_len=full.shape[0], k_len=full.shape[0])
        return attention(q * 1.0, k * 1.0, v * 1.0, looked_up, **(keywords | lengths)) * 1.0

    results = []
    for case in cases:
        *qkv, grad = case.tensors()
        leaves = [shard(x, rank, P, layout, padding="edge").requires_grad_() for x in qkv]
        grad = shard(grad, rank, P, layout, padding="nan").nan_to_num(0)
        looked_up, full = captures(case), torch.empty(case.q_len)
        for x in (full, *looked_up, *leaves):
            torch._dynamo.mark_dynamic(x, {1: 0, 2: 1, 4: 2}[x.ndim])
        out = step(leaves[0], leaves[1], leaves[2], looked_up, full)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    assert counter.frame_count == 1, "a new length must not compile again"
    return results


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("strategy", "P"), [("local", 1), ("ulysses", 2), ("ring", 2), ("gather_kv", 2)])
def test_traced_with_symbolic_lengths(strategy: str, P: int, layout: Layout) -> None:
    """One compilation serves lengths with and without padding."""
    first = Case(22, 22, mask="segments", batch=2, heads=6, kv_heads=2, value_dim=5)
    cases = [first, replace(first, q_len=33, k_len=33), replace(first, q_len=24, k_len=24)]
    per_rank = run_ranks(dynamic_lengths, P, strategy, layout, cases)
    for i, case in enumerate(cases):
        results = tuple(assemble(list(shards), case.q_len, layout) for shards in zip(*(r[i] for r in per_rank), strict=True))
        check_close(results, dense_attention(case), TOLERANCE)


@pytest.mark.slow
def test_through_inductor() -> None:
    """Every strategy's node survives Inductor, forward and backward."""
    case = Case(13, 13, mask="segments", heads=4, kv_heads=2)
    nodes: list[Any] = [torch.compiler.allow_in_graph(strategy.attention) for strategy in STRATEGIES.values()]
    keywords = call_keywords(case, "contiguous") | dict(group="")
    looked_up = captures(case)

    @torch.compile(fullgraph=True)
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outs = [node(q, k, v, looked_up, **keywords) for node in nodes]
        return torch.stack(outs).mean(0)

    *qkv, grad = case.tensors()
    leaves = [x.requires_grad_() for x in qkv]
    out = step(*leaves)
    check_close((out.detach(), *torch.autograd.grad(out, leaves, grad)), dense_attention(case), TOLERANCE)
