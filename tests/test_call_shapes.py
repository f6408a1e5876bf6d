"""Ranks that call a compiled program with other shapes than their peers hear of it. Of the first call, test_errors tells."""

from __future__ import annotations

import os
import re
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoseq import call_shapes
from autoseq.call_shapes import TIMEOUT_VARIABLE
from autoseq.meetings import WORDS_KEPT, Agreed
from autoseq.runtime import rendezvous
from autoseq.runtime.errors import AutoSeqError, RankMismatchError
from autoseq.runtime.groups import SequenceGroup
from ranks import run_ranks

TIMEOUT_S = 1.0


def attend_causally(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class Calls:
    """One program for all multiples of four, called with inputs that are the same on every rank if their lengths are."""

    def __init__(self) -> None:
        options = {"inner": "aot_eager", "outputs": "full", "strategy": "ring"}
        self.compiled = torch.compile(attend_causally, backend="autoseq", dynamic=True, options=options)

    def __call__(self, length: int) -> str:
        """"right", or the error."""
        x = torch.randn(1, 2, length, 4, generator=torch.Generator().manual_seed(length))
        try:
            out = self.compiled(x)
        except AutoSeqError as error:
            return f"{type(error).__name__}: {error}"
        torch.testing.assert_close(out, attend_causally(x))
        return "right"

    def count_requests(self, lengths: list[int]) -> list[int]:
        """How often each call asks the store."""
        asked = mock.Mock(wraps=rendezvous._store())
        requests = []
        with mock.patch.object(rendezvous, "_store", lambda: asked):
            for length in lengths:
                asked.reset_mock()
                assert self(length) == "right"
                requests.append(len(asked.method_calls))
        return requests


def make_each_mistake(rank: int, P: int) -> dict[str, Any]:
    """What this rank is told, mistake by mistake, with right calls between them. One program for all: compiling is what costs."""
    call = Calls()
    said: dict[str, Any] = {"requests": call.count_requests([8, 8, 12, *[8, 12, 12] * 50])}
    said["at a later call"] = [call(16 + 4 * rank), call(8), call(16)]
    said["another program"] = call(28 + rank)
    start = time.monotonic()
    with mock.patch.dict(os.environ, {TIMEOUT_VARIABLE: str(TIMEOUT_S)}):
        said["alone"] = call(24) if rank == 0 else ""
    said["seconds"] = time.monotonic() - start
    return said


def call_out_of_step(rank: int, P: int) -> str:
    """Both lengths are known to both."""
    call = Calls()
    assert [call(8), call(12)] == ["right", "right"]
    return call((8, 12)[rank])


@pytest.fixture(scope="module")
def said() -> list[dict[str, Any]]:
    """What each rank was told, mistake by mistake."""
    return run_ranks(make_each_mistake, 2, timeout_s=60)


DIFFERS = (
    r"RankMismatchError: {} of group '0' calls the model with program \w+, x: \(1, 2, {}, 4\).*, and {} with program \w+, "
    r"x: \(1, 2, {}, 4\).*\. Nothing was sent\. Every rank of a sequence group gets the same, full-length inputs"
)


def test_at_a_later_call_and_the_model_still_works(said: list[dict[str, Any]]) -> None:
    for rank in range(2):
        later, *after = said[rank]["at a later call"]
        assert re.match(DIFFERS.format("rank 0", 16, "rank 1", 20), later), later
        assert after == ["right", "right"]


def test_a_length_for_which_one_rank_compiles_another_program(said: list[dict[str, Any]]) -> None:
    for rank in range(2):
        message = said[rank]["another program"]
        assert message.startswith("RankMismatchError: rank 0 of group '0' calls a program with new shapes, and rank 1 compiles a program. ")


def test_shapes_that_both_know_but_out_of_step() -> None:
    """Whoever comes second is told. The first waits for messages until the second's program ends with the error."""
    said = sorted(run_ranks(call_out_of_step, 2))
    assert re.match(r"MessageError: ring_attention.* on group '0'", said[0]), said
    assert re.match(DIFFERS.format(r"rank \d", r"\d+", "another rank", r"\d+"), said[1]), said


def test_a_rank_that_does_not_come_is_named_within_the_timeout(said: list[dict[str, Any]]) -> None:
    assert re.match(
        r"RendezvousError: The model is called with new shapes \(.*24.*\), for which all ranks meet. Ranks \[1\] did not come within 1 s.*"
        rf"{TIMEOUT_VARIABLE} sets how many seconds they wait; a rank that is missing may have called it with other shapes",
        said[0]["alone"],
    ), said[0]["alone"]  # fmt: skip
    assert TIMEOUT_S <= said[0]["seconds"] < TIMEOUT_S + 10


def test_shapes_that_repeat_cost_nothing_alone_and_one_request_beside_others(said: list[dict[str, Any]]) -> None:
    for rank in range(2):
        first, again, new, *later = said[rank]["requests"]
        assert first > 7 and again == 0 and new > 5
        assert later == [1] * 150


def test_a_rank_may_be_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Topics serve again: what the first rank said long ago is gone, and that is no difference between the ranks."""
    said: dict[str, str] = {}

    def first_word(group: SequenceGroup, topic: str, word: str, *, instead_of: str) -> str:
        if said.get(topic, "") == instead_of:
            said[topic] = word
        return said[topic]

    monkeypatch.setattr(call_shapes, "first_word", first_word)
    shapes = call_shapes.CallShapes(SequenceGroup("g", 2, 0), "program", [], [])
    ahead, behind = Agreed(), Agreed()
    for _ in range(3 * WORDS_KEPT):
        assert not shapes._hear_first_word(ahead, "x: (2, 8)", False)
    for _ in range(3 * WORDS_KEPT):
        assert not shapes._hear_first_word(behind, "x: (2, 8)", False)
    shapes._hear_first_word(ahead, "x: (2, 8)", False)
    with pytest.raises(RankMismatchError, match=r"calls the model with x: \(2, 16\), and another rank with x: \(2, 8\)"):
        shapes._hear_first_word(behind, "x: (2, 16)", False)
