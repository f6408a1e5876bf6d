"""The predicted step on the clock, and the trace file that shows it."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from autoseq import step_timeline as step_timeline_module
from autoseq.html_timeline import busy, timeline_drawing
from autoseq.inspection import Made, with_programs
from autoseq.node_traffic import node_traffic
from autoseq.options import Options
from autoseq.planning.model_cost import ModelCost, model_cost
from autoseq.planning.presets import load_topology
from autoseq.planning.topology import Topology
from autoseq.planning.training import Split, Training, step_time
from autoseq.program import Program
from autoseq.step_timeline import Span, Timeline, step_timeline
from autoseq.trace_report import trace_json
from inspected_models import make_model, make_one

Step = tuple[Timeline, Program, ModelCost]
TOPOLOGY = load_topology("2x8xA800-4nic")


def step(length: int, P: int, hardware: Topology = TOPOLOGY, make: Callable[[], Made] | None = None, **options: Any) -> Step:
    def look(programs: Sequence[Program]) -> Step:
        cost = model_cost(programs, world_size=P)
        return step_timeline(programs, [node_traffic(each, P) for each in programs], cost, hardware, P), programs[0], cost

    make = make or partial(make_model, "plain", 1, length)
    return with_programs(make, look, world_size=P, options=Options(topology=hardware, **options))


@pytest.fixture(scope="module")
def ring() -> Step:
    return step(64, 4, strategy="ring", layout="contiguous")


def events(timeline: Timeline) -> list[dict[str, Any]]:
    return json.loads(trace_json(timeline))["traceEvents"]


# The clock ------------------------------------------------------------------------------------------------------------


def frozen_but_for_the_last() -> Made:
    model, batch = make_model("plain", 1, 64)
    model.requires_grad_(False)
    model.blocks[-1].requires_grad_(True)  # type: ignore[index]
    return model, batch


SORTS = partial(make_one, lambda y: torch.sort(y, dim=1).values)


@pytest.mark.parametrize(
    ("P", "asked"),
    [
        pytest.param(4, {"length": 64, "strategy": "ring", "layout": "contiguous"}, id="uneven ranks"),
        pytest.param(4, {"length": 16, "make": SORTS, "strategy": "gather_kv"}, id="a step on gathered values"),
        pytest.param(16, {"length": 64, "strategy": "hybrid", "ranks_per_node": 8}, id="two levels"),
        pytest.param(4, {"length": 64, "make": frozen_but_for_the_last, "strategy": "ring"}, id="an attention without a gradient"),
    ],
)
def test_the_step_is_as_long_as_a_plan_says(P: int, asked: dict[str, Any]) -> None:
    timeline, program, cost = step(P=P, **asked)
    sites = tuple(planned.site for planned in program.plan.sites)
    training = Training(sites, cost, batch=1, seq_len=asked["length"])
    predicted = step_time(training, Split(1, P), program.plan, TOPOLOGY.at(P))
    assert timeline.seconds == pytest.approx(predicted.seconds, rel=1e-5)  # plans hold six digits
    assert max(span.start_s + span.seconds for span in timeline.spans) == pytest.approx(timeline.seconds)


def test_every_site_is_attended_forward_then_backward_in_reverse(ring: Step) -> None:
    timeline, program, _ = ring
    names = [planned.site.name for planned in program.plan.sites]
    for rank in timeline.ranks:
        own = sorted((span for span in timeline.spans if span.rank == rank and span.lane == "compute"), key=lambda span: span.start_s)
        seen = [(dict(span.details)["pass"], dict(span.details)["site"]) for span in own if "site" in dict(span.details)]
        assert list(dict.fromkeys(seen)) == [*(("forward", name) for name in names), *(("backward", name) for name in reversed(names))]


def test_uneven_work_shows_as_gaps_of_the_ranks_that_have_less(ring: Step) -> None:
    shares = {each.rank: each.attends for each in busy(ring[0])}
    assert shares[0] < shares[3]  # causal, on contiguous rows
    only_products = replace(TOPOLOGY, launch_s=1e-15, memory_bytes_per_s=1e30, attention_tile=1)
    balanced, _, _ = step(64, 4, only_products, strategy="ring", layout="zigzag")
    zigzag = [each.attends for each in busy(balanced)]
    assert max(zigzag) == pytest.approx(min(zigzag))


def test_two_levels_have_lanes_of_their_own() -> None:
    timeline, _, _ = step(64, 16, strategy="hybrid", ranks_per_node=8)
    assert {"compute", "inside", "across"} <= {span.lane for span in timeline.spans}


def test_a_trace_of_many_ranks_and_layers_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The repeats of a phase are told as one where all attentions together would be too many; nothing takes longer or shorter."""
    whole, program, _ = step(64, 16, strategy="ring", layout="contiguous")
    sites, most = len(program.plan.sites), 512
    monkeypatch.setattr(step_timeline_module, "MOST_SEGMENTS", most)
    folded, _, _ = step(64, 16, strategy="ring", layout="contiguous")
    assert len(attention_spans(whole)) > most >= len(attention_spans(folded)) >= sites * len(folded.ranks) * 2
    assert folded.seconds == pytest.approx(whole.seconds)
    assert sum(each.seconds for each in attention_spans(folded)) == pytest.approx(sum(each.seconds for each in attention_spans(whole)))


def attention_spans(timeline: Timeline) -> list[Span]:
    return [span for span in timeline.spans if "site" in dict(span.details)]


def test_one_rank_only_computes() -> None:
    timeline, _, _ = step(32, 1, strategy="local")
    assert {span.lane for span in timeline.spans} == {"compute"}


# The file -------------------------------------------------------------------------------------------------------------


def test_events_of_a_lane_follow_each_other_and_have_names_and_durations(ring: Step) -> None:
    ends: dict[tuple[int, int], float] = defaultdict(float)
    found = events(ring[0])
    complete = [event for event in found if event["ph"] == "X"]
    assert complete
    for event in complete:
        assert event["ts"] >= ends[event["pid"], event["tid"]] - 1e-9
        assert event["dur"] > 0
        assert event["name"]
        ends[event["pid"], event["tid"]] = event["ts"] + event["dur"]
    named = {(event["pid"], event["tid"]): event["args"]["name"] for event in found if event["name"] == "thread_name"}
    assert set(ends) <= set(named)
    assert {event["args"]["name"] for event in found if event["name"] == "process_name"} == {f"rank {rank} of 4" for rank in range(4)}


def test_rounding_does_not_make_events_overlap() -> None:
    third = 1e-9 / 3
    spans = tuple(Span(0, "compute", str(i), i * third, third) for i in range(9))
    (first, second, third_event) = [event for event in events(Timeline(1, (0,), "t", 9 * third, spans)) if event["ph"] == "X"]
    assert [first["ts"], second["ts"], third_event["ts"]] == pytest.approx([0.0, 0.001, 0.002])
    assert all(event["dur"] == pytest.approx(0.001) for event in (first, second, third_event))


def test_names_of_the_model_are_json_strings() -> None:
    nasty = 'layers."</script>\n\x00'
    timeline = Timeline(1, (0,), nasty, 1.0, (Span(0, "compute", nasty, 0.0, 1.0, (("site", nasty),)),))
    (event,) = [event for event in events(timeline) if event["ph"] == "X"]
    assert (event["name"], event["args"]) == (nasty, {"site": nasty})


def test_the_strip_of_a_page_stays_inside_it_and_merges_what_is_too_short_to_see(ring: Step) -> None:
    spans = tuple(Span(0, "compute", "x", i * 1e-4, 1e-4) for i in range(10_000))
    drawing = timeline_drawing(Timeline(1, (0,), "t", 1.0, spans))
    assert len(drawing.shapes) == 3  # two lanes, and one bar
    paths = [str(shape.geometry[0][1]) for shape in timeline_drawing(ring[0]).shapes if shape.tag == "path"]
    bars = [bar for path in paths for bar in re.findall(r"M([\d.]+) [\d.]+h([\d.]+)", path)]
    assert len(bars) > 8
    assert all(float(x) + float(width) <= 1001 for x, width in bars)
