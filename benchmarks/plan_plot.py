"""The plot of `plan_choice.py`: measured over predicted seconds, a point a candidate; on the line a prediction is exact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plan_results import GOOD, Judged
from plots import pyplot


def plot_choices(found: Sequence[Judged], file: Path) -> None:
    """Write a PNG, one panel a place; the choices are ringed, in red where they are not good. Raises SystemExit without matplotlib."""
    plt = pyplot()
    places = list(dict.fromkeys(each.place for each in found))
    strategies = list(dict.fromkeys(outcome.candidate.strategy for each in found for outcome in each.outcomes))
    columns = min(3, len(places))
    rows = -(-len(places) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5 * columns, 4.6 * rows), squeeze=False)
    for axes, place in zip(grid.flat, places, strict=False):
        here = [each for each in found if each.place == place]
        _panel(axes, here, strategies)
        axes.set(xscale="log", yscale="log", xlabel="predicted seconds", ylabel="measured seconds (median)", title=place.name)
    for axes in grid.flat[len(places) :]:
        axes.set_axis_off()
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.16 / rows, 1, 1))
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _panel(axes, here: Sequence[Judged], strategies: Sequence[str]) -> None:  # noqa: ANN001 (matplotlib's, which is optional)
    for number, name in enumerate(strategies):
        points = [outcome for each in here for outcome in each.outcomes if outcome.candidate.strategy == name]
        axes.scatter(
            [outcome.predicted_s for outcome in points], [outcome.measured_s for outcome in points],
            s=16, color=f"C{number % 10}", marker="o" if number < 10 else "^", label=name,
        )  # fmt: skip
    for good, colour, label in ((True, "black", f"chosen, within {GOOD - 1:.0%} of the fastest"), (False, "red", "chosen, slower")):
        choices = [each.choice for each in here if each.is_good is good]
        if choices:
            x, y = [each.predicted_s for each in choices], [each.measured_s for each in choices]
            axes.scatter(x, y, s=70, facecolors="none", edgecolors=colour, label=label)
    both = [seconds for each in here for outcome in each.outcomes for seconds in (outcome.predicted_s, outcome.measured_s)]
    ends = [min(both) / 1.2, max(both) * 1.2]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.grid(alpha=0.3)
