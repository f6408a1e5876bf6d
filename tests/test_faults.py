"""A rank that dies or stalls in the middle of an exchange is an error on the others, within their group's timeout. Nothing hangs."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from attention_job import SPLIT, layouts_of
from autoseq.runtime.counting import BACKEND
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site
from dense_attention import Case
from faults_job import EXIT_CODE, VICTIM, Outcome, Phase, die_in_compiled_backward, die_in_one, stall_in_each
from ranks import RankError, run_ranks

P = 3
TIMEOUT_S = 1.0
SLACK_S = 10.0  # of a loaded machine, on top of the group's timeout; what would hang waits for STALLED_S, or forever
PHASES: tuple[Phase, ...] = get_args(Phase)

# Every rank of a strategy needs its neighbours: the first of these masks that the strategy serves.
CASES = [Case(24, 24, mask=mask, batch=1, heads=6, kv_heads=6) for mask in ("none", "causal", "window")]


def served(strategy: str) -> tuple[Layout, Case]:
    """A case that the strategy serves on P ranks, and rows as it likes them."""
    return layouts_of(strategy)[0], next(case for case in CASES if STRATEGIES[strategy].cannot_serve(site_of(case), P) is None)


def site_of(case: Case) -> Site:
    known = {name: value for name, value in case.settings().items() if name in Site.__dataclass_fields__}
    return Site(batch=case.batch, heads=case.heads, kv_heads=case.kv_heads, head_dim=case.head_dim, value_dim=case.value_dim,
                element_bytes=case.dtype.itemsize, **known)  # fmt: skip


def check_names_the_fault(strategy: str, phase: Phase, outcomes: dict[int, Outcome]) -> None:
    """Every survivor's error says group, operation, rank and, where there is one, peer; one stood in the phase itself."""
    for rank, outcome in outcomes.items():
        assert re.match(rf"MessageError: \w+.* on group '\d+', .*rank {rank} of {P}", outcome.error), (strategy, phase, rank, outcome)
        assert "A rank of the group has failed, or runs a different program" in outcome.error
        assert outcome.seconds < TIMEOUT_S + SLACK_S, (strategy, phase, rank, outcome)
    in_phase = [outcome.error for outcome in outcomes.values() if "all_reduce on group" not in outcome.error]
    assert in_phase, (strategy, phase, outcomes)
    for error in in_phase:
        assert "(to|from) rank" not in error or f"rank {VICTIM}" in error


def test_a_rank_that_stalls_is_an_error_on_the_others_within_the_timeout() -> None:
    cases = {f"{strategy}, {phase}": (strategy, *served(strategy), phase) for strategy in SPLIT for phase in PHASES}
    per_rank = run_ranks(stall_in_each, P, cases, TIMEOUT_S)
    for name, (strategy, _, _, phase) in cases.items():
        check_names_the_fault(strategy, phase, {rank: per_rank[rank][name] for rank in range(P) if rank != VICTIM})


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("strategy", SPLIT)
def test_a_rank_that_dies_is_an_error_on_the_others_within_the_timeout(strategy: str, phase: Phase) -> None:
    with pytest.raises(RankError, match=f"rank {VICTIM} died with exit code {EXIT_CODE}") as raised:
        run_ranks(die_in_one, P, strategy, *served(strategy), phase, TIMEOUT_S)
    assert sorted(raised.value.results) == [rank for rank in range(P) if rank != VICTIM], raised.value
    check_names_the_fault(strategy, phase, raised.value.results)


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_graph_names_the_collective_that_failed(inner: str) -> None:
    with pytest.raises(RankError, match=f"rank {VICTIM} died with exit code {EXIT_CODE}") as raised:
        run_ranks(die_in_compiled_backward, 2, inner, backend=BACKEND)
    for outcome in raised.value.results[0]:
        assert re.match(r"MessageError: (all_to_all_single|all_gather_into_tensor) on group '0', rank 0 of 2: ", outcome.error), outcome
