"""`autoseq inspect`: what would become of a model, as tables, as a page, or as a timeline. Needs no peers, GPU or weights."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from autoseq.cli_errors import exit_codes
from autoseq.cli_files import check_writable, write_file
from autoseq.cli_options import Batch, LayoutName, RanksPerNode, SeqLen, Strategies, TargetText, Verbose, WorldSize

_TOPOLOGY_HELP = "The hardware to plan for: a name (autoseq topology list), a JSON file, or here, the default: this machine."
_HTML_HELP = "Write a page that shows the model before and after, block by block; any browser shows it, without a network."
_TRACE_HELP = "Write the predicted timeline of a step, for ui.perfetto.dev."


def inspect(
    target: TargetText,
    seq_len: SeqLen,
    world_size: WorldSize,
    batch: Batch = 1,
    strategy: Strategies = "auto",
    layout: LayoutName = "auto",
    ranks_per_node: RanksPerNode = None,
    topology: Annotated[str | None, typer.Option("--topology", metavar="NAME|FILE|here", help=_TOPOLOGY_HELP, show_default=False)] = None,
    graph: Annotated[
        Literal["none", "before", "after", "both"] | None,
        typer.Option("--graph", help="Which graph to print, before the summary; after, unless a file is written.", show_default=False),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help=_HTML_HELP, show_default=False)] = None,
    trace: Annotated[Path | None, typer.Option("--trace", metavar="FILE", help=_TRACE_HELP, show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead, without graphs.")] = False,
    verbose: Verbose = False,
) -> None:
    """Show what autoseq would do to a model: its attention, its communication, its graph. Needs no peers, GPU or weights."""
    with exit_codes(verbose):
        from autoseq.asked_strategies import parse_asked
        from autoseq.inspection import inspect_programs
        from autoseq.options import Options
        from autoseq.printing import inspection_json, print_inspection, results
        from autoseq.target import load_target

        files = {"--html": html, "--trace": trace}
        for option, path in files.items():
            check_writable(option, path)
        make = partial(load_target(target).make, batch=batch, seq_len=seq_len)
        options = Options(strategy=parse_asked(strategy), layout=layout, ranks_per_node=ranks_per_node, topology=topology)
        if html is None and trace is None:
            found = inspect_programs(make, seq_len=seq_len, world_size=world_size, options=options, beside=True)
        else:
            from autoseq.html_report import html_page, inspect_pictures
            from autoseq.trace_report import trace_json

            pictured = inspect_pictures(make, seq_len=seq_len, world_size=world_size, options=options)
            found = pictured.inspection
            if html is not None:
                write_file("--html", html, html_page(pictured, target))
            if trace is not None:
                write_file("--trace", trace, trace_json(pictured.timeline))
        if as_json:
            print(inspection_json(found))
            return
        written = [path for path in files.values() if path is not None]
        print_inspection(results(), found, graph or ("none" if written else "after"))
        for path in written:
            results().print(f"Wrote {path}")
