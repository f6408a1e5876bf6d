"""Every fault of a rank, at the first, the tenth and a resumed step: a named error on every rank that is left, in time. None is silent."""

from __future__ import annotations

import re
import signal
from typing import get_args

import pytest

from fault_matrix_job import MISMATCHES, TIMEOUT_S, VICTIM, Outcome, When, die, leave_each, mismatch_each
from ranks import RankError, run_ranks

WHEN: tuple[When, ...] = get_args(When)

SLACK_S = 30.0  # of a loaded machine that compiles, on top of the timeout; what would hang waits for the job's

SAID = {
    "other batch": "ids",
    "skipped step": "ids",
    "repeated step": "ids",
    "other labels, loss inside": "labels",
    "other labels, loss outside": "the gradient that comes back into the output .*, by more than rounding",
    "other weights": r"(the parameter or buffer )?head\.weight",
}


def check_in_time(outcome: Outcome) -> None:
    assert outcome.seconds < TIMEOUT_S + SLACK_S, outcome


@pytest.mark.parametrize("when", WHEN)
def test_ranks_that_are_given_different_things_all_hear_of_it_before_the_optimizer_steps(when: When) -> None:
    assert set(SAID) == set(MISMATCHES)
    for outcomes in run_ranks(mismatch_each, 2, when):
        for name, what in SAID.items():
            found = "were given|called the model with|had"
            pattern = rf"RankMismatchError: .*ranks 0 and 1 of group '\d+' ({found}) different values of {what}"
            assert re.match(pattern, outcomes[name].error), (name, outcomes[name])
            assert outcomes[name].kept_weights, name
            check_in_time(outcomes[name])


@pytest.mark.parametrize("when", WHEN)
def test_a_rank_that_raises_or_stalls_is_a_named_error_on_the_other(when: When) -> None:
    for rank, outcomes in enumerate(run_ranks(leave_each, 2, when)):
        for name, outcome in outcomes.items():
            expected = "InterruptedError" if rank == VICTIM else "MessageError" if when == "tenth" else "MessageError|RendezvousError"
            assert re.match(expected, outcome.error), (name, outcome)
            check_in_time(outcome)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, id="signal"), pytest.param(signal.SIGKILL, id="kill")])
@pytest.mark.parametrize("when", WHEN)
def test_a_rank_that_is_ended_is_a_named_error_on_the_others(when: When, number: signal.Signals) -> None:
    with pytest.raises(RankError, match=f"rank {VICTIM} died with exit code -{int(number)}") as raised:
        run_ranks(die, 3, when, int(number))
    assert sorted(raised.value.results) == [0, 2], raised.value
    for outcome in raised.value.results.values():
        assert re.match("MessageError|RendezvousError", outcome.error), outcome
        check_in_time(outcome)
