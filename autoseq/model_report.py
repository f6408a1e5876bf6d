"""What splitting a model's sequence brought: rows, bytes and seconds of a rank beside one device, for `autoseq.report` and the commands.

Bytes that a counting process group has seen are counted, seconds between steps are measured; everything else is predicted from the programs
that run. A report computes and sends nothing, so one rank alone may ask for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from textwrap import wrap
from typing import Any, Literal

from torch import fx, nn

from autoseq.compiled_model import Compiled, CompiledModel, Steps, known_models, name_of, unwrapped
from autoseq.planning.beside_one_device import Beside, beside_one_device
from autoseq.program import READS_BETWEEN, READS_SHARDS, Gathered, Program
from autoseq.progress import counted_names
from autoseq.readable import readable_bytes, readable_seconds
from autoseq.runtime.errors import ReportError
from autoseq.runtime.layout import local_length

How = Literal["exact", "predicted", "counted", "measured"]
Unit = Literal["rows", "bytes", "seconds"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a step, on one device and on the rank, and how it is known. None: it is not known there."""

    what: str
    unit: Unit
    one_device: float | None
    rank: float | None
    how: How

    def cells(self) -> tuple[str, str, str, str]:
        """As a row of a table."""
        return self.what, self._text(self.one_device), self._text(self.rank), self.how

    def _text(self, value: float | None) -> str:
        if value is None:
            return "–"
        return {"rows": f"{value:,.0f}", "bytes": readable_bytes(value), "seconds": readable_seconds(value)}[self.unit]


@dataclass(frozen=True, slots=True)
class Report:
    """What a model has become on `ranks` ranks. `pays_from`: the length in tokens from which on splitting is predicted to be faster."""

    model: str
    ranks: int
    layout: str
    strategies: tuple[tuple[str, int], ...]
    num_programs: int
    num_fallbacks: int
    topology: str
    seq_len: int
    figures: tuple[Figure, ...]
    pays_from: int | None

    def as_dict(self) -> dict[str, Any]:
        """For scripts: plain numbers by names that stay; bytes and seconds, `None` where something is not known."""
        return {
            "model": self.model, "ranks": self.ranks, "layout": self.layout, "strategies": dict(self.strategies),
            "programs": self.num_programs, "fallbacks": self.num_fallbacks, "topology": self.topology, "sequence_length": self.seq_len,
            "figures": _named(self.figures), "pays_from": self.pays_from,
        }  # fmt: skip

    def __str__(self) -> str:
        names = counted_names([name for name, count in self.strategies for _ in range(count)]) if self.strategies else "nothing is split"
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks:,} ranks"
        head = f"{self.model} on {ranks}: {names}" + (f", {self.layout} rows" if self.ranks > 1 else "")
        fallbacks = f"{self.num_fallbacks} fallbacks" if self.num_fallbacks else "no fallbacks"
        programs = "1 program" if self.num_programs == 1 else f"{self.num_programs} programs"
        rows = [("a step", "one device", "each rank", ""), *(each.cells() for each in self.figures)]
        lines = [f"  {what:<28}{one:>12}{rank:>12}  {how}".rstrip() for what, one, rank, how in rows]
        summary = f"{head}, {fallbacks}, {programs}"
        if self.ranks == 1 or not self.figures:
            return summary
        pays = pays_sentence(self.seq_len, self.ranks, self.topology, self.pays_from)
        return "\n".join([summary, *lines, *wrap(pays, 80)])


def pays_sentence(seq_len: int, ranks: int, topology: str, pays_from: int | None) -> str:
    """From which length on splitting pays."""
    if pays_from is None:
        return f"On {topology}, one device is predicted to be faster at every length that was tried; split for memory only."
    shorter = f"with {seq_len:,}" if pays_from > seq_len else "below"
    splitting = f"On {topology}, splitting over {ranks:,} ranks is predicted to pay"
    return f"{splitting} from about {pays_from:,} tokens on; {shorter}, one device is faster."


# A model that runs ----------------------------------------------------------------------------------------------------


def report(model: Any) -> Report:
    """The report of a model, a module or a function that was compiled with this backend and has been called.

    Raises ReportError before its first step, and for what was not compiled.
    """
    found = _found(model)
    steps = found.steps
    programs = [_as_compiled(each) for each in steps.programs]
    ranks, topology = steps.programs[0].ranks, steps.programs[0].topology()
    beside = beside_one_device(programs, ranks=ranks, topology=topology)
    return report_of(found.name, programs, ranks=ranks, topology=topology.name, beside=beside, more=tuple(_observed(steps)))


def report_of(
    name: str, programs: Sequence[Program], *, ranks: int, topology: str, beside: Beside | None, more: tuple[Figure, ...] = ()
) -> Report:  # fmt: skip
    """Of the programs of a step. Of `more` figures, those that are counted take the place of predicted ones."""
    sites = [planned for program in programs for planned in program.plan.sites]
    lengths = [max(each.site.site.q_len, each.site.site.k_len) for each in sites]
    predicted = figures_of(beside) if beside else ()
    counted = {each.what for each in more if each.how == "counted"}
    return Report(
        name, ranks, " and ".join(dict.fromkeys(each.layout for each in sites)), tuple(Counter(each.strategy for each in sites).items()),
        len({id(program.before) for program in programs}), sum(len(program.fallbacks) for program in programs), topology,
        max(lengths, default=0), (*(each for each in predicted if each.what not in counted), *more), beside.pays_from if beside else None,
    )  # fmt: skip


def figures_of(beside: Beside) -> tuple[Figure, ...]:
    """What is known without a run."""
    one, split = beside.one_device, beside.split
    rows = local_length(beside.seq_len, split.split.sequence, split.plan.layout)
    return (
        Figure("rows of a sequence", "rows", beside.seq_len, rows, "exact"),
        Figure("kept for the backward", "bytes", _kept(one.memory), _kept(split.memory), "predicted"),
        Figure("sent", "bytes", 0, split.sent_bytes, "predicted"),
        Figure("seconds", "seconds", one.seconds, split.seconds, "predicted"),
    )


def beside_json(beside: Beside) -> dict[str, Any]:
    """For scripts, by names that stay."""
    figures = _named(figures_of(beside))
    return {"sequence_ranks": beside.ranks, "topology": beside.topology, "pays_from": beside.pays_from, "figures": figures}


def _named(figures: Sequence[Figure]) -> dict[str, Any]:
    return {
        each.what.replace(" ", "_"): {"one_device": each.one_device, "rank": each.rank, "unit": each.unit, "how": each.how}
        for each in figures
    }  # fmt: skip


def _kept(memory: Any) -> int:
    return memory.activations + memory.attention


def _observed(steps: Steps) -> list[Figure]:
    """What the run has shown: bytes of the latest whole step, and how long steps took."""
    found: list[Figure] = []
    for before, after in list(pairwise(steps.sent))[-1:]:
        sent = sum(size for _, size in after.values()) - sum(size for _, size in before.values())
        if sent > 0:
            found.append(Figure("sent", "bytes", 0, sent, "counted"))
    took_s = [after - before for before, after in pairwise(steps.began_s)]
    if took_s:
        found.append(Figure("from step to step", "seconds", None, median(took_s), "measured"))
    return found


def _as_compiled(compiled: Compiled) -> Program:
    graph = fx.Graph()
    graph.output(graph.graph_copy(compiled.local, {}))
    program = replace(compiled.program, gm=fx.GraphModule(compiled.program.gm, graph))
    return replace(program, owned=program.owned_among(program.inputs), gathered=_gathered(program, compiled.ranks))


def _gathered(program: Program, ranks: int) -> tuple[Gathered, ...]:
    """What is gathered between parts, by what a rank sends for it."""
    between = (each.bytes_per_rank for each in program.fallbacks if program.whole or each.op in (READS_SHARDS, READS_BETWEEN))
    return tuple(Gathered(number, sent // (ranks - 1), sent * ranks // (ranks - 1)) for number, sent in enumerate(between) if sent)


def _found(model: Any) -> CompiledModel:
    target = unwrapped(model)
    known = [(other, found) for other, found in known_models() if found.steps.programs]
    for matches in (_is_same, _holds, _is_alike):
        for other, found in known:
            if matches(target, other):
                return found
    raise ReportError(_why_not(model, name_of(target)))


def _is_same(target: Any, other: Any) -> bool:
    return target is other


def _holds(target: Any, other: Any) -> bool:
    """A wrapper of what was compiled, as DDP is one, or what a compiled wrapper holds: a module with all of the other's parameters."""
    if not (isinstance(target, nn.Module) and isinstance(other, nn.Module)):
        return False
    owned = {id(x) for x in other.parameters()}
    return bool(owned) and owned <= {id(x) for x in target.parameters()}


def _is_alike(target: Any, other: Any) -> bool:
    """A model of the same class runs the programs that were compiled for the first of them, unless it has others."""
    return isinstance(target, nn.Module) and type(target) is type(other) and getattr(target, "_compiled_call_impl", None) is not None


def _why_not(model: Any, name: str) -> str:
    is_compiled = hasattr(model, "_orig_mod") or hasattr(model, "_torchdynamo_orig_callable")
    if is_compiled or getattr(model, "_compiled_call_impl", None) is not None:
        return f"{name} has not run yet, so there is nothing to report: ask after its first step (autoseq inspect and plan need none)"
    return (
        f'{name} was not compiled with autoseq: pass what torch.compile(model, backend="autoseq") or autoseq.parallelize(model) returned, '
        "after its first step"
    )
