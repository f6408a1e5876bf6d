"""Every strategy beside what a user would pick instead: step time, bytes, messages and peak memory, in one run.

    python benchmarks/strategies.py --world-size 2 --seq-len 2048 --seq-len 4096
    sudo python benchmarks/strategies.py --network 200mbit --nodes 2 --ranks-per-node 2 --json out.json --plot out.png

A step is the forward and backward of one attention; before anything is timed its numbers are held to one device's. Times are medians
of rounds in which all contenders take turns, ratios are medians of ratios within a round. On a machine that others use, read the
ratios; bytes and messages are exact, memory to within a buffer that a finished message had not let go of yet. With `--network` the
ranks sit on an emulated slow network (`slow_network.py`) and each time is set against its floor, `max(compute, bytes / bandwidth)`.
`--layers N` times a whole compiled Llama instead.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from autoseq.runtime.errors import AutoSeqError
from autoseq.runtime.layout import grain
from autoseq.runtime.strategies import STRATEGIES
from measuring import measure
from model_steps import measure_model
from peers import PEERS
from plots import plot
from rank_processes import RankFailed, run_ranks
from results import Comparison, compare
from slow_network import RATES, NetworkError, SlowNetwork, bits_per_s
from work import DTYPES, TOLERANCE, MaskKind, Work

_LINK_SECONDS = 0.4  # of the exchange that measures a link


def main(
    seq_len: Annotated[list[int], typer.Option(help="Tokens; give it several times.")] = [2048, 4096],  # noqa: B006 (typer's way)
    world_size: Annotated[int, typer.Option(help="Ranks, where there is no --network.")] = 2,
    heads: int = 8,
    kv_heads: Annotated[int, typer.Option(help="0 means as many as heads.")] = 0,
    head_dim: int = 64,
    batch: int = 1,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "float32",
    mask: Annotated[MaskKind, typer.Option()] = "causal",
    window: Annotated[int, typer.Option(help="Keys a row sees with --mask window, itself included.")] = 256,
    only: Annotated[list[str] | None, typer.Option(help="A strategy or peer by name; give it several times. All by default.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of each contender.")] = 5,
    network: Annotated[str, typer.Option(help="Rate of the links of an emulated network, such as 200mbit. Needs root.")] = "",
    nodes: Annotated[int, typer.Option(help="Nodes of the network.")] = 2,
    ranks_per_node: Annotated[int, typer.Option(help="Ranks on each of them.")] = 1,
    layers: Annotated[int, typer.Option(help="Time a Llama of so many layers, compiled, instead of one attention.")] = 0,
    check: Annotated[bool, typer.Option(help="Hold every contender's numbers to one device's first.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="A PNG; needs matplotlib.")] = None,
) -> None:
    """Measure all contenders at every length."""
    P = nodes * ranks_per_node if network else world_size
    works = [Work(n, heads, kv_heads or heads, head_dim, batch, dtype, mask, window) for n in seq_len]
    if complaint := _complaint(works, P, only or [], network):
        typer.echo(complaint, err=True)
        raise SystemExit(2)
    console, found = Console(width=150), []
    try:
        with SlowNetwork(nodes, network) if network else nullcontext() as slow:
            link_bytes = int((bits_per_s(network) or 0) / 8 * _LINK_SECONDS) // 4 * 4
            for work in works:
                job = (measure_model, work, layers, rounds) if layers else (measure, work, tuple(only or ()), rounds, link_bytes, check)
                per_rank = run_ranks(job[0], P, *job[1:], network=slow, ranks_per_node=ranks_per_node if network else 1)
                found.append(compare(work, P, nodes if network else None, per_rank))
                console.print(_heading(found[-1]), _table(found[-1]), _reasons(found[-1]), sep="\n", highlight=False)
    except (NetworkError, RankFailed, AutoSeqError) as error:
        typer.echo(str(error), err=True)
        raise SystemExit(1) from None
    if json_file is not None:
        machine = {"cpus": os.cpu_count(), "torch": torch.__version__, "network": network}
        json_file.write_text(json.dumps({"machine": machine, "lengths": [each.as_json() for each in found]}, indent=1))
    if plot_file is not None:
        plot(found, plot_file)


def _complaint(works: list[Work], P: int, only: list[str], network: str) -> str | None:
    """What of the options makes no sense, or None."""
    if network and not bits_per_s(network):
        return RATES.format(network)
    if works[0].dtype not in TOLERANCE:
        return f"--dtype is one of {', '.join(TOLERANCE)}, not {works[0].dtype!r}"
    known = [*(name for name in STRATEGIES if name != "local"), *PEERS]
    if unknown := [name for name in only if name not in known]:
        return f"there is nothing called {unknown[0]!r} to measure; there are {', '.join(known)}"
    if works[0].heads % works[0].kv_heads:
        return f"--heads {works[0].heads} is not a multiple of --kv-heads {works[0].kv_heads}"
    uneven = [work.seq_len for work in works if work.seq_len % grain(P, "zigzag")]
    if uneven:
        return f"--seq-len must be a multiple of {grain(P, 'zigzag')} on {P} ranks, so that peers can take part; {uneven[0]} is not"
    return None


def _heading(found: Comparison) -> str:
    work, nodes = found.work, found.nodes
    mask = f"window of {work.window}" if work.mask == "window" else {"none": "no mask", "causal": "causal"}[work.mask]
    where = "" if nodes is None else f", {nodes} nodes of {found.world_size // nodes}"
    shape = f"{work.seq_len:,} tokens, {work.heads} heads of {work.head_dim}, {work.kv_heads} KV heads, {work.dtype}, {mask}"
    compute = "" if found.compute_s is None else f"; a rank's share computes in {found.compute_s:.3f} s"
    speed = "" if found.link_bytes_per_s is None else f"; a link carries {found.link_bytes_per_s / 1e6:.1f} MB/s each way"
    return f"\n{shape}; {found.world_size} ranks{where}{compute}{speed}"


def _table(found: Comparison) -> Table:
    table = Table("", "rows", "step", "÷ best peer", "transfer", "floor", "÷ floor", "sent", "messages", "on the link", "peak memory")
    for column in table.columns[2:]:
        column.justify = "right"
    for result in found.results:
        if not result.why_not:
            table.add_row(
                result.name, result.layout or "", _seconds(result.step_s), _times(result.over_peer), _seconds(result.transfer_s),
                _seconds(result.floor_s), _times(result.over_floor), f"{result.bytes:,}", str(result.messages),
                _megabytes(result.link_bytes), _megabytes(result.peak_bytes),
            )  # fmt: skip
    return table


def _reasons(found: Comparison) -> str:
    return "\n".join(f"{result.name}: {result.why_not}" for result in found.results if result.why_not)


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _seconds(number: float | None) -> str:
    return "" if number is None else f"{number:.3f} s"


def _megabytes(number: int | None) -> str:
    return "" if number is None else f"{number / 1e6:,.1f} MB"


if __name__ == "__main__":
    typer.run(main)
