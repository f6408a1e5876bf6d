"""Arguments and options that several commands have, so that they mean the same everywhere."""

from typing import Annotated, Literal

import typer

from autoseq.runtime.strategies import STRATEGIES

_TARGET_HELP = (
    "The model: path/file.py:factory or package.module:factory, a function that takes batch and seq_len and returns (model, kwargs); "
    "or hf:PATH to a transformers config.json."
)
TargetText = Annotated[str, typer.Argument(metavar="TARGET", help=_TARGET_HELP, show_default=False)]
SeqLen = Annotated[int, typer.Option("--seq-len", min=1, help="Global length of the sequence, in tokens.", show_default=False)]
WorldSize = Annotated[int, typer.Option("--world-size", min=1, help="Number of ranks.")]
RanksPerNode = Annotated[
    int | None, typer.Option("--ranks-per-node", min=1, help="Cut the ranks into nodes of so many, for two-level strategies.")
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences in a batch.")]
StrategyName = Annotated[str, typer.Option("--strategy", help=f"How attention crosses ranks: auto, {', '.join(STRATEGIES)}.")]
_STRATEGIES_HELP = f"How attention crosses ranks: auto, {', '.join(STRATEGIES)}; or each by its name: '*.5.*=ring,*=halo'."
Strategies = Annotated[str, typer.Option("--strategy", help=_STRATEGIES_HELP)]
LayoutName = Annotated[str, typer.Option("--layout", help="Which rows a rank holds: auto, contiguous or zigzag.")]
Inner = Annotated[Literal["aot_eager", "eager", "inductor"], typer.Option("--inner", help="What compiles the rewritten graph.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what the passes do, and full tracebacks, to stderr.")]
