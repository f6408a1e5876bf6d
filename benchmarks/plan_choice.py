"""Does the planner choose well? Predicted and measured seconds of every strategy, side by side, where the ranks really run.

    sudo python benchmarks/plan_choice.py --json out.json --plot out.png
    sudo python benchmarks/plan_choice.py --only 2x2 --only gqa --rate 100mbit --seq-len 1024

In each place (this machine's loopback; nodes of an emulated slow network, `slow_network.py`) the ranks first time their own links and
kernels as `autoseq topology measure` does. Then, for each attention, the planner predicts forward and backward with every strategy on
what was measured, and chooses; and every strategy is timed, all in turn, round after round. Judged is what a plan is for: whether the
choice is the fastest or nearly, and whether the predicted order is right wherever times clearly differ. Times depend on what else the
machine does, and so do the verdicts, but not the exit status: 0 if everything ran, 1 if something could not, 2 for misuse. A place that
fails is told and left out. Long steps are timed in fewer rounds, so that all of it takes under half an hour.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table

from autoseq.runtime.errors import AutoSeqError, did_you_mean
from autoseq.runtime.layout import grain
from autoseq.runtime.strategies import STRATEGIES
from plan_cases import ATTENTIONS, LEAST_ROUNDS, LOCAL, Asked, Place, run_place
from plan_plot import plot_choices
from plan_results import Judged, judge, summary, table
from rank_processes import RankFailed, run_ranks
from slow_network import RATES, NetworkError, SlowNetwork, bits_per_s, why_not
from work import Work

_SHOWN = 5
"""Of the pairs that were predicted the other way round."""

_Lengths = Annotated[list[int], typer.Option("--seq-len", help="Tokens; give it several times.")]
_Rates = Annotated[list[str], typer.Option("--rate", help="Of the links between emulated nodes; give it several times. Needs root.")]
_Layouts = Annotated[list[str], typer.Option("--nodes", help="Nodes x ranks on each, on the emulated network; give it several times.")]
_Worlds = Annotated[list[int], typer.Option("--world-size", help="Ranks on this machine's loopback; give it several times.")]
_ONLY = f"A place ({LOCAL}, or as in --nodes), an attention ({', '.join(ATTENTIONS)}) or a strategy; give it several times. All by default."


def main(
    seq_len: _Lengths = [512, 1024, 2048],  # noqa: B006 (typer's way)
    rate: _Rates = ["100mbit", "500mbit"],  # noqa: B006 (typer's way)
    nodes: _Layouts = ["2x2", "4x1"],  # noqa: B006 (typer's way)
    world_size: _Worlds = [2, 4],  # noqa: B006 (typer's way)
    only: Annotated[list[str] | None, typer.Option(help=_ONLY)] = None,
    head_dim: int = 64,
    window: Annotated[int, typer.Option(help="Keys a row sees in window attention, itself included.")] = 256,
    rounds: Annotated[int, typer.Option(help="Timed steps of each strategy, at most.")] = 15,
    seconds: Annotated[float, typer.Option(help=f"For the rounds of an attention; {LEAST_ROUNDS} there are in any case.")] = 10.0,
    check: Annotated[bool, typer.Option(help="Hold every strategy's numbers to one device's first.")] = True,
    quick: Annotated[bool, typer.Option(help="Time links and kernels so briefly that it only shows whether everything runs.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Rewritten after each place.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="A PNG; needs matplotlib.")] = None,
) -> None:
    """Predict and measure every strategy in every place, for every attention and length."""
    console, errors = Console(width=150), Console(stderr=True, width=150)
    wanted = only or []
    if complaint := _complaint(seq_len, rate, nodes, world_size, rounds, wanted):
        typer.echo(complaint, err=True)
        raise SystemExit(2)
    places = _matching(_places(rate, nodes, world_size), wanted, lambda place: place.kind)
    names = _matching(list(ATTENTIONS), wanted, lambda name: name)
    named = [(name, Work(n, head_dim=head_dim, window=window, **ATTENTIONS[name])) for name in names for n in seq_len]
    strategies = tuple(name for name in wanted if name in STRATEGIES and name != LOCAL)  # "local" is a place here
    asked = Asked(tuple(work for _, work in named), strategies, rounds, seconds, quick, check)
    if (reason := why_not()) and any(place.rate for place in places):
        errors.print(f"no slow network can be emulated here: {reason}. What needs one is left out.", highlight=False)
        places = [place for place in places if not place.rate]
    found: list[Judged] = []
    reports: list[dict[str, Any]] = []
    for place in places:
        console.print(f"\n{place.name}: timing links and kernels, then {len(named)} attentions", highlight=False)
        try:
            judged, report = _run(place, named, asked)
        except (NetworkError, RankFailed, AutoSeqError) as error:
            typer.echo(f"{place.name}: {error}", err=True)
            continue
        found += judged
        reports.append(report)
        _print(console, judged)
        if json_file is not None:
            json_file.write_text(json.dumps(_as_json(reports, found), indent=1))
    if found:
        if plot_file is not None:
            plot_choices(found, plot_file)
        console.print("\n" + summary(found).line(), highlight=False)
        typer.echo("\n" + table(found))
    if not found or len(reports) < len(places):
        raise SystemExit(1)


def _run(place: Place, named: Sequence[tuple[str, Work]], asked: Asked) -> tuple[list[Judged], dict[str, Any]]:
    """One place, judged and as JSON. Raises NetworkError or what its ranks fail with."""
    before, start = os.getloadavg()[0], time.perf_counter()
    with SlowNetwork(place.nodes, place.rate) if place.rate else nullcontext() as network:
        per_rank = run_ranks(run_place, place.world_size, asked, network=network, ranks_per_node=place.ranks_per_node)
    judged = judge(place, named, per_rank)
    report = {
        "name": place.name, "nodes": place.nodes, "ranks_per_node": place.ranks_per_node, "rate": place.rate or None,
        "load_before": before, "load_after": os.getloadavg()[0],
        "seconds": time.perf_counter() - start, "measuring_s": per_rank[0]["measuring_s"],
        "topology": json.loads(per_rank[0]["topology"]), "attentions": [each.as_json() for each in judged],
    }  # fmt: skip
    return judged, report


def _as_json(reports: Sequence[dict[str, Any]], found: Sequence[Judged]) -> dict[str, Any]:
    total = summary(found)
    machine = {"cpus": os.cpu_count(), "torch": torch.__version__}
    return {"machine": machine, "places": reports, "summary": {name: getattr(total, name) for name in total.__dataclass_fields__}}


# What to run ---------------------------------------------------------------------------------------------------------


def _places(rates: Sequence[str], nodes: Sequence[str], world_sizes: Sequence[int]) -> list[Place]:
    shapes = [each.split("x") for each in nodes]
    return [Place(1, P) for P in world_sizes] + [Place(int(N), int(R), rate) for N, R in shapes for rate in rates]


_T = TypeVar("_T")


def _matching(all_of_them: list[_T], wanted: Sequence[str], label: Callable[[_T], str]) -> list[_T]:
    """Those that are asked for; all, if nothing of their sort is."""
    return [each for each in all_of_them if label(each) in wanted] or all_of_them


def _complaint(
    seq_len: Sequence[int], rates: Sequence[str], nodes: Sequence[str], world_sizes: Sequence[int], rounds: int, only: Sequence[str]
) -> str | None:
    """What of the options makes no sense, or None."""
    if wrong := [rate for rate in rates if not bits_per_s(rate)]:
        return RATES.format(wrong[0])
    if wrong := [shape for shape in nodes if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape)]:
        return f"--nodes is written as in 2x2 or 4x1, nodes x ranks on each, not {wrong[0]!r}"
    places = _places(rates, nodes, world_sizes)
    if alone := [place for place in places if place.world_size < 2]:
        return f"{alone[0].name}: there is nothing to choose on fewer than 2 ranks"
    if rounds < 1:
        return f"--rounds must be 1 or more, not {rounds}"
    known = [*dict.fromkeys(place.kind for place in places), *ATTENTIONS, *(name for name in STRATEGIES if name != "local")]
    if unknown := [name for name in only if name not in known]:
        return f"there is no {unknown[0]!r} to run{did_you_mean(unknown[0], known)}; there are {', '.join(known)}"
    for place in places:
        if uneven := [n for n in seq_len if n % grain(place.world_size, "zigzag")]:
            return f"--seq-len must be a multiple of {grain(place.world_size, 'zigzag')} on {place.world_size} ranks; {uneven[0]} is not"
    return None


# What is printed -----------------------------------------------------------------------------------------------------


def _print(console: Console, judged: Sequence[Judged]) -> None:
    for each in judged:
        console.print(_heading(each), _table(each), *_notes(each), sep="\n", highlight=False)
    console.print(f"{judged[0].place.name}: {summary(judged).line()}", highlight=False)


def _heading(each: Judged) -> str:
    work = each.work
    mask = f"window of {work.window}" if work.mask == "window" else work.mask
    shape = f"{work.seq_len:,} tokens, {work.heads} heads of {work.head_dim}, {work.kv_heads} KV heads, {work.dtype}, {mask}"
    return f"\n{each.place.name}, {each.attention}: {shape}"


def _table(each: Judged) -> Table:
    names = "predicted", "measured", "measured ÷ predicted", "÷ fastest", "work", "messages", "forward", "forward measured"
    table = Table("", "rows", *names)
    for column in table.columns[2:]:
        column.justify = "right"
    for outcome in each.outcomes:
        parts = outcome.parts_s
        work, messages = (parts[f"forward_{part}_s"] + parts[f"backward_{part}_s"] for part in ("work", "message"))
        marks = " ".join(word for word, is_it in (("chosen", outcome is each.choice), ("fastest", outcome is each.fastest)) if is_it)
        table.add_row(
            f"{outcome.candidate.strategy} [dim]{marks}[/dim]" if marks else outcome.candidate.strategy, outcome.candidate.layout,
            _ms(outcome.predicted_s), _ms(outcome.measured_s), f"{outcome.measured_s / outcome.predicted_s:.2f}×",
            f"{outcome.times(each.fastest):.2f}×", _ms(work), _ms(messages), _ms(parts["forward_s"]), _ms(outcome.forward_s),
        )  # fmt: skip
    return table


def _notes(each: Judged) -> list[str]:
    """The verdict, and the pairs that were most clearly predicted the other way round."""
    wrong = sorted((pair for pair in each.pairs if not pair.agrees), key=lambda pair: -pair.measured / pair.predicted)
    right = f"{len(each.pairs) - len(wrong)} of {len(each.pairs)} differing pairs in the predicted order"
    lines = [f"chosen: {each.choice.name}, {each.over_fastest:.2f}× of the fastest; {right}"]
    lines += [
        f"  {pair.slower} took {pair.measured:.2f}× of {pair.faster}, predicted {pair.predicted:.2f}×; "
        f"it took longer in {pair.rounds:.0%} of rounds"
        for pair in wrong[:_SHOWN]
    ]
    return lines + ([f"  and {len(wrong) - _SHOWN} more, which --json tells"] if len(wrong) > _SHOWN else [])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


if __name__ == "__main__":
    typer.run(main)
