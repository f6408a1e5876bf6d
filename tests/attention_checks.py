"""What strategies compute on ranks is held to one device's attention, for shapes and terms that every strategy is tried with."""

from __future__ import annotations

import functools

import torch

from attention_job import Run, assemble, attend_all_on_rank, padding_rows
from autoseq.runtime.layout import Layout
from dense_attention import Case, check_close, dense_attention
from ranks import run_ranks

# float64 differs from the oracle only in the order of summation; float32 by its rounding, 6e-8 for each of a few dozen sums.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

SHAPES = {
    "multi-head attention": Case(16, 16, batch=2),
    "grouped heads": Case(16, 16, heads=8, kv_heads=4),
    "multi-query: more ranks than KV heads": Case(16, 16, heads=8, kv_heads=1),
    "value dim larger than key dim": Case(16, 16, head_dim=6, value_dim=10),
    "value dim smaller than key dim": Case(16, 16, kv_heads=2, head_dim=10, value_dim=6),
    "heads not divisible by P": Case(16, 16, heads=5, kv_heads=5),
    "a KV head's group shared by two ranks": Case(16, 16, heads=9, kv_heads=3),
    "grouped heads and no even split": Case(16, 16, batch=2, heads=6, kv_heads=2),
    "more ranks than heads: a rank has none": Case(16, 16, heads=1, kv_heads=1),
    "length not divisible by P": Case(13, 13, batch=2),
    "length not divisible by 2P": Case(18, 18),
    "a rank without valid rows": Case(5, 5),
    "a single token": Case(1, 1),
    "ranks of padding beside rows that may be nan": Case(5, 5, empty_rows="nan_fill", score="ALiBi with slopes that learn"),
    "ranks of padding, a predicate, rows that may be nan": Case(3, 3, mask="segments", empty_rows="nan"),
    "fewer queries than keys": Case(7, 21),
    "more queries than keys": Case(21, 7, kv_heads=2),
    "few queries": Case(6, 80, batch=2, kv_heads=2, value_dim=5),
    "queries for some ranks, keys for fewer": Case(5, 2),
    "several tiles": Case(1101, 1101, heads=1, kv_heads=1, head_dim=4, value_dim=4),
}

TERMS = {
    "sinks": dict(has_sinks=True),
    "sinks, a row without keys": dict(has_sinks=True, mask="every key masked"),
    "sinks and a softcap": dict(has_sinks=True, score="softcap"),
    "dropout": dict(dropout_p=0.3),
    "all is dropped": dict(dropout_p=1 - 1e-9),
    "dropout, sinks and a table": dict(dropout_p=0.2, has_sinks=True, score="relative bias from a table that learns"),
    **{
        f"{kind} in rows without keys, {mask}, {score}, dropout {p}": dict(empty_rows=kind, mask=mask, score=score, dropout_p=p)
        for kind, score, p in [
            ("uniform", "plain", 0), ("uniform", "two captures that learn", 0.2), ("uniform_fill", "softcap", 0), ("nan", "plain", 0)
        ]
        for mask in ("key padding", "only the future")
    },
}  # fmt: skip


def check_all(P: int, runs: dict[str, Run], tolerance: float | None = None, mesh: tuple[int, ...] = ()) -> None:
    """Every run gives the oracle's numbers, and nothing reaches the padding. All that fail are told, by name."""
    per_rank = run_ranks(attend_all_on_rank, P, runs, mesh)
    failures = []
    for i, (name, (_, layout, case)) in enumerate(runs.items()):
        try:
            results = assembled([results[i] for results in per_rank], layout, case)
            check_close(results, oracle(case), TOLERANCE[case.dtype] if tolerance is None else tolerance)
        except AssertionError as failure:
            failures.append(f"{name}: {failure}")
    assert runs and not failures, "\n".join(failures)


def assembled(per_rank: list[tuple[torch.Tensor, ...]], layout: Layout, case: Case) -> tuple[torch.Tensor, ...]:
    """Full-length out, dq, dk, dv, and the sums of the ranks' shares of other gradients; padding is checked on the way."""
    lengths = (case.q_len, case.q_len, case.k_len, case.k_len)
    shards, shares = list(zip(*per_rank, strict=True))[:4], list(zip(*per_rank, strict=True))[4:]
    for name, parts, n in zip(("out", "dq", "dk", "dv"), shards, lengths, strict=True):
        padding = padding_rows(list(parts), n, layout)
        assert padding.isfinite().all(), f"padding of {name}"
        assert name == "out" or not padding.any(), f"a gradient reached the padding of {name}"
    return *(assemble(list(x), n, layout) for x, n in zip(shards, lengths, strict=True)), *(torch.stack(x).sum(0) for x in shares)


@functools.cache
def oracle(case: Case) -> tuple[torch.Tensor, ...]:
    return dense_attention(case)
