"""Random programs: outputs, gradients and what is left in parameters and buffers are one device's, whatever the statements.

This is a sample; `make test-long` runs thousands. `python tests/long_run.py --explain SEED` makes the program of a seed smaller and
prints it.
"""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from long_run import State, check_on_this_rank
from program_check import Outcome, check_program, is_sensitive, one_device, run_on_threads
from program_shrinking import script, shrunk
from program_statements import REGIONS, STATEMENTS
from program_text import IMPORTS, Line, RandomProgram, draw_program, program_text
from rank_threads import NoRankCanGoOn, RankThreads
from ranks import run_ranks

SEEDS = [*range(55), 1034, 1093, 1162]

MEAN = RandomProgram(1, (Line("causal attention", (0, 0, 0, 0)), Line("minus the mean", (0, 0, 0, 0))), P=3, length=7)


@pytest.fixture(autouse=True)
def quick_and_quiet() -> Iterator[None]:
    """Looking through everything that is imported again and again is a tenth of a compilation."""
    gc.disable()
    with mock.patch.dict("os.environ", AUTOSEQ_LOG="quiet"):
        yield
    gc.enable()


@pytest.mark.parametrize("part", range(6))
def test_a_random_program_has_one_devices_numbers(part: int) -> None:
    for seed in SEEDS[part::6]:
        program = draw_program(seed)
        outcome = check_program(program)
        assert not outcome.failed, f"seed {seed}: {outcome.text}\n{script(program)}"


def test_random_programs_have_them_on_real_ranks() -> None:
    programs = [draw_program(seed) for seed in SEEDS if draw_program(seed).P == 2][:4]
    for outcomes in run_ranks(check_on_this_rank, 2, [program.to_json() for program in programs]):
        assert [verdict for verdict, _ in outcomes if verdict in ("wrong", "internal")] == [], outcomes


def test_a_seed_is_a_program_and_survives_json() -> None:
    programs = [draw_program(seed) for seed in range(200)]
    assert [RandomProgram.from_json(program.to_json()) for program in programs] == programs
    assert {line.name for program in programs for line in program.lines} >= {*REGIONS, "hook", "written by .data", "graph break"}
    assert {program.P for program in programs} == {1, 2, 3, 4}


@pytest.mark.parametrize("name", [*STATEMENTS, *REGIONS])
def test_every_statement_and_every_sublist_is_python(name: str) -> None:
    line = Line(name, (2, 1, 0, 3))
    for lines in ((), (line,), (line, *draw_program(3).lines), (*draw_program(4).lines, line)):
        compile(IMPORTS + program_text(RandomProgram(0, lines)), "program", "exec")


def test_a_wrong_number_is_found_and_its_program_made_small() -> None:
    assert check_program(MEAN) == Outcome("exact")
    long = replace(MEAN, lines=(Line("linear", (0,)), *MEAN.lines, Line("gate", (0, 1)), Line("no_grad", (1,)), Line("norm", (0,))))
    with mock.patch("autoseq.passes.local_node.rows.zero_padding", lambda x, **_: x):
        outcome = check_program(long)
        assert outcome.verdict == "wrong"
        small = shrunk(long, lambda program: {line.name for line in program.lines} >= {"causal attention", "minus the mean"})
        assert [line.name for line in small.lines] == ["causal attention", "minus the mean"]
        assert check_program(replace(small, P=3)).verdict == "wrong"
    compile(script(small), "script", "exec")


def test_rounding_is_measured_where_a_program_multiplies_it() -> None:
    saturated = draw_program(1034)  # logits of 1e8 at the second step
    values = {program: one_device(program) for program in (MEAN, saturated)}
    assert is_sensitive(saturated, values[saturated], {"step 1: gradient of k.weight": 1.6e-9})
    assert not is_sensitive(saturated, values[saturated], {"step 1: gradient of k.weight": 1e-3})
    assert not is_sensitive(saturated, values[saturated], {"step 1: gradient of k.weight": 1.6e-9, "step 0: gradient of k.weight": 1.6e-9})
    assert not is_sensitive(MEAN, values[MEAN], {"step 0: gradient of k.weight": 1.6e-9})
    assert not is_sensitive(saturated, values[saturated], None)


def test_what_autoseq_refuses_is_no_failure_and_what_torch_refuses_is_no_program() -> None:
    refused = check_program(replace(MEAN, length=2, P=3))
    assert (refused.verdict, refused.failed) in {("refused", False), ("exact", False)}
    leaf = RandomProgram(0, (Line("rows of a buffer read", (0,)),), length=70)
    assert check_program(leaf).verdict == "no program"


def test_ranks_that_wait_for_each_other_are_an_error_at_once() -> None:
    def job(rank: int) -> None:
        dist.recv(torch.zeros(1), src=1 - rank)

    with pytest.raises(NoRankCanGoOn, match="rank 0 waits for a message from rank 1, tag 0, rank 1"):
        RankThreads(2).run(job)


def test_ranks_that_call_different_collectives_are_an_error() -> None:
    def job(rank: int) -> None:
        x = torch.zeros(2)
        dist.all_reduce(x) if rank == 0 else dist.barrier()

    with pytest.raises(AssertionError, match=r"ranks call different collectives: {0: .allreduce SUM., 1: .barrier.}"):
        RankThreads(2).run(job)


def test_each_rank_has_its_own_group_and_random_state() -> None:
    def job(rank: int) -> tuple[int, float, float]:
        x = torch.full((1,), float(rank))
        first = torch.rand(()).item()
        dist.all_reduce(x)
        return dist.get_rank(), x.item(), first + torch.rand(()).item()

    results = RankThreads(3).run(job)
    assert [rank for rank, *_ in results] == [0, 1, 2]
    assert {total for _, total, _ in results} == {3.0}
    assert len({drawn for *_, drawn in results}) == 1
    assert not dist.is_initialized()


def test_the_values_of_all_ranks_are_compared() -> None:
    assert len(run_on_threads(replace(MEAN, P=4))) == 4


def test_a_long_run_goes_on_where_it_was(tmp_path: Path) -> None:
    state = State.load(tmp_path / "build" / "threads.json", 7, fresh=False)
    state.note(7, Outcome("exact"), 1.0)
    state.note(8, Outcome("wrong", "step 0: output: relative error 1.0e-01"), 1.0)
    again = State.load(state.path, 7, fresh=False)
    assert again == state
    assert again.failures == {"wrong | step #: output: relative error #": [8]}
    assert State.load(state.path, 7, fresh=True).done == State.load(state.path, 9, fresh=False).done == 0
