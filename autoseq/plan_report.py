"""What `autoseq plan` prints and draws: tables for people, JSON for scripts, a plot of a sweep."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from autoseq.model_report import beside_json
from autoseq.plan_call import call_of, lines_of
from autoseq.plan_formulas import formulas_json, print_formulas
from autoseq.plan_model import MEMORY, Planned
from autoseq.planner import SitePlan
from autoseq.planning.beside_one_device import Beside, beside
from autoseq.planning.choice import three_digits
from autoseq.planning.degrees import Candidate
from autoseq.planning.sweep import UNITS, Point, mix, overtakings
from autoseq.planning.training import Training
from autoseq.printing import grouped, names_of, print_beside
from autoseq.program import Warned
from autoseq.readable import readable_bytes, readable_seconds
from autoseq.runtime.errors import OptionError
from autoseq.runtime.strategies import STRATEGIES
from autoseq.tables import table

_SHOWN = 12


def print_plan(out: Console, planned: Planned, *, given: str, formulas: bool) -> None:
    """The plans, what the best consists of, why other strategies lost, and the sweep. `given` is the topology as --topology names it."""
    training, best, topology = planned.training, planned.best, planned.topology
    hardware = topology.at(planned.world_size)
    nodes = f"{hardware.nodes:,} node{'s' if hardware.nodes > 1 else ''} of {hardware.ranks_per_node}"
    free = f", and {readable_bytes(planned.reserved_bytes)} more kept free (--reserve)" if planned.reserved_bytes else ""
    out.print(
        f"{training.batch} × {training.seq_len:,} tokens a step on {planned.world_size:,} ranks of {topology.name} ({nodes}), "
        f"{readable_bytes(topology.memory_bytes)} a rank for a plan{free}. Products in {training.dtype}, as the model has them. "
        "Predicted, not measured."
    )
    _print_plans(out, planned)
    best_beside = _beside(planned)
    if best_beside is not None:
        print_beside(out, best_beside)
    out.print("To run the first, on every rank after init_process_group; `model` has the same weights on all, `dataset` is yours:")
    out.print("\n".join(f"    {line}" for line in lines_of(best, training, given)))
    out.print(table("A step of the first", ["goes into", ":predicted", ":share"], _time_rows(best)))
    out.print(table("Memory of a rank, with the first", ["for", ":bytes", ":in short"], _memory_rows(best)))
    _print_warnings(out, planned)
    _print_sites(out, best)
    if planned.points:
        _print_sweep(out, planned)
    if formulas:
        print_formulas(out, host=planned.topology.host is not None)


def _beside(planned: Planned) -> Beside | None:
    """The first plan beside one device, where it splits sequences."""
    training, best = planned.training, planned.best
    return beside(training, training, best, planned.topology) if best.split.sequence > 1 else None


def _print_plans(out: Console, planned: Planned) -> None:
    shown = planned.candidates[:_SHOWN]
    of_all = f" ({len(shown)} of {len(planned.candidates)})" if len(shown) < len(planned.candidates) else ""
    columns = ["data × sequence", "strategies", "layout", ":step", ":tokens/s", ":MFU", ":sent", ":memory a rank"]
    rows = [*map(_row, shown)]
    if not all(each.fits for each in shown):
        columns = [*columns, "fits"]
        rows = [(*row, "yes" if each.fits else "no") for row, each in zip(rows, shown, strict=True)]
    out.print(table(f"Plans, the fastest that fit first{of_all}", columns, rows))
    meshes = [each.split for each in shown if each.split.mesh]
    legend = "data × sequence: copies of the data × ranks that share a sequence. Sent: by the rank that sends most"
    if meshes:
        (nodes, ranks), whole = meshes[0].mesh, meshes[0]
        in_a_node = whole.sequence <= planned.topology.at(planned.world_size).ranks_per_node
        parts = f"{nodes} parts of a node, each of {ranks} ranks," if in_a_node else f"{nodes} nodes of {ranks} ranks"
        legend += f"; {whole}: of these, {parts} are the mesh of a strategy on two levels"
    dtype = planned.training.dtype
    out.print(f"{legend}. MFU: the model's products, none counted twice, by what the devices could do at their peak in {dtype}.")


def _row(each: Candidate) -> Sequence[object]:
    return (
        each.split, mix(each), each.plan.layout, readable_seconds(each.seconds), f"{each.tokens_per_s:,.0f}", f"{each.mfu:.1%}",
        readable_bytes(each.sent_bytes), readable_bytes(each.memory.total),
    )  # fmt: skip


_TIMES = {
    "attention_s": "attention and its messages", "products_s": "other matrix products", "traffic_s": "other kernels: memory and launches",
    "exchanges_s": "steps that need other rows", "parameters_s": "gradients and parameters",
}  # fmt: skip


def _time_rows(best: Candidate) -> list[Sequence[object]]:
    parts = [(text, getattr(best.time, name)) for name, text in _TIMES.items()]
    return [(text, readable_seconds(seconds), f"{seconds / best.seconds:.0%}") for text, seconds in parts if seconds]


def _memory_rows(best: Candidate) -> list[Sequence[object]]:
    parts = [(text, getattr(best.memory, name)) for name, text in MEMORY.items()]
    return [(text, f"{size:,}", readable_bytes(size)) for text, size in parts if size]


def _print_warnings(out: Console, planned: Planned) -> None:
    """What a run of the model warns of, with the bytes that the first plan sends and holds for it."""
    if planned.best.split.sequence > 1 and planned.training.warnings:
        out.print("\nA run warns of what costs it dearly; the numbers above count all of it:")
        for each, count in Counter(planned.training.warnings).items():
            sizes = (sent_for(each, planned.best), "sent a rank"), (each.held_bytes, "held")
            told = [f"{readable_bytes(size)} {what}" for size, what in sizes if size]
            often = f"; {count} times" + (", each" if told else "") if count > 1 else ";" if told else ""
            out.print(f"- {each.what}{often} {'; '.join(told)}".rstrip())


def sent_for(warned: Warned, best: Candidate) -> int:
    """What a rank sends where each copy of the data gathers its own."""
    P = best.split.sequence
    return warned.gathered_bytes // best.split.data * (P - 1) // P


def _print_sites(out: Console, best: Candidate) -> None:
    """Sites that are alike share their lines, wherever they are."""
    for group in grouped(best.plan.sites, lambda p: (p.site.site, p.site.ways, p.strategy)):
        one = group[0]
        seconds = f"{readable_seconds(one.seconds)} a step each, {readable_bytes(one.offer.sent_bytes)} sent"
        out.print(f"\n{names_of(group)}, mask {one.site.mask}: {one.strategy}, {seconds}." + (" Not taken:" if one.losers else ""))
        by_reason: dict[str, list[str]] = {}
        for name, reason in one.losers:
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            out.print(f"  {', '.join(names)}: {reason}")
    for layout, reason in best.plan.refused:
        out.print(f"\nLayout {layout} was not taken: {reason}")


def _print_sweep(out: Console, planned: Planned) -> None:
    names = [name for name in STRATEGIES if any(point.seconds.get(name) is not None for point in planned.points)]
    header = UNITS[planned.over or "seq-len"]
    columns = [f":{header}", "strategies", "data × sequence", ":step", ":tokens/s", ":MFU"]
    out.print(table("Sweep: the first plan", columns, [_sweep_row(point) for point in planned.points]))
    for start in range(0, len(planned.points) if names else 0, _POINTS_A_TABLE):
        points = planned.points[start : start + _POINTS_A_TABLE]
        rows = [(name, *(_alone(point.alone[name]) for point in points)) for name in names]
        title = f"Sweep: a step with all attention by one strategy, and its data × sequence, by {header}"
        out.print(table(title, ["strategy", *(f":{point.value:,}" for point in points)], rows))
    for point in planned.points:
        if point.best is None:
            out.print(f"{point.value:,} {header}: {point.why_not}")
    if any(_is_tied(point) for point in planned.points):
        out.print(_TIES)
    found = overtakings(planned.points)
    for value, before, after in found:
        point = next(point for point in planned.points if point.value == value)
        as_long = ", which takes as long there" if before in _as_fast(point) else ""
        out.print(f"From {value:,} {header} on: {after} (before: {before}{as_long})")
    if not found:
        out.print("No strategy overtakes another.")


_TIES = (
    "Attentions that take as long in three digits go to what sends less, then to contiguous rows: a step\n"
    "with one strategy everywhere may take as long as the plan, or a hair less (docs/planner.md, Ties)."
)


def _as_fast(point: Point) -> list[str]:
    """The strategies with which, for all attention, a step takes no longer than the plan."""
    if point.best is None:
        return []
    longest = three_digits(point.best.seconds)
    return [name for name, seconds in point.seconds.items() if seconds is not None and three_digits(seconds) <= longest]


def _is_tied(point: Point) -> bool:
    """Whether one strategy for all attention is not slower than the plan, which has others."""
    return point.best is not None and any(set(point.best.strategies) != {name} for name in _as_fast(point))


_POINTS_A_TABLE = 5  # what 100 columns have room for


def _alone(found: Candidate | None) -> str:
    return "–" if found is None else f"{readable_seconds(found.seconds)}\n{found.split.data} × {found.split.sequence}"


def _sweep_row(point: Point) -> Sequence[object]:
    best = point.best
    if best is None:
        return (f"{point.value:,}", "no plan", "", "", "", "")
    return (f"{point.value:,}", mix(best), best.split, readable_seconds(best.seconds), f"{best.tokens_per_s:,.0f}", f"{best.mfu:.1%}")


# JSON -----------------------------------------------------------------------------------------------------------------


def plan_json(planned: Planned, *, given: str, formulas: bool) -> str:
    """One object, as documented: scripts may rely on these names. `given`: see `print_plan`. `formulas`: with the cost model in symbols."""
    training = planned.training
    return json.dumps({
        "world_size": planned.world_size, "batch": training.batch, "sequence_length": training.seq_len,
        "dtype": training.dtype,
        "topology": planned.topology.name, "memory_limit_bytes": planned.topology.memory_bytes, "reserved_bytes": planned.reserved_bytes,
        "warnings": [
            {"what": each.what, "bytes_per_rank": sent_for(each, planned.best), "held_bytes": each.held_bytes}
            for each in training.warnings if planned.best.split.sequence > 1
        ],
        "call": call_of(planned.best, given), "lines": lines_of(planned.best, training, given),
        "beside_one_device": (found := _beside(planned)) and beside_json(found),
        "plans": [_candidate_json(each) for each in planned.candidates],
        "attention": [
            {
                "name": p.site.name, "mask": p.site.mask, "strategy": p.strategy, "seconds": p.seconds,
                "bytes_of_busiest_rank": p.offer.sent_bytes,
                "losers": [_loser_json(p, name, reason) for name, reason in p.losers],
            }
            for p in planned.best.plan.sites
        ],
        "sweep": {
            "over": planned.over,
            "points": [
                {
                    "value": point.value, "best": point.best and _candidate_json(point.best),
                    "why_not": point.why_not or None, "seconds": point.seconds,
                    "degrees": {name: found and [found.split.data, found.split.sequence] for name, found in point.alone.items()},
                }
                for point in planned.points
            ],
            "overtakings": [{"value": value, "before": old, "after": new} for value, old, new in overtakings(planned.points)],
        } if planned.over else None,
        **({"formulas": formulas_json(host=planned.topology.host is not None)} if formulas else {}),
    }, indent=2)  # fmt: skip


def _loser_json(planned: SitePlan, name: str, reason: str) -> dict[str, Any]:
    """With the seconds, and the layout and the mesh with which it is fastest, if it could serve."""
    found = planned.best_offer(name)
    seconds, layout, mesh = (None, None, None) if found is None else (found.offer.seconds, found.layout, list(found.mesh))
    return {"strategy": name, "seconds": seconds, "layout": layout, "mesh": mesh, "reason": reason}


def _candidate_json(each: Candidate) -> dict[str, Any]:
    return {
        "data": each.split.data, "sequence": each.split.sequence, "mesh": list(each.split.mesh), "layout": each.plan.layout,
        "strategies": each.strategies, "step_seconds": each.seconds, "tokens_per_s": each.tokens_per_s, "mfu": each.mfu,
        "bytes_of_busiest_rank": each.sent_bytes, "memory_bytes": each.memory.total, "fits": each.fits,
        "seconds": {name: getattr(each.time, name) for name in each.time.__dataclass_fields__},
        "memory": {name: getattr(each.memory, name) for name in each.memory.__dataclass_fields__},
        "layouts_not_taken": [{"layout": layout, "reason": reason} for layout, reason in each.plan.refused],
    }  # fmt: skip


# The plot -------------------------------------------------------------------------------------------------------------


def check_plot(path: Path) -> None:
    """Raises OptionError, before anything is calculated, without matplotlib, or for a kind of file that it does not draw."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise OptionError("--plot needs matplotlib: pip install 'autoseq[plot]'") from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in kinds:
        raise OptionError(f"--plot {path}: {path.suffix} is no kind of picture that can be drawn; take .png, .svg or .pdf")


def plot_sweep(planned: Planned, path: Path) -> None:
    """A step's seconds by length or ranks, a line for each strategy. Raises OptionError if the file cannot be written."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=[colormaps["tab20"](i / 19) for i in range(20)])
    for name in STRATEGIES:
        line = [(point.value, seconds) for point in planned.points if (seconds := point.seconds.get(name)) is not None]
        if line:
            axes.plot(*zip(*line, strict=True), marker="o", markersize=3, linewidth=1, label=name)
    best = [(point.value, point.best.seconds) for point in planned.points if point.best is not None]
    axes.plot(*zip(*best, strict=True), color="black", linewidth=3, alpha=0.3, label="the plan")
    axes.set(xscale="log", yscale="log", xlabel={"seq-len": "tokens of a sequence", "world-size": "ranks"}[planned.over or "seq-len"])
    axes.set_xscale("log", base=2)
    axes.set_ylabel("predicted seconds a step")
    axes.set_title(f"{_what(planned.training)} on {planned.topology.name}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OptionError(f"--plot {path}: {error}") from error


def _what(training: Training) -> str:
    return f"{training.cost.parameters / 1e6:,.3g} million parameters, {len(training.sites)} attentions, batch {training.batch}"
