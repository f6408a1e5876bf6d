"""`autoseq topology`: the hardware that plans are made for. List what is known, show one, measure this machine's."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoseq.cli_errors import exit_codes
from autoseq.cli_files import check_writable, write_file
from autoseq.cli_options import Verbose

if TYPE_CHECKING:
    from autoseq.planning.topology import Topology

app = typer.Typer(no_args_is_help=True, help="Show the hardware that plans are made for, or measure this machine's.")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


@app.command("list", epilog="Example: autoseq topology list")
def list_topologies(as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Show the topologies that come with autoseq."""
    with exit_codes(verbose):
        from autoseq.planning.presets import load_topology, names
        from autoseq.printing import results
        from autoseq.topology_report import print_topologies

        if as_json:
            print(json.dumps(names()))
        else:
            print_topologies(results(), [load_topology(name) for name in names()])


@app.command(epilog="Example: autoseq topology show 2x8xA800-4nic --json > mine.json")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="Such as 8xH100, 2x8xA800-4nic, or a JSON file.", show_default=False)],
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show one topology and where its numbers come from; as JSON it is a file to edit and to give to --topology."""
    with exit_codes(verbose):
        from autoseq.planning.presets import load_topology
        from autoseq.planning.topology_file import dump
        from autoseq.printing import results
        from autoseq.topology_report import print_topology

        topology = load_topology(name)
        if as_json:
            print(dump(topology))
        else:
            print_topology(results(), topology)


@app.command(epilog="Example: torchrun --nproc-per-node 8 -m autoseq.cli topology measure -o mine.json")
def measure(
    world_size: Annotated[int | None, typer.Option("--world-size", min=1, help="Local ranks to start, where torchrun does not.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option("--ranks-per-node", min=1, help="Ranks in a node; torchrun says it.")] = None,
    nics: Annotated[int, typer.Option("--nics", min=1, help="Network cards of a node that messages between nodes share.")] = 1,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", help="Time kernels in this dtype; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the JSON here instead of printing it.")] = None,
    verbose: Verbose = False,
) -> None:
    """Time the links and kernels of the running ranks, and write what they can do as a topology."""
    with exit_codes(verbose):
        from autoseq.planning.measure import Request, measure_here, measure_launched, world_of_launcher
        from autoseq.runtime.errors import OptionError

        launched = world_of_launcher()
        if launched and world_size not in (None, launched):
            raise OptionError(f"--world-size {world_size}: this is one of {launched} ranks already (WORLD_SIZE); leave the option out")
        writes = not launched or int(os.environ.get("RANK", "0")) == 0
        if writes:
            check_writable("-o", out)
        world = launched or world_size or 2
        local = os.environ.get("LOCAL_WORLD_SIZE", "")
        request = Request(ranks_per_node or (int(local) if launched and local.isdecimal() else world), nics, tuple(dtype or ()))
        found = measure_launched(request) if launched else measure_here(request, world)
        if writes:
            _deliver(found, out)


def _deliver(found: "Topology", out: Path | None) -> None:
    from autoseq.planning.topology_file import dump
    from autoseq.printing import results
    from autoseq.runtime.errors import OptionError
    from autoseq.topology_report import print_topology

    if out is None:
        print(dump(found))
        return
    try:
        write_file("-o", out, dump(found) + "\n")
    except OptionError:
        print(dump(found))  # so that what took minutes to measure is not lost
        raise
    print_topology(results(), found)
