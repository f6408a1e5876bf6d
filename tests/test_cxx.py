"""Without a C++ compiler Inductor on CPUs is an error with a cure before anything is compiled, on all ranks; what needs none runs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from autoseq import AutoSeqError, CompilerError, cxx
from ranks import run_ranks

CALL = "import torch; torch.compile(torch.nn.Linear(2, 2), backend='autoseq')(torch.ones(3, 2))"
SAYS = r'inner="inductor", the default, needs a C\+\+ compiler for CPUs, and {} cannot be run; install one .*CXX.*"aot_eager"}} or "eager"'


@contextlib.contextmanager
def lacking(command: str) -> Iterator[None]:
    """As if the variable CXX had named `command` when torch was imported."""
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": (None, command)}):
        yield


@pytest.fixture(params=["missing", "a folder", "no program", "it fails"])
def command(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / "compiler"
    if request.param == "a folder":
        path.mkdir()
    elif request.param != "missing":
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755 if request.param == "it fails" else 0o644)
    return str(path)


def test_whatever_cannot_be_run_is_an_error_with_the_cure(command: str) -> None:
    with lacking(command), pytest.raises(CompilerError, match=SAYS.format(command)):
        torch.compile(nn.Linear(2, 2), backend="autoseq")(torch.ones(3, 2))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_what_needs_no_compiler_runs_without_one(inner: str) -> None:
    model = nn.Linear(2, 2)
    with lacking("/missing"):
        result = torch.compile(model, backend="autoseq", options={"inner": inner})(torch.ones(3, 2))
    assert torch.equal(result, model(torch.ones(3, 2)))


def test_other_devices_than_cpus_need_none() -> None:
    with lacking("/missing"):
        cxx.refuse_missing_cxx([torch.ones(2, device="meta"), torch.tensor(1.0), 3])
        with pytest.raises(CompilerError):
            cxx.refuse_missing_cxx([torch.ones(2)])


def test_the_variable_decides_which_compiler_is_looked_for() -> None:
    ended = subprocess.run([sys.executable, "-c", CALL], env=os.environ | {"CXX": "/missing/g++"}, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "CompilerError: inner=" in ended.stderr and "/missing/g++ cannot be run" in ended.stderr.splitlines()[-1]


def call_where_rank_1_lacks_it(rank: int, P: int) -> str:
    with lacking("/missing") if rank == 1 else contextlib.nullcontext(), pytest.raises(AutoSeqError) as raised:
        torch.compile(nn.Linear(2, 2), backend="autoseq")(torch.ones(1, 8, 2))
    return f"{type(raised.value).__name__}: {raised.value}"


def test_a_rank_that_lacks_it_stops_the_others_at_once() -> None:
    there, lacks = run_ranks(call_where_rank_1_lacks_it, 2)
    assert lacks.startswith('CompilerError: inner="inductor"')
    assert there.startswith("RankMismatchError: rank 1 of group '0' could not compile the program: CompilerError: inner=\"inductor\"")
