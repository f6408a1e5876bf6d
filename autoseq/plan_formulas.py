"""The cost model of `autoseq plan` in symbols, for scripts."""

from __future__ import annotations

from typing import Any

from autoseq.planning.time_formulas import exchange_text, phase_formulas, uses_links_together, work_formula
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Strategy
from autoseq.runtime.timeline import WAYS, Way
from autoseq.strategy_table import formula_text


def formulas_json(*, host: bool) -> dict[str, Any]:
    """What `--formulas` prints: `T_work` of each way, and the phases of each strategy, each so many `times`.

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
