"""`benchmarks/plan_choice.py`: it runs where ranks are, its verdicts follow from the times, and it refuses what makes no sense."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autoseq.planning.choice import three_digits
from autoseq.planning.presets import load_topology
from autoseq.planning.topology_file import parse_topology
from autoseq.runtime.strategies import STRATEGIES
from plan_cases import Asked, Candidate, Place, candidates, choice, more_rounds, prediction, slowest_rank
from plan_choice import main
from plan_results import judge, summary, table
from rank_processes import RankFailed, Seat
from slow_network import why_not
from work import Work

WHY_NOT = why_not()
needs_network = pytest.mark.skipif(WHY_NOT is not None, reason=f"no slow network can be emulated here: {WHY_NOT}")
WORK = Work(64, heads=8, kv_heads=2, head_dim=16)
FOUR = Seat(rank=0, world_size=4, node=0, ranks_per_node=2, on_network=True)
TWO = Seat(rank=0, world_size=2, node=0, ranks_per_node=1, on_network=True)
HARDWARE = load_topology("2x8xA800-4nic")


@needs_network
def test_ranks_measure_predict_choose_and_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    only = ["2x1", "gqa", "ring", "ulysses", "double_ring"]
    main(seq_len=[64], rate=["400mbit"], nodes=["2x1"], only=only, head_dim=16, rounds=2, quick=True, json_file=file, plot_file=picture)
    written, printed = json.loads(file.read_text()), capsys.readouterr().out
    (place,) = written["places"]
    topology = parse_topology(json.dumps(place["topology"]), "the report")
    assert (topology.ranks_per_node, topology.nodes) == (1, 2) and topology.between is not None
    (found,) = place["attentions"]
    outcomes = {Candidate(**outcome["candidate"]): outcome for outcome in found["outcomes"]}
    chosen = Candidate(**found["chosen"])
    assert {each.strategy for each in outcomes} == {"ring", "ulysses", chosen.strategy}
    assert found["why_not"]["double_ring"] == STRATEGIES["double_ring"].cannot_serve(WORK.site(), 2)
    assert [each for each in candidates(WORK, TWO, chosen.layout) if each in outcomes] == sorted(outcomes, key=_as_registered)
    for candidate, outcome in outcomes.items():
        assert candidate.strategy in printed
        assert len(outcome["rounds_s"]) == 2 and 0 < outcome["forward_s"] < sum(outcome["rounds_s"])
        assert outcome["predicted_s"] == prediction(candidate, WORK, TWO, topology)["predicted_s"]
        assert three_digits(outcome["predicted_s"]) >= three_digits(outcomes[chosen]["predicted_s"])
    assert f"\n{int(found['is_good'])} of 1 choices are the fastest measured or within 10% of it" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def _as_registered(candidate: Candidate) -> tuple[int, bool]:
    return list(STRATEGIES).index(candidate.strategy), candidate.layout == "zigzag"


def test_a_place_that_is_called_like_a_strategy_picks_no_strategy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Any, ...]] = []

    def run(fn: Any, world_size: int, job: Any, **where: Any) -> None:
        asked.append((world_size, job.strategies, where["ranks_per_node"], where["network"], [work.heads for work in job.works]))
        raise RankFailed("a rank is tired")

    monkeypatch.setattr("plan_choice.run_ranks", run)
    with pytest.raises(SystemExit) as ended:
        main(seq_len=[64], world_size=[2], only=["local", "gqa", "ring"])
    assert ended.value.code == 1 and asked == [(2, ("ring",), 2, None, [8])]
    assert "local, 2 ranks: a rank is tired" in capsys.readouterr().err


def test_without_a_network_the_rest_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plan_choice.why_not", lambda: "there are no namespaces here")
    with pytest.raises(SystemExit) as ended:
        main(seq_len=[64], only=["4x1"])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "no slow network can be emulated here: there are no namespaces here. What needs one is left out." in " ".join(told.split())


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_every_strategy_that_serves_is_a_candidate(mask: Any) -> None:
    work = Work(256, heads=8, kv_heads=8, head_dim=16, mask=mask)
    planned, layout = choice(work, FOUR, HARDWARE)
    found = candidates(work, FOUR, layout)
    assert Candidate(planned.strategy, layout) in found and len(set(found)) == len(found)
    able = [name for name, each in STRATEGIES.items() if name != "local" and each.cannot_serve(work.site(FOUR.mesh), 4) is None]
    assert list(dict.fromkeys(each.strategy for each in found)) == able
    for offer in planned.offers:
        assert prediction(Candidate(offer.strategy, layout), work, FOUR, HARDWARE)["predicted_s"] == offer.seconds


def test_a_round_takes_as_long_as_its_slowest_rank() -> None:
    assert slowest_rank([[(3.0, 1.0), (2.0, 0.5)], [(2.0, 1.5), (4.0, 0.1)]]) == [(3.0, 1.5), (4.0, 0.5)]


def record(strategy: str, predicted_s: float, seconds: list[float]) -> dict[str, Any]:
    times = [(step, step / 3) for step in seconds]
    return {"strategy": strategy, "layout": "zigzag", "predicted_s": predicted_s, "forward_s": 1.0, "seconds": times}


def judged(chosen: str, *records: dict[str, Any]) -> Any:
    works = [{"chosen": {"strategy": chosen, "layout": "zigzag"}, "candidates": list(records), "why_not": {"halo": "no window"}}]
    (found,) = judge(Place(2, 2, "1mbit"), [("gqa", WORK)], [{"works": works}])
    return found


def test_the_verdicts_are_of_ratios_within_rounds() -> None:
    """A round in which the machine is slow slows everything; medians of single rounds would mislead."""
    ring = record("ring", 2.0, [1.0, 10.0, 1.0])
    found = judged("ulysses", ring, record("ulysses", 1.0, [1.05, 10.5, 1.05]), record("gather_kv", 1.5, [2.0, 8.0, 2.2]))
    assert [outcome.candidate.strategy for outcome in found.outcomes] == ["ulysses", "gather_kv", "ring"]
    assert (found.choice.candidate.strategy, found.fastest.candidate.strategy) == ("ulysses", "ring")
    assert found.over_fastest == pytest.approx(1.05) and found.is_good
    pairs = {(pair.faster, pair.slower): pair.agrees for pair in found.pairs}
    assert pairs == {("ulysses, zigzag", "gather_kv, zigzag"): True, ("ring, zigzag", "gather_kv, zigzag"): False}
    assert found.as_json()["differing_pairs"][0] == {
        "faster": "ulysses, zigzag", "slower": "gather_kv, zigzag", "measured": pytest.approx(2 / 1.05), "predicted": 1.5,
        "rounds": pytest.approx(2 / 3), "agrees": True,
    }  # fmt: skip


def test_a_choice_that_is_slower_by_more_than_a_tenth_is_not_good() -> None:
    good, bad = (judged("ring", record("ring", 1.0, [taken]), record("ulysses", 2.0, [1.0])) for taken in (1.09, 1.11))
    assert good.is_good and not bad.is_good and not good.pairs
    both = summary([good, bad])
    assert (both.attentions, both.good, both.worst_over_fastest, both.differing_pairs) == (2, 1, pytest.approx(1.11), 0)
    assert both.line().startswith("1 of 2 choices")


def test_pairs_the_other_way_round_are_told_apart_by_how_steadily_they_differ() -> None:
    """All of them count as disagreeing; how many differ so in nearly every round is told beside that."""
    ring = record("ring", 1.0, [2.0, 2.0, 2.0, 2.0, 2.0])
    steady, unsteady = record("ulysses", 2.0, [1.0, 1.0, 1.0, 1.0, 3.0]), record("gather_kv", 3.0, [1.0, 1.0, 1.0, 3.0, 3.0])
    total = summary([judged("ring", ring, steady, unsteady)])
    assert (total.differing_pairs, total.agreeing, total.steadily_disagreeing) == (2, 0, 1)
    assert "0 of 2 pairs whose times differ by over 20% (1 of the others differ so in 80% of rounds)" in total.line()


def test_the_table_has_a_line_for_each_place() -> None:
    good = judged("ring", record("ring", 1.0, [1.0]), record("ulysses", 2.0, [3.0]))
    bad = judged("ring", record("ring", 1.0, [2.0]), record("ulysses", 2.0, [1.0]))
    elsewhere = replace(bad, place=Place(1, 2))
    head, line, *rows = table([good, bad, elsewhere]).splitlines()
    assert head.count("|") == line.count("|") == 8
    assert rows == [
        "| 2x2 at 1mbit | 64 | 1 of 2 | 2.00× (gqa, 64) | 1 of 2 | 1 | 1.57 |",
        "| local, 2 ranks | 64 | 0 of 1 | 2.00× (gqa, 64) | 0 of 1 | 1 | 2.00 |",
    ]


@pytest.mark.parametrize(
    ("done", "taken_s", "more"),
    [
        pytest.param(0, 0.0, True, id="the first"),
        pytest.param(2, 99.0, True, id="a few in any case"),
        pytest.param(3, 99.0, False, id="no more when the time is up"),
        pytest.param(3, 9.0, True, id="more while there is time"),
        pytest.param(15, 0.1, False, id="no more than asked for"),
    ],
)
def test_long_steps_are_timed_in_fewer_rounds(done: int, taken_s: float, more: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: None)
    asked = Asked((), (), rounds=15, seconds=10.0, quick=False, check=False)
    assert more_rounds(done, taken_s, asked) == more
    assert not more_rounds(2, 0.0, replace(asked, rounds=2)), "asked for less than a few"


def test_a_place_that_fails_does_not_keep_the_others_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(place: Place, named: Any, asked: Any) -> Any:
        if place.world_size == 2:
            raise RankFailed("a rank is tired")
        parts = {f"{way}_{part}_s": 1.0 for way in ("forward", "backward") for part in ("work", "message")}
        found = replace(judged("ring", record("ring", 1.0, [1.0]) | parts), place=place)
        return [found], {"name": place.name}

    monkeypatch.setattr("plan_choice._run", run)
    file = tmp_path / "out.json"
    with pytest.raises(SystemExit) as ended:
        main(seq_len=[64], world_size=[2, 4], only=["local", "gqa"], json_file=file)
    assert ended.value.code == 1, "something could not run"
    told = capsys.readouterr()
    assert "local, 2 ranks: a rank is tired" in told.err
    assert "| local, 4 ranks | 64 | 1 of 1 |" in told.out
    assert [place["name"] for place in json.loads(file.read_text())["places"]] == ["local, 4 ranks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(only=["rings"]), "there is no 'rings' to run (did you mean 'ring'?); there are local, 2x2, 4x1, mha, gqa, window, ulysses, "),
        (dict(nodes=["2by2"]), "--nodes is written as in 2x2 or 4x1, nodes x ranks on each, not '2by2'"),
        (dict(nodes=["1x1"]), "1x1 at 100mbit: there is nothing to choose on fewer than 2 ranks"),
        (dict(rate=["fast"]), "a rate is written as in 200mbit or 1.5gbit, not 'fast'"),
        (dict(seq_len=[60]), "--seq-len must be a multiple of 8 on 4 ranks; 60 is not"),
        (dict(rounds=0), "--rounds must be 1 or more, not 0"),
    ],
    ids=["a name", "a shape", "too few ranks", "a rate", "a length", "no rounds"],
)
def test_misuse(arguments: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(**arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
