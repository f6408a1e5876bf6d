"""Strategies by attention: which pattern counts, mistakes that are told, a run that has exactly a plan's strategies, and its numbers."""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import autoseq
import zoo
from autoseq import asked_strategies
from autoseq.asked_strategies import asked_strategy, check_patterns, parse_asked
from autoseq.cli import app
from autoseq.inspection import inspect_model
from autoseq.options import Options, parse_options
from autoseq.plan_call import call_of
from autoseq.plan_model import look_at
from autoseq.planner import make_plan
from autoseq.planning.degrees import Candidate, Split, candidate
from autoseq.planning.presets import load_topology
from inspected_models import EXAMPLE, OneAttention, break_graph
from ranks import run_ranks
from test_zoo import GRADIENT_TOLERANCE, LOSS_TOLERANCE, train
from trainings import H100, training


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_decided", "_told"):
        monkeypatch.setattr(asked_strategies, name, set())


# Which pattern counts -------------------------------------------------------------------------------------------------

LAYERS = {"layers.5.*": "ring", "*.attn": "halo", "*": "ulysses"}
ASKED: dict[str, tuple[Any, str, str]] = {
    "one name is for all": ("ring", "layers.5.attn", "ring"),
    "the first that matches counts": (LAYERS, "layers.5.attn", "ring"),
    "not the longest": ({"*": "ring"}, "layers.5.attn", "ring"),
    "the second, where the first does not match": (LAYERS, "layers.15.attn", "halo"),
    "the last, for the rest": (LAYERS, "vision.head", "ulysses"),
    "a name matches itself": ({"layers.5.attn": "ring"}, "layers.5.attn", "ring"),
    "and not what begins with it": ({"layers.5": "ring"}, "layers.5.attn", "auto"),
    "nor its second call": ({"layers.5.attn": "ring"}, "layers.5.attn#2", "auto"),
    "the second call has a name": ({"attn": "ring", "attn#2": "halo"}, "attn#2", "halo"),
    "one of several characters": ({"layers.*[13579].attn": "ring"}, "layers.13.attn", "ring"),
    "capitals count": ({"Layers.*": "ring"}, "layers.5", "auto"),
    "what none matches is chosen": ({"vision.*": "ring"}, "layers.5.attn", "auto"),
    "no patterns at all": ({}, "layers.5.attn", "auto"),
    "auto is a choice too": ({"layers.*": "auto", "*": "ring"}, "layers.5.attn", "auto"),
    "a star in a name, written so that it is one": ({"a[*]": "ring"}, "ab", "auto"),
}


@pytest.mark.parametrize(("asked", "name", "expected"), ASKED.values(), ids=ASKED)
def test_what_is_asked_for_an_attention(asked: Any, name: str, expected: str) -> None:
    assert asked_strategy(asked, name) == expected
    assert asked_strategy(Options(strategy=asked).strategy, name) == expected


def test_options_keep_the_patterns_in_their_order_and_compare_by_value() -> None:
    kept = Options(strategy=LAYERS)
    assert kept.strategy == tuple(LAYERS.items())
    assert kept == replace(kept) == parse_options({"strategy": LAYERS}) and hash(kept) == hash(replace(kept))
    assert kept != Options(strategy={"*.attn": "halo", "layers.5.*": "ring", "*": "ulysses"})


MISTAKES: dict[str, tuple[Any, str]] = {
    "an unknown strategy": ({"a": "rings"}, r"option 'strategy' for 'a' cannot be 'rings' \(did you mean 'ring'\?\); it is one of 'auto'"),
    "no strategy": ({"a": None}, "option 'strategy' for 'a' cannot be None"),
    "a key that is no name": ({5: "ring"}, r"maps names of attentions, such as 'model.layers.5.\*', to strategies; it has \(5, 'ring'\)"),
    "a tuple that is no mapping": (("ring",), "maps names of attentions, .* it has 'ring'"),
    "neither": (5, "cannot be 5; it is one of 'auto', .*, or a mapping from names of attentions to these"),
    "a list": (["ring"], r"cannot be \['ring'\] .*or a mapping from names of attentions to these"),
    "behind the star": ({"*": "ring", "a.*": "halo"}, r"'a\.\*' never counts, because '\*' before it matches as much; put '\*' last"),
    "twice": ((("a", "ring"), ("a", "halo")), "'a' never counts, because 'a' before it matches as much; leave one out"),
}


@pytest.mark.parametrize(("asked", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_option_is_told_before_anything_is_compiled(asked: Any, message: str) -> None:
    with pytest.raises(autoseq.OptionError, match=message):
        autoseq.parallelize(nn.Linear(2, 2), strategy=asked)
    with pytest.raises(autoseq.OptionError, match=message):
        autoseq.sequence_parallel(strategy=asked)


LINES = {
    "a name": ("ring", "ring"),
    "a pattern": ("*=ring", (("*", "ring"),)),
    "several": ("*.5.*=ring, *=halo", (("*.5.*", "ring"), ("*", "halo"))),
    "a name with an equals sign": ("a=b=ring", (("a=b", "ring"),)),
}


@pytest.mark.parametrize(("text", "expected"), LINES.values(), ids=LINES)
def test_the_command_line_says_the_same(text: str, expected: object) -> None:
    assert parse_asked(text) == expected


# What the program has -------------------------------------------------------------------------------------------------

NAMES = [f"layers.{i}.attn" for i in range(8)]
IDLE: dict[str, tuple[dict[str, str], Sequence[str], str]] = {
    "a name that is not there": (
        {"layers.5.atn": "ring"}, NAMES,
        r"no attention matches 'layers.5.atn' \(did you mean 'layers.5.attn'\?\); there are 'layers.0.attn', .*'layers.5.attn' and 2 more",
    ),
    "a pattern that matches nothing": ({"vision.*": "ring", "*": "halo"}, NAMES, r"no attention matches 'vision\.\*'"),
    "a name that is no pattern for itself": (
        {"a[0]": "ring"}, ["a[0]"],
        r"no attention matches 'a\[0\]' \(this name is written 'a\[\[\]0\]': keys are patterns\); there are 'a\[0\]'",
    ),
    "all that it matches is taken": (
        {"layers.*": "ring", "*.5.attn": "halo"}, NAMES,
        r"'\*\.5\.attn' never counts, because patterns before it match all of its attentions \('layers.5.attn'\); put it first",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("asked", "names", "message"), IDLE.values(), ids=IDLE)
def test_a_pattern_that_decides_for_nothing_is_an_error_that_says_why(asked: dict[str, str], names: Sequence[str], message: str) -> None:
    with pytest.raises(autoseq.OptionError, match=f"option 'strategy': {message}"):
        check_patterns(asked, names, of_part=False)


@pytest.mark.parametrize("asked", ["ring", {}, {"*": "ring"}, {"layers.*": "ring", "*": "halo"}, {"*.5.attn": "ring", "layers.*": "halo"}])
def test_what_decides_for_something_and_a_star_are_no_mistakes(asked: Any) -> None:
    check_patterns(asked, NAMES, of_part=False)


def test_a_pattern_that_decided_before_may_find_nothing_in_a_later_program() -> None:
    """A model of pictures and text that sees no picture this time, and is compiled again for that."""
    asked = {"vision.*": "ring", "*": "auto"}
    with pytest.raises(autoseq.OptionError, match="no attention matches 'vision"):
        check_patterns(asked, ["text.attn"], of_part=False)
    check_patterns(asked, ["vision.attn", "text.attn"], of_part=False)
    check_patterns(asked, ["text.attn"], of_part=False)


class Twice(nn.Module):
    """A module that is called twice, and one more."""

    def __init__(self, after: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.a, self.b, self.after = OneAttention(), OneAttention(), after

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(self.a(self.a(x)))
        return self.b(y)


def make(after: Callable[[Tensor], Tensor] = lambda y: y) -> tuple[nn.Module, dict[str, Any]]:
    return Twice(after), {"x": torch.randn(1, 16, 8)}


@pytest.mark.parametrize("after", [lambda y: y, break_graph], ids=["in one part", "in two parts"])
def test_each_attention_has_the_strategy_of_its_name(after: Callable[[Tensor], Tensor]) -> None:
    asked = {"a": "ring", "a#2": "gather_kv", "b": "ulysses"}
    found = inspect_model(lambda: make(after), seq_len=16, world_size=2, strategy=asked)
    assert {planned.site.name: planned.strategy for planned in found.sites} == asked


@pytest.mark.parametrize("after", [lambda y: y, break_graph], ids=["in one part", "in two parts"])
def test_inspect_knows_all_parts_and_which_name_none_has(after: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(autoseq.OptionError, match=r"no attention matches 'c'.*; there are 'a', 'a#2', 'b'"):
        inspect_model(lambda: make(after), seq_len=16, world_size=2, strategy={"a": "ring", "c": "ring", "*": "ulysses"})


def test_a_part_tells_once_what_another_part_may_have(caplog: pytest.LogCaptureFixture) -> None:
    options = {"inner": "eager", "strategy": {"a": "auto", "b": "auto", "elsewhere": "auto"}}
    model, kwargs = make(break_graph)
    torch.compile(model, backend="autoseq", options=options)(**kwargs)
    said = [record.getMessage() for record in caplog.records if "option 'strategy'" in record.getMessage()]
    assert said == [
        "option 'strategy': the part of the program with 'a', 'a#2' has no attention for 'b', 'elsewhere', which counts only if another "
        "part has one; autoseq inspect looks at all parts"
    ]


class EndsEarly(Twice):
    """Its second part cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        y = break_graph(self.a(x))
        return self.b(y[..., :3])


def test_inspect_warns_where_it_could_not_see_all_parts(caplog: pytest.LogCaptureFixture) -> None:
    asked = {"a": "ring", "b": "ring"}
    found = inspect_model(lambda: (EndsEarly(), {"x": torch.randn(1, 16, 8)}), seq_len=16, world_size=2, strategy=asked)
    assert [planned.strategy for planned in found.sites] == ["ring"]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any(line.startswith("only the parts of the model up to this error were seen") for line in said)
    assert any("the part of the program with 'a' has no attention for 'b'" in line for line in said)


def test_the_whole_program_refuses_what_no_attention_matches() -> None:
    model, kwargs = make()
    with pytest.raises(autoseq.OptionError, match="no attention matches 'elsewhere'"):
        torch.compile(model, backend="autoseq", options={"strategy": {"elsewhere": "ring"}})(**kwargs)


def test_a_strategy_that_cannot_serve_its_attention_is_refused_as_ever() -> None:
    with pytest.raises(autoseq.StrategyError, match=r"strategy 'halo' cannot serve the attention at .* \(b\): .*Those that can: ulysses"):
        inspect_model(make, seq_len=16, world_size=2, strategy={"b": "halo", "*": "ring"})


# The command line -----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str, str]:
    shown = CliRunner().invoke(app, list(arguments))
    return shown.exit_code, shown.stdout, shown.stderr


def test_inspect_takes_patterns() -> None:
    status, shown, said = run("inspect", EXAMPLE, "--seq-len", "64", "--world-size", "2", "--strategy", "*.0=ring,*=ulysses", "--json")
    assert (status, said) == (0, "")
    assert {site["name"]: site["strategy"] for site in json.loads(shown)["attention"]} == {"blocks.0": "ring", "blocks.1": "ulysses"}


WRONG_LINES = {
    "no such attention": ("inspect", "*.9=ring,*=ulysses", "no attention matches '*.9'"),
    "no pattern": ("inspect", "*.0=ring,ulysses", "--strategy *.0=ring,ulysses: 'ulysses' is no PATTERN=STRATEGY; write, for example"),
    "no strategy": ("verify", "*.0=rings", "option 'strategy' for '*.0' cannot be 'rings' (did you mean 'ring'?)"),
    "a plan of its own": ("plan", "*=ring", "a plan has one --strategy for all attentions, or chooses for each; autoseq inspect takes"),
}


@pytest.mark.parametrize(("command", "asked", "message"), WRONG_LINES.values(), ids=WRONG_LINES)
def test_a_mistake_on_the_command_line_is_a_message_and_status_2(command: str, asked: str, message: str) -> None:
    more = ["--topology", "8xH100"] if command == "plan" else []
    status, shown, said = run(command, EXAMPLE, "--seq-len", "64", "--world-size", "2", "--strategy", asked, *more)
    assert (status, shown) == (2, "")
    assert message in said and "Traceback" not in said


# The call that a plan prints ------------------------------------------------------------------------------------------


def options_of(call: str) -> dict[str, Any]:
    """The options in a printed line but the mesh, whose ranks are not here."""
    expression = ast.parse(call, mode="eval").body
    assert isinstance(expression, ast.Call)
    (given,) = [keyword.value for keyword in expression.keywords if keyword.arg == "options"]
    assert isinstance(given, ast.Dict)
    pairs = {ast.literal_eval(key): value for key, value in zip(given.keys, given.values, strict=True) if key is not None}
    return {key: ast.literal_eval(value) for key, value in pairs.items() if key != "mesh"}


@pytest.fixture(scope="module")
def two_layers() -> Candidate:
    """Of a model with a window in its first layer and none in its second, on two ranks a sequence."""
    entry = zoo.ZOO["gemma3"]
    looked_at = look_at(lambda: (entry.make("sdpa"), entry.batch()), batch=2, seq_len=zoo.LENGTH, world_size=2)
    return candidate(looked_at, Split(1, 2), load_topology("4xA10"), strategy="ring", layout="contiguous")


def with_strategies(planned: Candidate, strategies: Mapping[str, str]) -> Candidate:
    """The same with these attentions, all like the first."""
    one = planned.plan.sites[0]
    sites = [replace(one, site=replace(one.site, name=name, part_name=""), strategy=strategy) for name, strategy in strategies.items()]
    return replace(planned, plan=replace(planned.plan, sites=tuple(sites)))


WRITTEN: dict[str, tuple[dict[str, str], str]] = {
    "one strategy": ({"a.0": "ring", "a.1": "ring"}, '"strategy": "ring"'),
    "the most frequent is for the rest": ({"a.0": "ring", "a.1": "halo", "a.2": "halo"}, '"strategy": {"a.0": "ring", "*": "halo"}'),
    "one pattern where it is exact": (
        {"see.0.attn": "ring", "see.1.attn": "ring", "read.0.attn": "halo", "read.1.attn": "halo", "read.2.attn": "halo"},
        '"strategy": {"see.*.attn": "ring", "*": "halo"}',
    ),
    "and names where it would take more": (
        {"a.0.b": "ring", "a.1.b": "halo", "a.2.b": "ring", "a.3.b": "halo", "a.4.b": "halo"},
        '"strategy": {"a.0.b": "ring", "a.2.b": "ring", "*": "halo"}',
    ),
    "second calls": ({"a": "ring", "a#2": "halo", "b": "halo"}, '"strategy": {"a": "ring", "*": "halo"}'),
    "stars and brackets of names": ({"a*[0]": "ring", "ab0": "halo", "a": "halo"}, '"strategy": {"a[*][[]0]": "ring", "*": "halo"}'),
}  # fmt: skip


@pytest.mark.parametrize(("strategies", "written"), WRITTEN.values(), ids=WRITTEN)
def test_how_the_strategies_of_a_plan_are_written(two_layers: Candidate, strategies: dict[str, str], written: str) -> None:
    line = call_of(with_strategies(two_layers, strategies), "4xA10")
    assert line == f'torch.compile(model, backend="autoseq", options={{"mesh": mesh["sequence"], {written}, "layout": "contiguous"}})'


names = st.text(st.sampled_from("ab01.*?[]!-#\"'\\\né"), min_size=1, max_size=8) | st.sampled_from(NAMES)


@settings(deadline=None)
@given(strategies=st.dictionaries(names, st.sampled_from(["ring", "halo", "ulysses", "auto"]), min_size=1, max_size=12))
def test_what_is_printed_asks_for_exactly_the_strategies_of_the_plan(two_layers: Candidate, strategies: dict[str, str]) -> None:
    asked = Options(**options_of(call_of(with_strategies(two_layers, strategies), "4xA10"))).strategy
    assert {name: asked_strategy(asked, name) for name in strategies} == strategies
    check_patterns(asked, list(strategies), of_part=False)


def test_a_mix_that_memory_forced_is_run_by_its_call_where_nothing_forces_it() -> None:
    """What a run does not know of (Adam's moments, what is kept free) made the plan slower than what it would choose."""
    plain = training(batch=1, layers=4)
    asked = replace(plain, sites=tuple(replace(named, site=replace(named.site, heads=8, kv_heads=2)) for named in plain.sites))

    def planned(memory_bytes: int) -> Candidate:
        return candidate(asked, Split(1, 8), replace(H100, memory_bytes=memory_bytes))

    most, least = planned(H100.memory_bytes).memory.total, planned(1).memory.total
    mixed = planned(least + (most - least) * 5 // 8)
    assert len(mixed.strategies) > 1, "or the test would show nothing"
    assert mixed.fits
    options = Options(**options_of(call_of(mixed, "8xH100")))
    sites = asked.on(mixed.split.mesh)
    assert (options.topology, options.layout) == (None, mixed.plan.layout)
    again = make_plan(sites, group_size=mixed.split.sequence, strategy=options.strategy, layout=options.layout, topology=H100)
    assert again.strategies() == mixed.plan.strategies()
    chosen = make_plan(sites, group_size=mixed.split.sequence, strategy="auto", layout=options.layout, topology=H100)
    assert chosen.strategies() != mixed.plan.strategies(), "or the test would show nothing"


class SharedCode(nn.Module):
    """Layers that are traced one by one, all as the same part, whose attention has one name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(OneAttention(break_graph) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def two_ranks(model: Callable[[], nn.Module]) -> Candidate:
    """A plan on two ranks a sequence."""
    looked_at = look_at(lambda: (model(), {"x": torch.randn(1, 16, 8)}), batch=1, seq_len=16, world_size=2)
    return candidate(looked_at, Split(1, 2), load_topology("4xA10"), layout="contiguous")


def taking(planned: Candidate, strategies: Sequence[str]) -> Candidate:
    """The same plan with other strategies, in the order of its attentions."""
    sites = [replace(site, strategy=strategy) for site, strategy in zip(planned.plan.sites, strategies, strict=True)]
    return replace(planned, plan=replace(planned.plan, sites=tuple(sites)))


def test_attentions_that_share_a_name_have_one_strategy_or_are_chosen_again_and_the_call_says_so() -> None:
    planned = two_ranks(SharedCode)
    (name,) = {site.site.run_name for site in planned.plan.sites}
    assert [site.site.name for site in planned.plan.sites] == [name, f"{name}#2", f"{name}#3"]
    assert options_of(call_of(taking(planned, ["ring"] * 3), "mine.json")) == {"strategy": "ring", "layout": "contiguous"}
    assert call_of(taking(planned, ["ring", "ulysses", "ring"]), "mine.json") == (
        'torch.compile(model, backend="autoseq", '
        'options={"mesh": mesh["sequence"], "strategy": "auto", "topology": "mine.json", "layout": "contiguous"})'
        f'  # "{name}" is the name of several attentions, planned as ring and ulysses: the run chooses'
    )


def test_the_call_of_a_model_in_parts_gives_each_its_strategy() -> None:
    strategies = ["ring", "gather_kv", "ulysses"]
    options = options_of(call_of(taking(two_ranks(lambda: Twice(break_graph)), strategies), "4xA10"))
    found = inspect_model(lambda: make(break_graph), seq_len=16, world_size=2, **options)
    assert [planned.strategy for planned in found.sites] == strategies


# Ranks ----------------------------------------------------------------------------------------------------------------


def train_and_listen(rank: int, world_size: int, name: str, asked: Any) -> tuple[dict[str, float], list[str]]:
    """How far a model's loss, outputs and gradients are from one device's, and what the rank says of its plan."""
    said: list[str] = []
    handler, log = logging.Handler(), logging.getLogger("autoseq")
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        return train(rank, world_size, name, "sdpa", asked, "eager"), said
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


def test_a_model_with_windows_trains_with_the_strategies_of_a_printed_call_and_one_devices_numbers(two_layers: Candidate) -> None:
    mixed = taking(two_layers, ["halo", "ring"])
    asked = options_of(call_of(mixed, "4xA10"))["strategy"]
    assert set(asked.values()) == {"halo", "ring"}
    for differences, said in run_ranks(train_and_listen, 2, "gemma3", asked):
        assert differences.pop("loss") <= LOSS_TOLERANCE and max(differences.values()) <= GRADIENT_TOLERANCE, differences
        for planned in mixed.plan.sites:
            assert any(line.startswith(f"{planned.site.name}: {planned.strategy}, mask {planned.site.mask}") for line in said), said
