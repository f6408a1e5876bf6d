"""`autoseq plan`: what would be fastest on some hardware, how fast, and why. Needs no peers, GPU or weights."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from autoseq.cli_errors import exit_codes
from autoseq.cli_files import check_writable
from autoseq.cli_options import Batch, LayoutName, SeqLen, StrategyName, TargetText, Verbose, WorldSize

if TYPE_CHECKING:
    from autoseq.planning.topology import Topology

_TOPOLOGY_HELP = "The hardware: a name such as 8xH100 or 2x8xA800-4nic (autoseq topology list), a JSON file, or here: this machine."

_RESERVE_HELP = "Share of the memory that stays free: for CUDA's context, the buffers of NCCL, and what the allocator cannot use."


def plan(
    target: TargetText,
    seq_len: SeqLen,
    topology: Annotated[str | None, typer.Option("--topology", metavar="NAME|FILE|here", help=_TOPOLOGY_HELP, show_default=False)] = None,
    world_size: WorldSize = 8,
    batch: Batch = 1,
    strategy: StrategyName = "auto",
    layout: LayoutName = "auto",
    memory_gib: Annotated[float | None, typer.Option("--memory-gib", min=0.001, help="Memory of a rank, if not the topology's.")] = None,
    reserve: Annotated[float, typer.Option("--reserve", min=0.0, max=0.9, help=_RESERVE_HELP)] = 0.05,
    shard_parameters: Annotated[bool, typer.Option("--shard-parameters", help="Parameters, gradients and moments as under FSDP.")] = False,
    sweep: Annotated[Literal["seq-len", "world-size"] | None, typer.Option("--sweep", help="Ask for other lengths or fewer ranks.")] = None,
    formulas: Annotated[bool, typer.Option("--formulas", help="Print the cost model in symbols.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the sweep into this file (PNG, SVG or PDF).")] = None,
    verbose: Verbose = False,
) -> None:
    """Predict a training step on any hardware: degrees, strategies, seconds, tokens a second, MFU, bytes and memory."""
    with exit_codes(verbose):
        from autoseq.options import Options
        from autoseq.plan_model import looks_at, plan_training
        from autoseq.plan_report import check_plot, plan_json, plot_sweep, print_plan
        from autoseq.printing import results
        from autoseq.runtime.errors import OptionError
        from autoseq.target import load_target

        if plot is not None and sweep is None:
            raise OptionError("--plot draws a sweep; add --sweep seq-len or --sweep world-size")
        check_writable("--plot", plot)
        if memory_gib is not None and not math.isfinite(memory_gib * 2**30):
            raise OptionError(f"--memory-gib {memory_gib}: this is no number of GiB; leave it out for the topology's memory")
        if plot is not None:
            check_plot(plot)
        if "=" in strategy:
            raise OptionError("a plan has one --strategy for all attentions, or chooses for each; autoseq inspect takes PATTERN=STRATEGY")
        Options(strategy=strategy, layout=layout)
        hardware = _hardware(topology, world_size)
        hardware.at(world_size)
        factory = load_target(target)

        def make(length: int) -> Any:
            return factory.make(batch=batch, seq_len=length)

        found = plan_training(
            looks_at(make, batch=batch, seq_len=seq_len, shard_parameters=shard_parameters), seq_len=seq_len, world_size=world_size,
            topology=hardware, strategy=strategy, layout=layout, memory_gib=memory_gib, reserve=reserve, over=sweep,
        )
        if as_json:
            print(plan_json(found, given=str(topology), formulas=formulas))
        else:
            print_plan(results(), found, given=str(topology), formulas=formulas)
        if plot is not None:
            plot_sweep(found, plot)


def _hardware(given: str | None, world_size: int) -> "Topology":
    from autoseq.planning.found import found_topology
    from autoseq.planning.presets import FORMS, HERE, load_topology, names
    from autoseq.runtime.errors import OptionError

    if given is None:
        known = ", ".join(names())
        raise OptionError(f"which hardware to plan for? --topology is {HERE} for this machine, one of {known}, or {FORMS}")
    return found_topology(world_size) if given == HERE else load_topology(given)
