"""`autoseq.report`: what splitting brought beside one device, for each way to compile, before and after a step, in parts, counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoseq
from autoseq import ReportError
from autoseq.model_report import Figure, Report, pays_sentence
from ranks import run_ranks

OPTIONS = {"inner": "aot_eager", "strategy": "ulysses", "layout": "contiguous", "topology": "8xH100"}


class Tiny(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.breaks = nn.Linear(16, 16), nn.Linear(16, 16), breaks

    def attend(self, x: Tensor) -> Tensor:
        q = x.unflatten(2, (4, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(self.first(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.attend(self.second(x)).sum()


@autoseq.sequence_parallel(**OPTIONS)
class Decorated(Tiny):
    """By the decorator."""


def by_compile(model: Tiny) -> Any:
    return torch.compile(model, backend="autoseq", options=OPTIONS)


def by_parallelize(model: Tiny) -> Any:
    return autoseq.parallelize(model, **OPTIONS)


WAYS: dict[str, Callable[[], Any]] = {
    "torch.compile": lambda: by_compile(Tiny()), "parallelize": lambda: by_parallelize(Tiny()), "the decorator": Decorated
}  # fmt: skip


def step(model: Any, length: int = 12) -> None:
    model(torch.ones(1, length, 16)).backward()


def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize("way", WAYS)
def test_before_the_first_step_it_says_when_to_ask(way: str) -> None:
    with pytest.raises(ReportError, match=r"has not run yet, so there is nothing to report: ask after its first step"):
        autoseq.report(WAYS[way]())


def test_what_was_not_compiled_is_an_error_that_says_what_to_pass() -> None:
    with pytest.raises(ReportError, match=r'Linear was not compiled with autoseq: pass what torch\.compile\(model, backend="autoseq"\)'):
        autoseq.report(nn.Linear(2, 2))


def test_one_rank_has_nothing_beside_one_device() -> None:
    fresh()
    model = by_compile(Tiny())
    step(model)
    found = autoseq.report(model)
    assert (found.ranks, found.strategies, found.figures, found.pays_from) == (1, (("ulysses", 2),), (), None)
    assert str(found) == "Tiny on 1 rank: ulysses, no fallbacks, 1 program"


def test_models_are_told_apart_under_a_function_that_dynamo_leaves_out() -> None:
    fresh()
    models = [by_compile(Tiny()), by_compile(Tiny(breaks=True))]
    train = torch.compiler.disable(lambda: [step(model) for model in models])
    train()
    assert [(found.model, found.num_programs) for found in map(autoseq.report, models)] == [("Tiny", 1), ("Tiny", 2)]


def report_each_way(rank: int, P: int) -> dict[str, dict[str, Any]]:
    found = {}
    for name, make in WAYS.items():
        fresh()
        model = make()
        step(model)
        found[name] = autoseq.report(model).as_dict()
    inner = Tiny()
    model = nn.Sequential(by_compile(inner))
    step(model)
    found["the model inside"], found["a wrapper around"] = autoseq.report(inner).as_dict(), autoseq.report(model).as_dict()
    return found


def test_each_way_to_compile_has_a_report_on_every_rank() -> None:
    of_ranks = run_ranks(report_each_way, 2)
    for found in of_ranks:
        for report in found.values():
            assert (report["ranks"], report["strategies"], report["programs"]) == (2, {"ulysses": 2}, 1)
            rows = report["figures"]["rows_of_a_sequence"]
            assert (rows["one_device"], rows["rank"], rows["how"]) == (12, 6, "exact")
            assert report["figures"]["seconds"]["how"] == "predicted"
            assert json.loads(json.dumps(report)) == report
    assert of_ranks[0] == of_ranks[1], "nothing is measured after one step"


def report_steps(rank: int, P: int, breaks: bool) -> tuple[Report, str]:
    fresh()
    model = by_compile(Tiny(breaks))
    step(model)
    first = autoseq.report(model)
    for _ in range(2):
        step(model)
    return first, str(autoseq.report(model))


def figure(found: Report, what: str) -> Figure:
    return next(each for each in found.figures if each.what == what)


def test_bytes_are_counted_where_a_group_counts_them_and_equal_those_predicted() -> None:
    first, shown = run_ranks(report_steps, 2, False, backend="autoseq_counted")[0]
    predicted = figure(first, "sent")
    assert predicted.how == "predicted"
    lines = {line.split("  ")[1]: line for line in shown.splitlines() if line.startswith("  ")}
    assert lines["sent"].endswith("counted")
    assert figure(first, "sent").cells()[2] in lines["sent"], "as many bytes, to three digits"
    assert lines["from step to step"].endswith("measured")


def test_a_model_in_parts_has_one_report_that_counts_what_is_gathered_between_them() -> None:
    (whole, _), (parts, _) = (run_ranks(report_steps, 2, breaks, backend="autoseq_counted")[0] for breaks in (False, True))
    assert (whole.num_programs, parts.num_programs, whole.num_fallbacks, parts.num_fallbacks) == (1, 2, 0, 1)
    sent = figure(parts, "sent").rank
    gathered = 6 * 16 * 4  # the other rank gets the rows of the activation between the parts
    assert sent is not None and sent - (figure(whole, "sent").rank or 0) >= gathered


def report_alone(rank: int, P: int) -> str:
    fresh()
    model = by_compile(Tiny())
    step(model)
    return str(autoseq.report(model)) if rank == 1 else ""


def test_one_rank_alone_may_ask_and_lines_fit_80_columns() -> None:
    shown = run_ranks(report_alone, 2)[1]
    assert max(map(len, shown.splitlines())) <= 80
    head, columns, rows, *_ = shown.splitlines()
    assert head == "Tiny on 2 ranks: ulysses, contiguous rows, no fallbacks, 1 program"
    assert columns.split() == ["a", "step", "one", "device", "each", "rank"]
    assert rows.split() == ["rows", "of", "a", "sequence", "12", "6", "exact"]
    assert "splitting over 2 ranks is predicted to pay" in shown


@pytest.mark.parametrize(
    ("pays_from", "message"),
    [
        (1024, "to pay from about 1,024 tokens on; below, one device is faster."),
        (8192, "to pay from about 8,192 tokens on; with 4,096, one device is faster."),
        (None, "one device is predicted to be faster at every length that was tried; split for memory only."),
    ],
)
def test_it_says_below_which_length_splitting_does_not_pay(pays_from: int | None, message: str) -> None:
    assert pays_sentence(4096, 8, "8xH100", pays_from).endswith(message)
