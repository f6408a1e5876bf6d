"""Thousands of random programs, by seed, resumable: `make test-long COUNT=10000 SEED=0 REAL=500`.

    threads   the ranks of a program are threads that take turns in one process (`program_check`)
    real      the ranks are processes over gloo, many programs a job

Each tier keeps a state under build/: how many of its seeds are done, what became of them, and the seeds of each failure and each
kind of refusal. A run that is started again goes on from there; on another commit, it begins anew only with `--fresh`. The exit
code is 1 if any program failed, and the failing program is printed, made smaller, as a file for torchrun.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from program_check import Outcome, check_program, judged, quiet, run_on_this_rank
from program_shrinking import script, shrunk
from program_text import RandomProgram, draw_program
from ranks import RankError, close_pool, run_ranks

BUILD = Path(__file__).parent.parent / "build"
LONGEST_PROGRAM_S = 300
PROGRAMS_PER_PROCESS = 200  # Dynamo and autograd keep a little of each
PROGRAMS_PER_JOB = 5
SEEDS_KEPT = 20


@dataclass
class State:
    """What a tier has done so far; one JSON file."""

    path: Path
    commit: str
    seed: int
    done: int = 0
    seconds: float = 0.0
    running: int | None = None  # the seed that is being run: if the process dies there, it failed
    counts: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, list[int]] = field(default_factory=dict)  # "verdict | message" -> seeds, first the number of them

    @classmethod
    def load(cls, path: Path, seed: int, fresh: bool) -> State:
        """The state on disk, if it is of this first seed."""
        if path.exists() and not fresh:
            found = json.loads(path.read_text())
            if found["seed"] == seed:
                return cls(path, **found)
        return cls(path, commit(), seed)

    def save(self) -> None:
        fields = asdict(self)
        del fields["path"]
        self.path.parent.mkdir(exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(fields, indent=1) + "\n")
        partial.replace(self.path)

    def note(self, seed: int, outcome: Outcome, seconds: float) -> None:
        """One program more is done."""
        self.done, self.seconds, self.running = self.done + 1, self.seconds + seconds, None
        self.counts[outcome.verdict] = self.counts.get(outcome.verdict, 0) + 1
        if outcome.verdict != "exact":
            seeds = self.kinds.setdefault(f"{outcome.verdict} | {outcome.kind}", [0])
            seeds[0] += 1
            del seeds[SEEDS_KEPT:]
            seeds.append(seed)
        self.save()

    @property
    def failures(self) -> dict[str, list[int]]:
        """Of each kind of failure, the seeds."""
        return {kind: seeds[1:] for kind, seeds in self.kinds.items() if kind.startswith(("wrong", "internal"))}

    def line(self) -> str:
        """How it stands."""
        rate = self.seconds / max(1, self.done)
        return f"{self.path.stem}: {self.done} programs from seed {self.seed}, {rate:.2f} s each: {self.counts}"


def commit() -> str:
    """The commit of the working tree, marked where there are changes."""
    command = ["git", "describe", "--always", "--dirty"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return os.environ.get("AUTOSEQ_COMMIT") or said.stdout.strip() or "unknown"


def run_threads(state: State, count: int) -> None:
    """The programs that are left, in child processes one after the other, so that a crash is a failure and not the end."""
    while state.done < count:
        child = multiprocessing.get_context("spawn").Process(target=_some_on_threads, args=(state.path, state.seed, count))
        child.start()
        child.join()
        state.__dict__.update(State.load(state.path, state.seed, fresh=False).__dict__)
        if state.running is not None:
            ended = Outcome("internal", f"the process ended with code {child.exitcode}, or took too long")
            state.note(state.running, ended, LONGEST_PROGRAM_S)
        elif child.exitcode:
            sys.exit(f"the process that runs programs ended with code {child.exitcode}")
        print(state.line(), flush=True)


def _some_on_threads(path: Path, seed: int, count: int) -> None:
    state = State.load(path, seed, fresh=False)
    torch.set_num_threads(1)
    gc.freeze()
    gc.disable()  # looking through what is imported again and again is a tenth of a compilation
    for number in range(state.done, min(count, state.done + PROGRAMS_PER_PROCESS)):
        start, state.running = time.monotonic(), seed + number
        state.save()
        faulthandler.dump_traceback_later(LONGEST_PROGRAM_S, exit=True)
        outcome = check_program(draw_program(seed + number))
        faulthandler.cancel_dump_traceback_later()
        state.note(seed + number, outcome, time.monotonic() - start)
        if outcome.failed:
            print(f"seed {seed + number}: {outcome.verdict}: {outcome.text[:300]}", flush=True)
        if number % 10 == 0:
            gc.collect()
    os._exit(0)  # the last collection of an interpreter that imported torch takes seconds


def check_on_this_rank(rank: int, P: int, programs: list[str]) -> list[tuple[str, str]]:
    """What became of each program, as this rank sees it."""
    outcomes = []
    for text in programs:
        program = RandomProgram.from_json(text)
        with quiet():
            outcome = judged(program, lambda program=program: run_on_this_rank(program), again=run_on_this_rank)
        outcomes.append((outcome.verdict, outcome.text))
    return outcomes


def run_real(state: State, count: int) -> None:
    """The programs that are left, on processes: a few of one number of ranks a job."""
    for seeds in _jobs(range(state.seed + state.done, state.seed + count)):
        programs, start = [draw_program(seed) for seed in seeds], time.monotonic()
        try:
            ranks = run_ranks(check_on_this_rank, programs[0].P, [program.to_json() for program in programs], timeout_s=LONGEST_PROGRAM_S)
            outcomes = [worst([Outcome(*each) for each in column]) for column in zip(*ranks, strict=True)]
        except RankError as error:
            outcomes = [Outcome("internal", f"one of these {len(seeds)} programs: {error}")] * len(seeds)
        for seed, outcome in zip(seeds, outcomes, strict=True):
            state.note(seed, outcome, (time.monotonic() - start) / len(seeds))
            if outcome.failed:
                print(f"seed {seed} on real ranks: {outcome.verdict}: {outcome.text[:300]}", flush=True)
    close_pool()
    print(state.line(), flush=True)


def worst(outcomes: list[Outcome]) -> Outcome:
    """A program is what its worst rank says."""
    order = ["wrong", "internal", "sensitive", "refused", "no program", "exact"]
    return min(outcomes, key=lambda outcome: order.index(outcome.verdict))


def _jobs(seeds: range) -> Iterator[list[int]]:
    """Seeds in order, cut where the number of ranks changes or a job is full."""
    job: list[int] = []
    for seed in seeds:
        if job and (len(job) == PROGRAMS_PER_JOB or draw_program(job[0]).P != draw_program(seed).P):
            yield job
            job = []
        job.append(seed)
    if job:
        yield job


def explain(seed: int) -> None:
    """Print the program of a seed, made smaller while it fails alike, as a file for torchrun."""
    program = draw_program(seed)
    outcome = check_program(program)
    print(f"# seed {seed}: {outcome.verdict}: {outcome.text}")
    if outcome.failed:
        program = shrunk(program, lambda other: (found := check_program(other)).verdict == outcome.verdict and (
            outcome.verdict == "wrong" or found.kind == outcome.kind
        ))  # fmt: skip
    print(script(program))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="programs whose ranks are threads")
    parser.add_argument("--real", type=int, default=500, help="programs whose ranks are processes")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--fresh", action="store_true", help="forget what is done")
    parser.add_argument("--explain", type=int, help="the seed of one program to run, make smaller and print")
    given: Any = parser.parse_args(arguments)
    os.environ.setdefault("AUTOSEQ_LOG", "quiet")
    torch.set_num_threads(1)
    if given.explain is not None:
        explain(given.explain)
        return 0
    states = [State.load(BUILD / f"random-programs-{tier}.json", given.seed, given.fresh) for tier in ("threads", "real")]
    for state in states:
        state.save()
    run_threads(states[0], given.count)
    run_real(states[1], given.real)
    for state in states:
        for kind, seeds in sorted(state.kinds.items()):
            print(f"{seeds[0]:6} {kind}; seeds {seeds[1:6]}")
    failed = next((seeds[0] for state in states for seeds in state.failures.values()), None)
    if failed is not None:
        explain(failed)
    return 0 if failed is None else 1


if __name__ == "__main__":
    sys.exit(main())
