"""What the command line prints: tables for people, JSON for scripts."""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from rich.console import Console, Group

from autoseq.graph_folding import folded
from autoseq.graph_text import graph_lines, short_source
from autoseq.inspection import Inspection
from autoseq.model_report import beside_json, figures_of, pays_sentence
from autoseq.planner import SitePlan
from autoseq.planning.beside_one_device import Beside
from autoseq.readable import readable_bytes
from autoseq.tables import table
from autoseq.verify import KINDS, Difference, Verification

Graphs = Literal["none", "before", "after", "both"]
_PIPE_WIDTH = 160


def results() -> Console:
    """Where results go: stdout. Tables are as wide as the terminal or COLUMNS says, and a pipe gives them room; other lines stay whole."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(file=sys.stdout, width=width, markup=False, highlight=False, soft_wrap=True)


# Inspect --------------------------------------------------------------------------------------------------------------


def inspection_json(found: Inspection) -> str:
    """One object, as documented: scripts may rely on these names."""
    largest = found.largest_intermediate
    return json.dumps({
        "world_size": found.world_size,
        "sequence_length": found.sequence_length,
        **({"whole": found.whole} if found.whole else {}),
        "attention": [_site_json(site) for site in found.sites],
        "collectives": [{"op": op, "count": c.messages, "bytes_per_rank": c.bytes} for op, c in found.collectives.items()],
        "fallbacks": [{"op": f.op, "source": f.source, "reason": f.reason, "bytes_per_rank": f.bytes_per_rank} for f in found.fallbacks],
        "largest_intermediate": {"shape": list(largest.shape), "bytes": largest.num_bytes},
        "beside_one_device": found.beside and beside_json(found.beside),
    }, indent=2)  # fmt: skip


def _site_json(planned: SitePlan) -> dict[str, Any]:
    named = planned.site
    return {
        "name": named.name, "source": named.source, "heads": named.site.heads, "kv_heads": named.site.kv_heads, "mask": named.mask,
        "strategy": planned.strategy, "bytes_per_rank": site_bytes(planned), "messages_per_rank": site_messages(planned),
        "bytes_of_busiest_rank": planned.offer.sent_bytes,
    }  # fmt: skip


def site_bytes(planned: SitePlan) -> int:
    """Bytes a rank sends for one attention, forward and backward."""
    return planned.cost.forward_bytes + planned.cost.backward_bytes


def site_messages(planned: SitePlan) -> int:
    """Messages a rank sends for one attention, forward and backward."""
    return planned.cost.forward_messages + planned.cost.backward_messages


def print_inspection(console: Console, found: Inspection, graphs: Graphs) -> None:
    """The graphs that are asked for, then everything else that `inspect` found."""
    if found.whole:
        console.print(f"{found.sequence_length:,} tokens on {found.world_size} ranks: nothing is split, every rank runs the whole model.")
        console.print(f"Why: {found.whole}")
        return
    for program in {id(program.gm): program for program in found.programs}.values():  # calls of one part share a graph
        if graphs in ("before", "both"):
            _print_graph(console, "before, its attention and masks already read", program.before)
        if graphs in ("after", "both"):
            _print_graph(console, "after, as rank 0 runs it", program.gm.graph)
    head = ("" if graphs == "none" else "\n") + f"{found.sequence_length:,} tokens on {found.world_size} ranks, layout {found.layout}."
    console.print(f"{head} Bytes and messages are those that rank 0 sends in a training step.")
    console.print(plan_table(found.sites))
    console.print(table(
        "Collectives, forward and backward; the gather of what the model returns comes on top, if it is used",
        ["op", ":count", ":bytes", "in short"],
        [(op, c.messages, f"{c.bytes:,}", readable_bytes(c.bytes)) for op, c in found.collectives.items()] or [("(none)", 0, 0, "")],
    ))  # fmt: skip
    _print_fallbacks(console, found)
    largest = found.largest_intermediate
    shape = " × ".join(map(str, largest.shape))
    console.print(f"Largest intermediate of a rank: {shape}, {largest.num_bytes:,} bytes ({readable_bytes(largest.num_bytes)})")
    if found.beside is not None:
        print_beside(console, found.beside)


def print_beside(console: Console, beside: Beside) -> None:
    """A step of each rank beside one device, and from which length on splitting pays."""
    console.print(table("A step beside one device", ["", ":one device", ":each rank", ""], [each.cells() for each in figures_of(beside)]))
    console.print(pays_sentence(beside.seq_len, beside.ranks, beside.topology, beside.pays_from))


def plan_table(sites: Sequence[SitePlan]) -> Group:
    """The attention sites; those that differ in nothing but a number in their name share a row, wherever they are."""
    groups = grouped(sites, _alike)
    return table(
        f"Attention: {len(sites)} sites",
        ["module", "source", ":heads", ":KV heads", "mask", "strategy", ":bytes each", ":messages each"],
        [
            (names_of(group), short_source(one.site.source), one.site.site.heads, one.site.site.kv_heads, one.site.mask, one.strategy,
             f"{site_bytes(one):,}", site_messages(one))
            for group in groups for one in group[:1]
        ],
    )  # fmt: skip


def grouped(sites: Iterable[SitePlan], key: Callable[[SitePlan], object]) -> list[list[SitePlan]]:
    """Attention sites that are alike, wherever they are, in the order of the first of each."""
    groups: dict[object, list[SitePlan]] = {}
    for planned in sites:
        groups.setdefault(key(planned), []).append(planned)
    return list(groups.values())


def _alike(planned: SitePlan) -> tuple[object, ...]:
    named = planned.site
    return re.sub(r"\d+", "#", re.sub(r"#\d+$", "", named.name)), named.source, named.site, named.mask, planned.strategy, planned.cost


def names_of(group: Sequence[SitePlan]) -> str:
    """`layers.0 … layers.3 (4 ×)`."""
    first, last = group[0].site.name, group[-1].site.name
    return first if len(group) == 1 else f"{first} … {last} ({len(group)} ×)"


def _print_fallbacks(console: Console, found: Inspection) -> None:
    rows = [(f.op, f.source, f.reason, f"{f.bytes_per_rank:,}") for f in found.fallbacks]
    if rows:
        console.print(table("Fallbacks: steps that run on gathered values", ["op", "source", "reason", ":bytes"], rows))
    else:
        console.print("Fallbacks: none")
    dense = [(short_source(m.source), m.reason, f"{m.num_bytes:,}", readable_bytes(m.num_bytes)) for m in found.dense_masks]
    if dense:
        console.print(table("Masks that are held dense", ["source", "reason", ":bytes", "in short"], dense))
    left = [(short_source(each.source), each.reason) for each in found.left_as_written]
    if left:
        console.print(table("Attentions that are left as they are written", ["source", "reason"], left))


def _print_graph(console: Console, title: str, graph: Any) -> None:
    console.print(f"\nGraph {title}:")
    for line in folded(list(graph_lines(graph))):
        console.print(line)


# Verify ---------------------------------------------------------------------------------------------------------------

_WORST_SHOWN = 5


def verification_json(found: Verification, *, tolerance: float) -> str:
    """One object, as documented: scripts may rely on these names. An error is null where it is infinite or no number."""
    values = {
        f"{kind}s": [
            {"name": d.name, "error": d.error if math.isfinite(d.error) else None, "ok": d.error <= tolerance}
            for d in found.differences if d.kind == kind
        ]
        for kind in KINDS
    }  # fmt: skip
    return json.dumps({"ok": not found.beyond(tolerance), "tolerance": tolerance, **values, "report": found.report.as_dict()}, indent=2)


def print_verification(console: Console, found: Verification, *, tolerance: float, show_all: bool) -> None:
    """What was verified, the errors, largest first, and a verdict."""
    console.print(str(found.report))
    for kind in KINDS:
        _print_errors(console, kind, [d for d in found.differences if d.kind == kind], tolerance, show_all=show_all)
    wrong, count = found.beyond(tolerance), len(found.differences)
    if wrong:
        worst = wrong[0]
        console.print(
            f"autoseq verify: FAILED, {len(wrong)} of {count} differ by more than {tolerance:g}; "
            f"the worst is the {worst.kind} {worst.name}, by {worst.error:.2e}"
        )
        return
    largest = max((d.error for d in found.differences), default=0.0)
    outputs = ", ".join(sorted(d.name for d in found.differences if d.kind == "output"))
    console.print(f"\nVerified: the outputs {outputs}, and the gradients of all parameters that have one")
    console.print(f"autoseq verify: OK, {count} values on {found.report.ranks} ranks, largest error {largest:.2e} of {tolerance:g} allowed")


def _print_errors(console: Console, kind: str, found: Sequence[Difference], tolerance: float, *, show_all: bool) -> None:
    wrong = sum(not d.error <= tolerance for d in found)
    shown = found if show_all or kind == "output" else found[: max(_WORST_SHOWN, wrong)]
    left = f", the worst {len(shown)}" if len(shown) < len(found) else ""
    rows = [(d.name, f"{d.error:.2e}", "" if d.error <= tolerance else "above the tolerance") for d in shown]
    console.print(table(f"Relative L2 error of {len(found)} {kind}s{left}", [kind, ":error", ""], rows))
