"""What a user can do wrong, and the sentence each mistake gets."""

import logging
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import autoseq
from autoseq.options import parse_options
from inspected_models import break_graph
from ranks import RankError, run_ranks

OPTIONS = {"inner": "aot_eager"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param(
            {"strateg": "ring"}, r"there is no option 'strateg' \(did you mean 'strategy'\?\); the options are mesh,", id="unknown key"
        ),
        pytest.param(
            {"strategy": "rings"}, r"cannot be 'rings' \(did you mean 'ring'\?\); it is one of 'auto', 'local'", id="unknown value"
        ),
        pytest.param(
            {"layout": "striped"}, "option 'layout' cannot be 'striped'; it is one of 'auto', 'contiguous', 'zigzag'", id="layout"
        ),
        pytest.param({"strict": "yes"}, "option 'strict' cannot be 'yes'; it is one of False, True", id="a string for a bool"),
        pytest.param({"strict": 1}, "option 'strict' cannot be 1", id="a number for a bool"),
        pytest.param({"mesh": 2}, "option 'mesh' is a torch.distributed DeviceMesh or None, not int", id="a mesh that is none"),
        pytest.param(
            {"outputs": None}, "option 'outputs' cannot be None; it is one of 'deferred', 'full', 'local'", id="None for a choice"
        ),
    ],
)
def test_a_wrong_option_is_named_with_what_exists(given: dict[str, Any], message: str) -> None:
    with pytest.raises(autoseq.OptionError, match=message):
        parse_options(given)
    with pytest.raises(autoseq.OptionError, match=message):
        autoseq.parallelize(nn.Linear(2, 2), **given)


def test_a_wrong_option_reaches_the_caller_of_torch_compile_as_itself() -> None:
    with pytest.raises(autoseq.OptionError, match="there is no option 'speed'"):
        torch.compile(nn.Linear(2, 2), backend="autoseq", options={"speed": 1})(torch.ones(1, 2))


class TinyAttention(nn.Module):
    """One projection, one attention; `steps` lets a test put something around it."""

    def __init__(self, after: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.after(attended.transpose(1, 2).flatten(2))


def compile_tiny(length: int = 8, after: str = "", **options: Any) -> Tensor:
    torch.manual_seed(0)
    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "": lambda x: x, "roll": lambda x: x.roll(1, 1), "break": lambda x: break_graph(x).relu(),
    }  # fmt: skip
    return torch.compile(TinyAttention(steps[after]), backend="autoseq", options={**OPTIONS, **options})(torch.randn(1, length, 8))


def over_queries(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.mT, 1) @ x


def refuse(rank: int, world_size: int, kind: str) -> str:
    """Do one thing wrong on the ranks; returns the message this rank gets."""
    try:
        _MISTAKES[kind](rank)
    except autoseq.AutoSeqError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _three_dimensional_mesh(rank: int) -> None:
    compile_tiny(mesh=dist.init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=("data", "nodes", "sequence")))


def _other_lengths(rank: int) -> None:
    compile_tiny(length=8 + rank)


def _other_strategies(rank: int) -> None:
    compile_tiny(strategy=["ring", "ulysses"][rank])


def _other_patterns(rank: int) -> None:
    compile_tiny(strategy=["ring", {"*": "ring"}][rank])


def _a_pattern_for_nothing(rank: int) -> None:
    compile_tiny(strategy=[{"layers.5": "ring", "*": "ring"}, "ring"][rank])


def _other_inputs(rank: int) -> None:
    torch.manual_seed(0)
    model = torch.compile(TinyAttention(), backend="autoseq", options=OPTIONS)
    model(torch.full((1, 8, 8), float(rank)))


def _other_weights(rank: int) -> None:
    torch.manual_seed(rank)
    torch.compile(TinyAttention(), backend="autoseq", options=OPTIONS)(torch.ones(1, 8, 8))


def _one_rank_fails(rank: int) -> None:
    if rank == 0:
        compile_tiny(strategy="local")
    compile_tiny()


_MISTAKES: dict[str, Callable[[int], Any]] = {
    "a mesh of three dimensions": _three_dimensional_mesh,
    "more ranks than positions under strict": lambda rank: compile_tiny(length=1, strict=True),
    "no attention under strict": lambda rank: torch.compile(nn.Linear(8, 8), backend="autoseq", options={**OPTIONS, "strict": True})(
        torch.ones(1, 8, 8)),
    "an attention that is not read under strict": lambda rank: torch.compile(
        over_queries, backend="autoseq", options={**OPTIONS, "strict": True})(torch.ones(1, 8, 8)),
    "local attention on two ranks": lambda rank: compile_tiny(strategy="local"),
    "a fallback under strict": lambda rank: compile_tiny(after="roll", strict=True),
    "a part without attention under strict": lambda rank: compile_tiny(after="break", strict=True),
    "other lengths on each rank": _other_lengths,
    "other strategies on each rank": _other_strategies,
    "the same strategies by other patterns": _other_patterns,
    "a pattern for nothing on one rank": _a_pattern_for_nothing,
    "other inputs on each rank": _other_inputs,
    "other weights on each rank": _other_weights,
    "one rank cannot compile": _one_rank_fails,
}


@pytest.mark.parametrize(
    ("kind", "messages"),
    [
        ("a mesh of three dimensions", [r"MeshError: .* of one dimension, or of two.* This one has 3.*mesh\['nodes', 'sequence'\]"] * 2),
        (
            "more ranks than positions under strict",
            [r"FallbackError: strict=True forbids .*runs whole on every rank .*test_errors.py:.* it has only 1 query for 2 ranks"] * 2,
        ),
        ("no attention under strict", ["FallbackError: strict=True .*the program at .*runs whole .*no attention was found"] * 2),
        (
            "an attention that is not read under strict",
            [r"FallbackError: strict=True .*no attention can be split: .*test_errors.py:.*not over the last dimension"] * 2,
        ),
        (
            "local attention on two ranks",
            ["StrategyError: strategy 'local' cannot serve the attention at .*test_errors.py:.*split over 2"] * 2,
        ),
        (
            "a fallback under strict",
            ["FallbackError: strict=True forbids fallbacks.*aten.roll.default at .*test_errors.py:.*bytes a rank"] * 2,
        ),
        (
            "a part without attention under strict",
            ["FallbackError: strict=True forbids .*a part of the program at .*test_errors.py:.*runs whole on every rank.*bytes a rank"] * 2,
        ),
        (
            "other lengths on each rank",
            [r"RankMismatchError: ranks 0 and 1 .*different programs. First difference:\s+rank 0: .*8.*rank 1: .*9"] * 2,
        ),
        ("other strategies on each rank", ["RankMismatchError: .*rank 0: .*: ring, mask.*rank 1: .*: ulysses, mask"] * 2),
        (
            "the same strategies by other patterns",
            [r"RankMismatchError: .*rank 0: .*'strategy': 'ring'.*rank 1: .*\(\('\*', 'ring'\),\)"] * 2,
        ),
        (
            "a pattern for nothing on one rank",
            ["OptionError: option 'strategy': no attention matches 'layers.5'", "RankMismatchError: rank 0 .*could not compile .*layers.5"],
        ),
        (
            "other inputs on each rank",
            ["RankMismatchError: ranks 0 and 1 .*different values of x. Every rank.*same, full-length inputs"] * 2,
        ),
        ("other weights on each rank", ["RankMismatchError: ranks 0 and 1 .*different values of qkv.weight"] * 2),
        (
            "one rank cannot compile",
            ["StrategyError: strategy 'local'", "RankMismatchError: rank 0 of group .* could not compile .*StrategyError"],
        ),
    ],
)
def test_a_mistake_is_an_error_on_every_rank_and_never_a_hang(kind: str, messages: list[str]) -> None:
    for message, said in zip(messages, run_ranks(refuse, 2, kind, timeout_s=60), strict=True):
        assert re.search(message, said, re.DOTALL), said


def fall_back_twice(rank: int, world_size: int) -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("autoseq").addHandler(handler)
    try:
        torch.manual_seed(0)
        model = torch.compile(TinyAttention(lambda x: x.sort(1).values), backend="autoseq", options=OPTIONS)
        for _ in range(2):
            model(torch.ones(1, 7, 8)).sum().backward()
    finally:
        logging.getLogger("autoseq").removeHandler(handler)
    return said


def test_a_fallback_is_said_once_with_operator_line_reason_and_bytes() -> None:
    said, by_the_other = run_ranks(fall_back_twice, 2)
    assert (len(said), by_the_other) == (1, [])
    # [1, 4 padded rows, 8] floats go to one other rank
    assert said[0].startswith("aten.sort.default at tests/test_errors.py:")
    assert said[0].endswith("runs on gathered values (the sequence must be whole here); 128 bytes a rank")


def come_alone(rank: int, world_size: int) -> str:
    os.environ["AUTOSEQ_COMPILE_TIMEOUT_S"] = "2"
    try:
        return refuse_alone(rank)
    finally:
        del os.environ["AUTOSEQ_COMPILE_TIMEOUT_S"]


def refuse_alone(rank: int) -> str:
    if rank == 1:
        return "did not come"
    try:
        compile_tiny()
    except autoseq.AutoSeqError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_rank_that_never_compiles_is_named_within_the_timeout() -> None:
    alone, _ = run_ranks(come_alone, 2, timeout_s=60)
    assert "RendezvousError" in alone and "1" in alone


class Scaled(nn.Module):
    """Attention times a number that the caller chooses."""

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x) * scale


def change_a_float(rank: int, world_size: int, inner: str = "aot_eager") -> float:
    compiled = torch.compile(Scaled(), backend="autoseq", options={"inner": inner}, dynamic=True)
    x = torch.randn(1, 2, 8, 4)
    expected = F.scaled_dot_product_attention(x, x, x)
    return max((compiled(x, scale) - expected * scale).abs().max().item() for scale in (0.5, 0.25, 0.125))


def test_a_float_input_that_changes_is_never_taken_for_its_old_value() -> None:
    assert max(run_ranks(change_a_float, 2)) <= 1e-6  # float32 rounding of values around 1


def test_where_a_float_cannot_be_read_anew_its_change_is_an_error() -> None:
    """AOTAutograd is what has Dynamo compile again."""
    with pytest.raises(RankError, match=r"UnsupportedError: the program was compiled for scale = 0\.5 and is called with 0\.25"):
        run_ranks(change_a_float, 2, "eager")
