"""A rank that dies or stalls in the middle of an exchange is an error on the others, within their group's timeout. Nothing hangs."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from attention_job import SPLIT, layouts_of, serves
from autoseq.runtime.counting import BACKEND
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from dense_attention import Case
from faults_job import EXIT_CODE, VICTIM, Mesh, Outcome, Phase, die_in_compiled_backward, die_in_one, stall_in_each
from ranks import RankError, run_ranks

MESHES: dict[str, Mesh] = {strategy: () if strategy in SPLIT else (2, 2) for strategy in STRATEGIES if strategy != "local"}
TIMEOUT_S = 1.0
SLACK_S = 10.0  # of a loaded machine, on top of the group's timeout; what would hang waits for STALLED_S, or forever
PHASES: tuple[Phase, ...] = get_args(Phase)

# Every rank of a strategy needs its neighbours: the first of these masks that the strategy serves.
CASES = [Case(24, 24, mask=mask, batch=1, heads=6, kv_heads=6) for mask in ("none", "causal", "window")]


def ranks_of(strategy: str) -> int:
    return 4 if MESHES[strategy] else 3


def served(strategy: str) -> tuple[Layout, Case]:
    """A case that the strategy serves on its ranks, and rows as it likes them."""
    return layouts_of(strategy)[0], next(case for case in CASES if serves(strategy, case, ranks_of(strategy), MESHES[strategy]))


def check_names_the_fault(strategy: str, phase: Phase, outcomes: dict[int, Outcome]) -> None:
    """Every survivor's error says group, operation, rank and, where there is one, peer; one stood in the phase itself."""
    for rank, outcome in outcomes.items():
        place = rf"rank {rank} of 3" if not MESHES[strategy] else r"rank \d of [24]"  # in the group that carried the message
        assert re.match(rf"MessageError: \w+.* on group '\d+', .*{place}", outcome.error), (strategy, phase, rank, outcome)
        assert "A rank of the group has failed, or runs a different program" in outcome.error
        assert outcome.seconds < TIMEOUT_S + SLACK_S, (strategy, phase, rank, outcome)
    in_phase = [outcome.error for outcome in outcomes.values() if "all_reduce on group" not in outcome.error]
    assert in_phase, (strategy, phase, outcomes)
    # A peer that gave up because of VICTIM may be the one that another names; on a mesh peers have their places on an axis.
    with_peer = [error for error in in_phase if re.search("(to|from) rank", error)]
    assert not with_peer or MESHES[strategy] or any(re.search(rf"(to|from) rank {VICTIM}", error) for error in with_peer), with_peer


@pytest.mark.parametrize("mesh", [pytest.param((), id="one level"), pytest.param((2, 2), id="two nodes of two ranks")])
def test_a_rank_that_stalls_is_an_error_on_the_others_within_the_timeout(mesh: Mesh) -> None:
    strategies = [strategy for strategy in MESHES if MESHES[strategy] == mesh]
    cases = {f"{strategy}, {phase}": (strategy, *served(strategy), phase) for strategy in strategies for phase in PHASES}
    per_rank = run_ranks(stall_in_each, ranks_of(strategies[0]), cases, mesh, TIMEOUT_S)
    for name, (strategy, _, _, phase) in cases.items():
        check_names_the_fault(strategy, phase, {rank: said[name] for rank, said in enumerate(per_rank) if rank != VICTIM})


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("strategy", MESHES)
def test_a_rank_that_dies_is_an_error_on_the_others_within_the_timeout(strategy: str, phase: Phase) -> None:
    P = ranks_of(strategy)
    with pytest.raises(RankError, match=f"rank {VICTIM} died with exit code {EXIT_CODE}") as raised:
        run_ranks(die_in_one, P, strategy, *served(strategy), phase, MESHES[strategy], TIMEOUT_S)
    assert sorted(raised.value.results) == [rank for rank in range(P) if rank != VICTIM], raised.value
    check_names_the_fault(strategy, phase, raised.value.results)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_graph_names_the_collective_that_failed(inner: str) -> None:
    with pytest.raises(RankError, match=f"rank {VICTIM} died with exit code {EXIT_CODE}") as raised:
        run_ranks(die_in_compiled_backward, 2, inner, backend=BACKEND)
    collective = "waiting for all-to-all|all_to_all_single|all_gather_into_tensor"
    for outcome in raised.value.results[0]:
        assert re.match(rf"MessageError: ({collective}) on group '0', rank 0 of 2: ", outcome.error), outcome
