"""The strategies' calls, as the compiler emits them, go through AOTAutograd and Inductor in both directions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attention_job import call_keywords
from autoseq.runtime.layout import Layout
from autoseq.runtime.local import whole_attention
from autoseq.runtime.strategies import STRATEGIES
from dense_attention import Case, check_close, dense_attention
from tracing_job import TOLERANCE, check_dynamic_lengths


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
