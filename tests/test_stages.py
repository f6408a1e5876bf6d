"""Attention in stages of heads: the same numbers and bytes as in one, and messages travel while other heads are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from attention_job import Run, attend_on_rank, runs_of, site_of
from autoseq.runtime import stages
from autoseq.runtime.strategies import STRATEGIES
from dense_attention import Case, check_close
from ranks import run_ranks
from test_strategies import assembled, oracle

STAGED = ["ulysses", "gather_kv"]


@contextmanager
def as_many_stages_as_there_can_be() -> Iterator[None]:
    """However short the messages."""
    before, stages.MIN_STAGE_BYTES = stages.MIN_STAGE_BYTES, 1
    try:
        yield
    finally:
        stages.MIN_STAGE_BYTES = before


EVERYTHING = dict(has_sinks=True, score="relative bias from a table that learns", dropout_p=0.2)
CASES = {
    "multi-head attention": Case(16, 16, batch=2, heads=8, kv_heads=8),
    "grouped heads": Case(16, 16, heads=16, kv_heads=8, mask="none"),
    "few KV heads": Case(16, 16, heads=12, kv_heads=2),
    "more ranks than KV heads": Case(16, 16, batch=2, heads=8, kv_heads=1),
    "uneven heads": Case(16, 16, heads=7, kv_heads=7, mask="none"),
    "uneven groups": Case(18, 18, heads=9, kv_heads=3),
    "some ranks without heads": Case(16, 16, heads=2, kv_heads=1, mask="none"),
    "padded rows": Case(13, 13, batch=2, heads=6, kv_heads=3, mask="none"),
    "a rank without rows": Case(5, 5, heads=4),
    "cross attention, other value dim": Case(7, 21, heads=8, kv_heads=4, value_dim=5, mask="causal aligned at the end"),
    "bfloat16": Case(24, 24, heads=8, kv_heads=2, head_dim=32, value_dim=32, dtype=torch.bfloat16),
    "a window": Case(32, 32, heads=4, kv_heads=4, mask="window"),
    "chunks that no tensor decides": Case(24, 24, heads=6, kv_heads=3, mask="chunks"),
    "segments": Case(23, 23, batch=2, heads=6, kv_heads=3, mask="segments"),
    "a mask that depends on the head": Case(17, 17, heads=8, kv_heads=4, mask="head dependent"),
    "a mean of all keys in empty rows": Case(11, 11, heads=6, kv_heads=3, mask="only the future", empty_rows="uniform"),
    "sinks": Case(16, 16, heads=6, kv_heads=3, has_sinks=True),
    "slopes that learn": Case(14, 14, heads=8, kv_heads=4, score="ALiBi with slopes that learn"),
    "two captures that learn": Case(14, 14, batch=2, heads=8, kv_heads=4, score="two captures that learn"),
    "everything": Case(15, 15, batch=2, heads=8, kv_heads=4, mask="segments", **EVERYTHING),
    "everything, one KV head": Case(15, 15, heads=6, kv_heads=1, **EVERYTHING),
}
# What only the values of a tensor rule out is not sent either, and no cost knows of it.
DECIDED_BY_TENSORS = ("segments", "everything")

Counted = tuple[int, int]
"""Messages and bytes of one step."""


def attend_and_count(rank: int, P: int, runs: dict[str, Run]) -> list[tuple[tuple[torch.Tensor, ...], Counted]]:
    from autoseq.runtime.counting import counters, reset_counters

    found = []
    with as_many_stages_as_there_can_be():
        for name, run in runs.items():
            reset_counters()
            try:
                results = attend_on_rank(rank, P, *run)
            except Exception as error:
                raise RuntimeError(f"in the run {name!r}") from error
            messages, sent = (sum(part) for part in zip(*(counters().values() or [(0, 0)]), strict=True))
            found.append((results, (messages, sent)))
    return found


@pytest.mark.parametrize("P", [2, 3, 4])
def test_numbers_and_bytes_of_several_stages(P: int) -> None:
    runs = {f"{strategy}: {name}": run for strategy in STAGED for name, run in runs_of(strategy, P, CASES).items()}
    per_rank = run_ranks(attend_and_count, P, runs, backend="autoseq_counted")
    wrong, several = [], 0
    for i, (name, (strategy, layout, case)) in enumerate(runs.items()):
        # bfloat16 rounds what goes in and out, 2^-9 each; float64 differs in the order of summation alone.
        tolerance = 3e-2 if case.dtype == torch.bfloat16 else 1e-10
        try:
            check_close(assembled([of_rank[i][0] for of_rank in per_rank], layout, case), oracle(case), tolerance)
            for rank, of_rank in enumerate(per_rank):
                several += check_counted(strategy, case, P, layout, rank, of_rank[i][1])
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)
    assert several > len(runs), "most of the table must have several stages"


def check_counted(strategy: str, case: Case, P: int, layout: str, rank: int, counted: Counted) -> bool:
    """Messages and bytes are what the cost says, as many bytes as in one stage; whether there are several."""
    site = site_of(case)
    with as_many_stages_as_there_can_be():
        cost = STRATEGIES[strategy].cost(site, P, layout, rank)
    one = STRATEGIES[strategy].cost(site, P, layout, rank)
    messages, sent = cost.forward_messages + cost.backward_messages, cost.forward_bytes + cost.backward_bytes
    if strategy == "gather_kv" and case.mask in DECIDED_BY_TENSORS:
        assert counted[0] <= messages and counted[1] <= sent
    else:
        assert counted == (messages, sent)
    if case.mask != "head dependent":
        assert sent == one.forward_bytes + one.backward_bytes
    return messages > one.forward_messages + one.backward_messages
