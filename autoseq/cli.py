"""The `autoseq` command: plan, inspect, verify, demo, strategies, topology, doctor.

Results go to stdout, logs to stderr. Exit status: 0 success, 1 failure, 2 misuse. A user's mistake never shows a traceback.
"""

from importlib import metadata
from typing import Annotated

import typer

from autoseq.cli_errors import exit_codes
from autoseq.cli_inspect import inspect
from autoseq.cli_options import Batch, Inner, LayoutName, RanksPerNode, SeqLen, Strategies, TargetText, Verbose, WorldSize
from autoseq.cli_plan import plan
from autoseq.cli_topology import app as topology

app = typer.Typer(
    name="autoseq", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Split a transformer's sequence over ranks with torch.compile, and see what that does.",
    epilog="Start with: autoseq demo",
)  # fmt: skip
app.add_typer(topology, name="topology")
app.command(epilog="Example: autoseq plan hf:examples/llama_4_layers.json --seq-len 65536 --world-size 8 --topology 8xH100")(plan)
app.command(epilog="Example: autoseq inspect examples/plain_gpt.py:tiny --seq-len 4096 --world-size 4 --html out.html")(inspect)


def _version(asked: bool) -> None:
    if asked:
        print(metadata.version("autoseq"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Options of the command itself."""


@app.command(epilog="Example: autoseq verify examples/plain_gpt.py:tiny --seq-len 37 --world-size 3 --strategy ring")
def verify(
    target: TargetText,
    seq_len: SeqLen,
    world_size: WorldSize,
    batch: Batch = 1,
    strategy: Strategies = "auto",
    layout: LayoutName = "auto",
    ranks_per_node: RanksPerNode = None,
    tolerance: Annotated[float, typer.Option("--tolerance", min=0.0, help="Largest relative L2 error that counts as equal.")] = 1e-5,
    inner: Inner = "aot_eager",
    show_all: Annotated[bool, typer.Option("--all", help="Print every parameter, not only the worst few.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead, with every parameter.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run a model on local ranks and on one device, and compare every output and every parameter's gradient."""
    with exit_codes(verbose):
        from autoseq.asked_strategies import parse_asked
        from autoseq.printing import print_verification, results, verification_json
        from autoseq.target import load_target
        from autoseq.verify import Case, verify_target

        load_target(target)  # a mistake in it is found before any process starts
        options = {"strategy": parse_asked(strategy), "layout": layout, "ranks_per_node": ranks_per_node, "inner": inner}
        case = Case(target, batch, seq_len, options)
        found = verify_target(case, world_size)
        if as_json:
            print(verification_json(found, tolerance=tolerance))
        else:
            print_verification(results(), found, tolerance=tolerance, show_all=show_all)
        ok = not found.beyond(tolerance)
    raise typer.Exit(0 if ok else 1)


@app.command(epilog="Example: autoseq demo --world-size 4 --strategy ring")
def demo(
    world_size: WorldSize = 2,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps.")] = 20,
    strategy: Strategies = "auto",
    layout: LayoutName = "auto",
    ranks_per_node: RanksPerNode = None,
    inner: Inner = "aot_eager",
    verbose: Verbose = False,
) -> None:
    """Train a small, unmodified Llama on split sequences and beside it on one device, and compare the two."""
    with exit_codes(verbose):
        from autoseq.asked_strategies import parse_asked
        from autoseq.demo import run_demo
        from autoseq.printing import results

        options = {"strategy": parse_asked(strategy), "layout": layout, "ranks_per_node": ranks_per_node, "inner": inner}
        ok = run_demo(results(), world_size=world_size, steps=steps, options=options)
    raise typer.Exit(0 if ok else 1)


@app.command(epilog="Example: autoseq strategies")
def strategies(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables of docs/strategies.md instead.")] = False,
    verbose: Verbose = False,
) -> None:
    """Show what each strategy sends, which attention it serves, and why it does not serve the rest."""
    with exit_codes(verbose):
        from autoseq.printing import results
        from autoseq.strategy_table import markdown, print_strategies

        if as_markdown:
            print(markdown(), end="")
        else:
            print_strategies(results())


@app.command(epilog="Example: autoseq doctor --json")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    verbose: Verbose = False,
) -> None:
    """Show versions, devices, links and attention kernels, or why they are not there and what to install."""
    with exit_codes(verbose):
        from autoseq.doctor import checkup, checkup_json, print_checkup
        from autoseq.printing import results

        found = checkup()
        if as_json:
            print(checkup_json(found))
        else:
            print_checkup(results(), found)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
