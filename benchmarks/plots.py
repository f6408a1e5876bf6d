"""The plot of `strategies.py`: step time over length for each contender, and each one's time as a multiple of its floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from results import Comparison, Result


def plot(found: Sequence[Comparison], file: Path) -> None:
    """Write a PNG. Raises SystemExit where matplotlib is absent."""
    plt = pyplot()
    figure, (times, ratios) = plt.subplots(1, 2, figsize=(13, 5))
    names = dict.fromkeys(result.name for each in found for result in each.results if not result.why_not)
    for i, name in enumerate(names):
        style: dict[str, Any] = {"label": name, "marker": "o", "color": f"C{i % 10}", "linestyle": _LINES.get(_kind(found, name), "-")}
        times.plot(*_points(found, name, lambda result: result.step_s), **style)
        ratios.plot(*_points(found, name, lambda result: result.over_floor), **style)
    times.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds a step (median)", title=_title(found[0]))
    ratios.set(xscale="log", xlabel="tokens", ylabel="times its floor", title="step ÷ max(compute, bytes ÷ bandwidth)")
    for axes in (times, ratios):
        axes.set_xticks([each.work.seq_len for each in found], [f"{each.work.seq_len:,}" for each in found], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    ratios.axhline(1.0, color="black", linewidth=0.8)
    times.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib's, for files only. Raises SystemExit where it is absent."""
    try:
        import matplotlib  # pyright: ignore[reportMissingImports] (optional)
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports] (optional)

    return plt


_LINES = {"peer": "--", "one device": ":"}


def _kind(found: Sequence[Comparison], name: str) -> str:
    return next(result.kind for each in found for result in each.results if result.name == name)


def _points(
    found: Sequence[Comparison], name: str, value: Callable[[Result], float | None]
) -> tuple[list[int], list[float]]:
    pairs = [(each.work.seq_len, value(result)) for each in found for result in each.results if result.name == name and not result.why_not]
    known = [(tokens, number) for tokens, number in pairs if number is not None]
    return [tokens for tokens, _ in known], [number for _, number in known]


def _title(one: Comparison) -> str:
    where = "" if one.nodes is None else f" on {one.nodes} nodes, {(one.link_bytes_per_s or 0) / 1e6:.0f} MB/s"
    return f"{one.world_size} ranks{where}, {one.work.heads} heads of {one.work.head_dim}, {one.work.kv_heads} KV heads"
