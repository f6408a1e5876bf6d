"""Models that Dynamo traces in several parts: what passes between the parts is counted, planned for and told, as on real ranks."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

from autoseq.cli import app
from autoseq.dry_run import Counts, add_counts
from autoseq.html_costs import totals
from autoseq.html_report import html_page, inspect_pictures
from autoseq.inspection import inspect_model, with_programs
from autoseq.node_traffic import node_traffic
from autoseq.options import Options
from autoseq.passes.shard import Fallback
from autoseq.plan_model import look_at
from autoseq.planning.gathered import gathers
from autoseq.planning.model_cost import model_cost
from autoseq.planning.training import Split, Training, memory_besides_attention
from autoseq.readable import readable_bytes
from autoseq.runtime.counting import counters, reset_counters
from inspected_models import OneAttention, break_graph
from ranks import run_ranks

LENGTH, WIDE = 24, 64


class Broken(nn.Module):
    """Two parts with attention, and a head and a loss in a third without."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = OneAttention(), OneAttention(), nn.Linear(8, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        y = break_graph(self.a(x))
        y = break_graph(self.b(y))
        return F.gelu(self.head(y)).square().mean()


class EagerBetween(nn.Module):
    """Python between two parts reads values; the second part has them then."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = OneAttention(), OneAttention()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = _scaled(y)
        return self.b(y).square().mean()


@torch.compiler.disable
def _scaled(y: Tensor) -> Tensor:
    return y * 2


class Layers(nn.Module):
    """Layers of one class: where each is traced by itself, they share the compiled code."""

    def __init__(self, after: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.layers = nn.ModuleList(OneAttention(after) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class BreaksInALoop(Layers):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x.square().mean()


class BreaksUnderWith(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with open(os.devnull):
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
        return x.square().mean()


class BreaksUnderTry(Layers):
    def forward(self, x: Tensor) -> Tensor:
        try:
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
        finally:
            self.is_done = True
        return x.square().mean()


class NotTracedItself(Layers):
    @torch._dynamo.disable(recursive=False)
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def breaks_in_each_layer() -> nn.Module:
    return Layers(break_graph)


class OneLayerThreeTimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = OneAttention(break_graph)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x)
        return x.square().mean()


class Gated(nn.Module):
    """Traced anew for each number of heads; the parameters have the same names in each of its parts."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(8, 24), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return break_graph(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)) * x


class SameNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Gated(2), Gated(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).square().mean()


def make(model: Callable[[], nn.Module] = Broken, batch: int = 1, seq_len: int = LENGTH) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return model(), {"x": torch.randn(batch, seq_len, 8)}


def train(rank: int, world_size: int, model: Callable[[], nn.Module]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """What a step sends, and what compiling warns of."""
    warned: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warned.append(record.getMessage())

    handler = Keep(level=logging.WARNING)
    logging.getLogger("autoseq").addHandler(handler)
    module, kwargs = make(model)
    compiled = torch.compile(module, backend="autoseq", options={"inner": "aot_eager", "strategy": "ring"})
    compiled(**kwargs).backward()
    reset_counters()
    compiled(**kwargs).backward()
    logging.getLogger("autoseq").removeHandler(handler)
    return counters(), warned


@pytest.mark.parametrize("model", [Broken, EagerBetween], ids=["a part without attention", "Python between the parts"])
def test_inspect_counts_and_tells_what_ranks_send_and_warn_of(model: type[nn.Module]) -> None:
    found = inspect_model(lambda: make(model), seq_len=LENGTH, world_size=2, strategy="ring")
    sent, warned = run_ranks(train, 2, model, backend="autoseq_counted")[0]
    assert {op: (count.messages, count.bytes) for op, count in found.collectives.items()} == sent
    assert len(warned) == len(found.fallbacks)
    for line, fallback in zip(warned, found.fallbacks, strict=True):
        assert f"{fallback.bytes_per_rank:,} bytes a rank" in line
        assert "the program was traced in several parts" in line and "the program was traced in several parts" in fallback.reason


REPEATED = {
    "layers, a break between them": BreaksInALoop,
    "layers under a with": BreaksUnderWith,
    "layers under a try": BreaksUnderTry,
    "layers called by a function that is not traced": NotTracedItself,
    "layers with a break in each": breaks_in_each_layer,
    "one layer, three times": OneLayerThreeTimes,
    "two layers whose parameters have the same names": SameNames,
}


def is_told(fallback: Fallback, line: str) -> bool:
    sends = f"{fallback.bytes_per_rank:,} bytes a rank" if fallback.bytes_per_rank else ""
    return sends in line and fallback.reason.partition(";")[0] in line


@pytest.mark.parametrize("model", REPEATED.values(), ids=REPEATED.keys())
def test_every_call_of_a_part_counts(model: Callable[[], nn.Module]) -> None:
    found = inspect_model(lambda: make(model), seq_len=LENGTH, world_size=2, strategy="ring")
    sent, warned = run_ranks(train, 2, model, backend="autoseq_counted")[0]
    assert {op: (count.messages, count.bytes) for op, count in found.collectives.items()} == sent
    assert len(found.sites) == len({planned.site.name for planned in found.sites}) == (2 if model is SameNames else 3)
    assert all(any(is_told(fallback, line) for line in warned) for fallback in found.fallbacks)
    assert all(any(is_told(fallback, line) for fallback in found.fallbacks) for line in warned)


@pytest.mark.parametrize("model", [breaks_in_each_layer, OneLayerThreeTimes, SameNames])
def test_a_plan_has_every_parameter_once_and_every_attention(model: Callable[[], nn.Module]) -> None:
    seen = look_at(lambda: make(model), batch=1, seq_len=LENGTH, world_size=2)
    owned = list(model().parameters())
    assert seen.cost.parameters == seen.cost.trained == sum(p.numel() for p in owned)
    assert seen.cost.parameter_bytes == seen.cost.gradient_bytes == 4 * seen.cost.parameters
    assert len(seen.sites) == len({named.name for named in seen.sites}) == (2 if model is SameNames else 3)


@pytest.mark.parametrize("model", [BreaksInALoop, BreaksUnderWith, BreaksUnderTry, NotTracedItself])
def test_breaks_between_layers_change_neither_products_nor_parameters(model: type[nn.Module]) -> None:
    whole, cut = (look_at(lambda made=made: make(made), batch=1, seq_len=LENGTH, world_size=2) for made in (Layers, model))
    assert len(cut.sites) == len(whole.sites)
    assert (cut.cost.parameters, cut.cost.parameter_bytes) == (whole.cost.parameters, whole.cost.parameter_bytes)
    assert (cut.cost.forward.flops, cut.cost.backward.flops) == (whole.cost.forward.flops, whole.cost.backward.flops)


def test_the_report_folds_the_calls_of_a_part_and_draws_its_graph_once() -> None:
    shown = CliRunner().invoke(app, ["inspect", f"{__file__}:in_a_loop", "--seq-len", "24", "--world-size", "2", "--graph", "after"])
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "Attention: 3 sites" in shown.stdout and "(3 ×)" in shown.stdout
    # One for the first layer, whose input wants no gradient, and one for the others.
    assert shown.stdout.count("Graph after") == 2


def in_a_loop(batch: int, seq_len: int) -> tuple[nn.Module, dict[str, Any]]:
    return make(BreaksInALoop, batch, seq_len)


def test_sites_of_all_parts_have_names_of_their_own_in_json() -> None:
    shown = CliRunner().invoke(app, ["inspect", f"{__file__}:in_a_loop", "--seq-len", "24", "--world-size", "2", "--json"])
    names = [site["name"] for site in json.loads(shown.stdout)["attention"]]
    assert names == [names[0], f"{names[0]}#2", f"{names[0]}#3"]


@pytest.mark.parametrize("model", [BreaksInALoop, breaks_in_each_layer, OneLayerThreeTimes])
def test_the_page_draws_a_part_once_and_says_how_often_it_is_called(model: Callable[[], nn.Module]) -> None:
    found = inspect_pictures(lambda: make(model), seq_len=LENGTH, world_size=2, options=Options(strategy="ring"))
    total: Counts = {}
    for picture in found.pictures:
        sent = [totals(picture.items).sent.step, *(summed.sent.step for summed in picture.gradients)]
        total = reduce(add_counts, sent * picture.times, total)
    assert total == found.inspection.collectives
    assert len(found.pictures) < len(found.inspection.programs)
    page = html_page(found, "several parts")
    assert f"called {max(each.times for each in found.pictures)} times" in page
    assert f">{readable_bytes(4 * sum(p.numel() for p in model().parameters()))}<" in page


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "autoseq" and each.levelno == logging.WARNING]


class HeadBetween(Layers):
    """Python computes with a layer of torch's own, which is traced by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, WIDE)

    @torch._dynamo.disable(recursive=False)
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


def test_parameters_that_python_may_use_between_the_parts_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    inspect_model(lambda: make(HeadBetween), seq_len=LENGTH, world_size=2)
    (line,) = warnings(caplog)
    assert line.startswith("2 parameters (head.weight, head.bias) are in no part of the model that torch.compile traced")


class Shrinking(Layers):
    """The code that was compiled for the second layer serves the third, which has half as many rows."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[:, ::2].contiguous()
            torch._dynamo.graph_break()
        return x.square().mean()


def test_a_part_that_is_called_with_other_sizes_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    inspect_model(lambda: make(Shrinking), seq_len=LENGTH, world_size=2)
    (line,) = warnings(caplog)
    assert "inspected_models.py" in line and "is called with other sizes too (6, traced with 12)" in line


def test_what_is_gathered_between_parts_stands_at_the_node_that_made_it() -> None:
    def look(programs: Any) -> list[list[str]]:
        return [[op for sent in node_traffic(program, 2).values() for op in sent.forward] for program in programs]

    a, b, head = with_programs(make, look, world_size=2, options=Options(strategy="ring"))
    assert "all_gather" in a and "all_gather" in b
    assert head == []  # it runs whole


@pytest.fixture(scope="module")
def training() -> Training:
    return look_at(make, batch=1, seq_len=LENGTH, world_size=8)


def test_a_plan_has_the_parameters_products_and_gathers_of_every_part(training: Training) -> None:
    assert training.cost.parameters == sum(p.numel() for p in Broken().parameters())
    assert gathers(training.cost)
    of_head = 2 * LENGTH * 8 * WIDE
    of_attentions = 2 * (LENGTH // 8) * 2 * (8 * 24 + 8 * 8)
    products = dict(training.cost_on(8).forward.flops)["float32"]
    assert products * (LENGTH // 8) // training.cost.tokens == of_head + of_attentions  # the head's are the same on each of 8 ranks
    (gathered,) = training.cost_on(8).exchanged
    # What a and b make, and in the backward the gradient of what b got.
    assert gathered.full_bytes * (LENGTH // 8) // training.cost.tokens == 3 * LENGTH * 8 * 4


def test_a_plan_calculates_for_eight_ranks_what_a_look_at_eight_finds(training: Training) -> None:
    seen = with_programs(make, lambda programs: model_cost(programs, world_size=8), world_size=8, options=Options(layout="contiguous"))
    calculated = training.cost_on(8)
    times = calculated.tokens // seen.tokens
    assert (calculated.kept_bytes, calculated.largest_bytes) == (times * seen.kept_bytes, times * seen.largest_bytes)
    assert calculated.gathered_bytes == times * seen.gathered_bytes == times * LENGTH * 8 * 4
    assert memory_besides_attention(training, Split(1, 8), "contiguous").gathered == LENGTH * 8 * 4


def test_the_plan_command_says_once_what_a_run_warns_of() -> None:
    shown = CliRunner().invoke(app, ["plan", f"{__file__}:make", "--seq-len", "64", "--world-size", "8", "--topology", "8xH100"])
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.count("a part without attention runs whole on every rank") == 1
    assert shown.stdout.count("the part that reads what is made at") == 1
    assert "; 1.79 kB sent a rank" in shown.stdout  # 7 of 8 shards of 64 rows of 8 float32


def test_the_plan_command_warns_once_of_what_each_look_finds() -> None:
    """The model is looked at on two ranks, and since it gathers, on four; each look meets a part with other sizes."""
    shown = CliRunner().invoke(app, ["plan", f"{__file__}:shrinking", "--seq-len", "16", "--world-size", "4", "--topology", "8xH100"])
    assert shown.exit_code == 0, shown.stderr
    assert shown.stderr.count("is called with other sizes too") == 1


def shrinking(batch: int, seq_len: int) -> tuple[nn.Module, dict[str, Any]]:
    return Shrinking(), {"x": torch.randn(batch, seq_len, 8)}


def repeated(batch: int, seq_len: int) -> tuple[nn.Module, dict[str, Any]]:
    return BreaksInALoop(), {"x": torch.randn(batch, seq_len, 8)}


def test_the_plan_command_tells_equal_fallbacks_once_with_their_number() -> None:
    asked = "--seq-len", "64", "--world-size", "2", "--topology", "8xH100", "--strategy", "ring"
    listed = json.loads(CliRunner().invoke(app, ["plan", f"{__file__}:repeated", *asked, "--json"]).stdout)["warnings"]
    lines = re.findall(r"^- .*$", CliRunner().invoke(app, ["plan", f"{__file__}:repeated", *asked]).stdout, re.M)
    assert len(lines) == len({json.dumps(each) for each in listed}) < len(listed)
    times = [int(found[1]) if (found := re.search(r"; (\d+) times, each ", line)) else 1 for line in lines]
    assert sum(times) == len(listed)
