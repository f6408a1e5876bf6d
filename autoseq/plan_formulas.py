"""The cost model of `autoseq plan` in symbols, for scripts and for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console

from autoseq.planning.time_formulas import exchange_text, phase_formulas, uses_links_together, work_formula
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Strategy
from autoseq.runtime.timeline import WAYS, Way
from autoseq.strategy_table import formula_text


def formulas_json(*, host: bool) -> dict[str, Any]:
    """What `print_formulas` prints: `T_work` of each way, and the phases of each strategy, each so many `times`.

    Where messages inside a node go beside those between nodes, also the phases on one node, where they take the same link. `host`: of a
    topology on which messages need the cores that compute.
    """
    return {
        "T_work": {way: formula_text(work_formula(way)) for way in WAYS},
        "strategies": {name: _strategy(strategy, host) for name, strategy in STRATEGIES.items() if name != "local"},
    }


def _strategy(strategy: Strategy, host: bool) -> dict[str, Any]:
    without_mask = {of: formula_text(formula) for of, formula in strategy.work_formulas().items()}
    return {**{way: _way(strategy, way, host) for way in WAYS}, "without_mask": without_mask}


def _way(strategy: Strategy, way: Way, host: bool) -> dict[str, Any]:
    found = {"phases": _phases(strategy, way, host), "exchanges": list(exchange_text(strategy, way))}
    return found | ({"phases_on_one_node": _phases(strategy, way, host, one_link=True)} if uses_links_together(strategy, way) else {})


def _phases(strategy: Strategy, way: Way, host: bool, *, one_link: bool = False) -> list[dict[str, str]]:
    phases = phase_formulas(strategy, way, one_link=one_link, host=host)
    return [{"times": formula_text(times), "seconds": formula_text(seconds)} for times, seconds in phases]


def print_formulas(out: Console, *, host: bool) -> None:
    """The cost model, strategy by strategy; `host` as for `formulas_json`."""
    found = formulas_json(host=host)
    out.print("\nThe cost model. A pass takes as long as its phases, each so many times; what stands in one Max goes on side by side.")
    out.print("  T_work is what a rank computes by itself, T_… what it sends.")
    if host:
        out.print("  H_… is what sending that takes of the cores that compute: messages · latency + bytes / rate of the host.")
    for way, formula in found["T_work"].items():
        out.print(f"  {way}: T_work = {formula}")
    out.print("  F flops a second of the kernel, which leaves out tile keys at once, L seconds a launch, M bytes a second of memory.")
    out.print("  Of a rank, by the mask: pairs of full and masked blocks, squares on a diagonal and their rows, launches, merged elements;")
    out.print("  and packed, the bytes of buffers that heads or keys are copied into before they travel, or out of afterwards.")
    out.print("  The other letters: autoseq strategies; and j, 1 where it is queries that go round a bidirectional ring, else 0.")
    for name, strategy in found["strategies"].items():
        for way in WAYS:
            out.print(f"\n{name}, {way}:")
            _print_phases(out, strategy[way]["phases"])
            if "phases_on_one_node" in strategy[way]:
                out.print("  and where all ranks are on one node, whose messages share a link:")
                _print_phases(out, strategy[way]["phases_on_one_node"])
            for line in strategy[way]["exchanges"]:
                out.print(f"  {line}")
        work = strategy["without_mask"]
        out.print(f"  without a mask: pairs = {work['pairs']}, kept for the backward {work['kept_bytes']} bytes")


def _print_phases(out: Console, phases: Iterable[Mapping[str, str]]) -> None:
    for phase in phases:
        often = "" if phase["times"] == "1" else f"({phase['times']}) times "
        out.print(f"  {often}{phase['seconds']}")
