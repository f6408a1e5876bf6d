"""The strategies' calls, as the compiler emits them, go through AOTAutograd and Inductor in both directions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attention_job import assemble, call_keywords, shard
from autoseq.runtime.layout import Layout
from autoseq.runtime.local import whole_attention
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


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("strategy", "P"), [("local", 1), ("ulysses", 2), ("ring", 2), ("gather_kv", 2)])
def test_traced_with_symbolic_lengths(strategy: str, P: int, layout: Layout) -> None:
    """One compilation serves lengths with and without padding."""
    terms = dict(score="ALiBi with slopes that learn", has_sinks=True, dropout_p=0.2)
    first = Case(22, 22, mask="segments", batch=2, heads=6, kv_heads=2, value_dim=5, **terms)
    cases = [first, replace(first, q_len=33, k_len=33), replace(first, q_len=24, k_len=24)]
    check_dynamic_lengths(strategy, layout, P, cases)


@pytest.mark.slow
def test_through_inductor() -> None:
    """Every strategy's node survives Inductor, forward and backward."""
    terms = dict(score="two captures that learn", has_sinks=True, dropout_p=0.2, empty_rows="uniform")
    case = Case(13, 13, mask="key padding", heads=4, kv_heads=2, **terms)
    nodes: list[Any] = [torch.compiler.allow_in_graph(strategy.attention) for strategy in STRATEGIES.values()]
    keywords = call_keywords(case, "contiguous") | dict(group="")
    looked_up, sinks, seed = case.captures(), case.sinks(), case.dropout_seed()

    @torch.compile(fullgraph=True)
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outs = [node(q, k, v, looked_up, sinks, seed, **keywords) for node in nodes]
        return torch.stack(outs).mean(0)

    *qkv, grad = case.tensors()
    leaves = [x.requires_grad_() for x in qkv]
    out = step(*leaves)
    leaves += [x for x in (*looked_up, sinks) if x is not None and x.requires_grad]
    check_close((out.detach(), *torch.autograd.grad(out, leaves, grad)), dense_attention(case), TOLERANCE)


def test_the_op_is_what_it_says() -> None:
    """torch's own checks: schema, fakes and autograd agree with what the op does, with symbolic shapes too."""
    terms = dict(score="two captures that learn", has_sinks=True, dropout_p=0.2, empty_rows="uniform", dtype=torch.float32)
    case = Case(9, 9, mask="segments", batch=2, heads=4, kv_heads=2, **terms)
    q, k, v = (x.requires_grad_() for x in case.tensors()[:3])
    tensors = (q, k, v, case.captures(), case.sinks(), case.dropout_seed())
    torch.library.opcheck(whole_attention.forward, (*tensors, *case.settings().values(), 0, 2, "contiguous", [], False, []))
