"""What a user sees while a model compiles: two lines on stderr from one rank, a sign of life where it takes long, nothing when quiet."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import models
from autoseq import notices, progress
from autoseq.notices import notice
from autoseq.runtime import rendezvous
from autoseq.runtime.errors import RendezvousError
from autoseq.runtime.groups import group_from_mesh
from autoseq.runtime.rendezvous import exchange
from ranks import run_ranks


class Heard(logging.Handler):
    """The lines of notices and warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Heard:
        notices.log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        notices.log.removeHandler(self)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    monkeypatch.delenv("AUTOSEQ_LOG")
    monkeypatch.setattr(notices.log, "level", logging.NOTSET)  # a command that ran in this process before has set one
    torch._dynamo.reset()
    with Heard() as handler:
        yield handler.lines


BEFORE = "compiling {} for 1 rank with {}; its first step waits for that"
AFTER = r"{} on 1 rank, all {} rows, local, no fallbacks; compiled in (\d+ s|under a second), of which autoseq \d+"


def test_a_model_has_a_line_before_it_compiles_and_one_when_its_first_backward_is_done(heard: list[str]) -> None:
    model = models.make("plain", layers=2)
    name = type(model).__name__
    compiled = torch.compile(model, backend="autoseq", options={"inner": "aot_eager"})
    result = compiled(**models.batch("plain", batch_size=1, length=16))
    assert heard == [BEFORE.format(name, "aot_eager")], "the backward is compiled when it is needed"
    loss(result).backward()
    assert len(heard) == 2
    assert re.fullmatch(AFTER.format(name, 16), heard[1]), heard
    loss(compiled(**models.batch("plain", batch_size=1, length=16))).backward()
    loss(compiled(**models.batch("plain", batch_size=1, length=24))).backward()
    assert len(heard) == 2, "neither a later step nor another length has lines"


def loss(result: Any) -> Tensor:
    return next(x for x in result if isinstance(x, Tensor) and x.dim() == 0)


def test_without_gradients_both_lines_come_at_once(heard: list[str]) -> None:
    compiled = torch.compile(models.make("plain", layers=1), backend="autoseq", options={"inner": "eager"})
    with torch.no_grad():
        compiled(**models.batch("plain", batch_size=1, length=16))
    assert len(heard) == 2


class Parts(nn.Module):
    """Three parts with attention each, as after graph breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def attend(self, x: Tensor) -> Tensor:
        q = self.q(x).unsqueeze(1)
        return x + nn.functional.scaled_dot_product_attention(q, q, q).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        torch._dynamo.graph_break()
        x = self.attend(x)
        torch._dynamo.graph_break()
        return self.attend(x)


def test_a_model_in_parts_has_the_two_lines_once(heard: list[str]) -> None:
    compiled = torch.compile(Parts(), backend="autoseq", options={"inner": "eager"})
    compiled(torch.randn(1, 12, 8)).sum().backward()
    assert [line.partition(";")[0] for line in heard[:1]] == ["compiling Parts for 1 rank with eager"]
    assert len(heard) == 2
    assert re.search(r"Parts on 1 rank, all 12 rows, local, \d programs, no fallbacks", heard[1])


class MoreParts(Parts):
    """Another class, whose programs are not those of the first."""


def test_two_models_have_their_own_lines(heard: list[str]) -> None:
    for cls in (Parts, MoreParts):
        compiled = torch.compile(cls(), backend="autoseq", options={"inner": "eager"})
        with torch.no_grad():
            compiled(torch.randn(1, 12, 8))
            assert heard[-1].startswith(f"compiling {cls.__name__}"), "nothing tells that this was the last part"
            compiled(torch.randn(1, 12, 8))
            assert heard[-1].startswith(f"{cls.__name__} on 1 rank")
    assert len(heard) == 4


# Long compilations ----------------------------------------------------------------------------------------------------


def test_long_compilations_give_signs_of_life_and_leave_no_thread(heard: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_SIGN_S", 0.05)
    monkeypatch.setattr("torch._dynamo.backends.debugging.boxed_nop", slow(monkeypatch))
    compiled = torch.compile(models.make("plain", layers=1), backend="autoseq", options={"inner": "eager"})
    with torch.no_grad():
        compiled(**models.batch("plain", batch_size=1, length=16))
    signs = [line for line in heard if "still compiling" in line]
    assert re.search(r"still compiling \w+ after .*: (eager, forward|autoseq rewrites the program) \(\d programs? so far\)", signs[-1])
    assert len(signs) <= 12, "each sign comes when it has been twice as long"
    assert not [thread for thread in threading.enumerate() if thread.name == "autoseq progress"]
    with torch.no_grad():
        compiled(**models.batch("plain", batch_size=1, length=24))
    assert re.search(r"compiling \w+ again, for other inputs, for .*: ", heard[-2]), "what is slow later is told too"
    assert heard[-1].startswith("compiled in ")


def slow(monkeypatch: pytest.MonkeyPatch) -> Any:
    from torch._dynamo.backends.debugging import boxed_nop

    def compile_slowly(*args: Any) -> Any:
        time.sleep(0.3)
        return boxed_nop(*args)

    return compile_slowly


# Where lines go -------------------------------------------------------------------------------------------------------


@contextmanager
def unconfigured() -> Iterator[pytest.MonkeyPatch]:
    """Logging as in a user's script that has not configured it. In the test's body: pytest adds its handlers after fixtures are made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AUTOSEQ_LOG", raising=False)
        patch.setattr(logging.root, "handlers", [])
        patch.setattr(notices.log, "handlers", [notices._handler])
        patch.setattr(notices.log, "level", logging.NOTSET)
        yield patch


def test_notices_and_warnings_go_to_stderr_by_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    with unconfigured():
        notice("a line")
        notices.log.warning("something costs")
        notices.log.info("a plan")
    assert capsys.readouterr() == ("", "autoseq: a line\nautoseq: WARNING: something costs\n")


def test_a_users_handler_gets_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    with unconfigured():
        logging.basicConfig(format="mine: %(message)s", stream=sys.stderr)
        notice("a line")
        notices.log.warning("something costs")
    assert capsys.readouterr().err == "mine: a line\nmine: something costs\n"


@pytest.mark.parametrize("how", ["variable", "level", "disabled"])
def test_notices_can_be_silenced(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    with unconfigured() as patch:
        if how == "variable":
            patch.setenv("AUTOSEQ_LOG", "quiet")
        elif how == "level":
            patch.setattr(notices.log, "level", logging.ERROR)
        else:
            patch.setattr(logging.root.manager, "disable", logging.WARNING)
        notice("a line")
    assert capsys.readouterr().err == ""


def test_an_unknown_value_of_the_variable_is_warned_of_once(heard: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOSEQ_LOG", "quite")
    notice("a line")
    notice("another")
    assert heard == ["AUTOSEQ_LOG=quite is not known (did you mean 'quiet'?); it is quiet, or notices, the default", "a line", "another"]


SCRIPT = """
import sys
sys.path[:0] = ["tests"]
import torch, models
compiled = torch.compile(models.make("plain", layers=1), backend="autoseq", options={"inner": "eager"})
with torch.no_grad():
    compiled(**models.batch("plain", batch_size=1, length=16))
"""


def test_a_script_that_configures_nothing_shows_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOSEQ_LOG")
    shown = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert shown.stdout == ""
    assert [line.partition(" ")[0] for line in shown.stderr.splitlines()] == ["autoseq:"] * 2


# On ranks -------------------------------------------------------------------------------------------------------------


def lines_of(rank: int, P: int, two_dims: bool) -> list[str]:
    with pytest.MonkeyPatch.context() as patch, Heard() as handler:
        patch.delenv("AUTOSEQ_LOG", raising=False)
        mesh = init_device_mesh("cpu", (P // 2, 2), mesh_dim_names=("data", "sequence"))["sequence"] if two_dims else None
        torch._dynamo.reset()
        torch.manual_seed(0)
        options = {"inner": "eager", "mesh": mesh, "strategy": "ring", "layout": "zigzag"}
        compiled = torch.compile(models.make("plain", layers=2), backend="autoseq", options=options)
        loss(compiled(**models.batch("plain", batch_size=1, length=16))).backward()
        return handler.lines


@pytest.mark.parametrize("two_dims", [False, True], ids=["one sequence", "two copies of the data"])
def test_one_rank_speaks_for_all(two_dims: bool) -> None:
    first, *others = run_ranks(lines_of, 4 if two_dims else 2, two_dims)
    assert re.search(r"on 2 ranks, 8 of 16 rows each, ring, zigzag, no fallbacks; compiled in", first[1])
    assert len(first) == 2
    assert not any(others)


def warnings_of(rank: int, P: int) -> list[str]:
    with Heard() as handler:
        torch._dynamo.reset()
        torch.manual_seed(0)
        compiled = torch.compile(Sorting(), backend="autoseq", options={"inner": "eager"})
        with torch.no_grad():
            compiled(torch.randn(1, 12, 8))
        return handler.lines


class Sorting(Parts):
    """A step that no rule splits."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(q, q, q).squeeze(1).sort(1).values


def test_warnings_come_from_one_rank_too_and_stay_when_quiet() -> None:
    first, second = run_ranks(warnings_of, 2)
    assert re.search(r"sort.* runs on gathered values", first[0])
    assert (len(first), second) == (1, [])


def late_for_a_meeting(rank: int, P: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch, Heard() as handler:
        patch.setattr(rendezvous, "TOLD_AFTER_S", 0.2)
        if rank == 1:
            with pytest.raises(RendezvousError):
                time.sleep(1.5)
                exchange(group_from_mesh(None), "a meeting", b"", timeout_s=0.8)
        else:
            with pytest.raises(RendezvousError, match=r"Ranks \[1\] did not come within 0.8 s"):
                exchange(group_from_mesh(None), "a meeting", b"", timeout_s=0.8)
        return handler.lines


def test_the_first_rank_that_waits_long_says_for_whom() -> None:
    waiting, _, third = run_ranks(late_for_a_meeting, 3)
    assert waiting == ["waiting for rank 1 of group '0' to come to 'a meeting', since 0.2 s; rank 0 gives up after 0.8 s"]
    assert third == []
