"""The nodes of the global and of the local graph side by side: what was written, and what one rank computes for it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from autoseq.graph_text import ORIGIN
from autoseq.program import Program
from autoseq.runtime import collectives


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A node of the local graph with that of the global graph, or one of them alone."""

    before: fx.Node | None
    after: fx.Node | None

    @property
    def node(self) -> fx.Node:
        node = self.after if self.after is not None else self.before
        assert node is not None
        return node


def paired(program: Program) -> list[Entry]:
    """The local graph's nodes in order, each with its global one, and behind its predecessor each global one that has none."""
    before = [node for node in program.before.nodes if node.op not in ("placeholder", "output")]
    after = _gathers_last([node for node in program.gm.graph.nodes if node.op not in ("placeholder", "output")])
    by_origin: dict[str, list[fx.Node]] = defaultdict(list)
    for node in after:
        by_origin[node.meta.get(ORIGIN, node.name)].append(node)
    # Of several local nodes the last that computes stands for the global one: others prepare its operands or add up its result.
    local = {node: _representative(by_origin[node.name]) for node in before if node.name in by_origin}
    globals_ = {made: node for node, made in local.items()}
    orphans: dict[fx.Node | None, list[fx.Node]] = defaultdict(list)
    last: fx.Node | None = None
    for node in before:
        if node in local:
            last = local[node]
        else:
            orphans[last].append(node)
    entries = [Entry(node, None) for node in orphans[None]]
    for node in after:
        entries.append(Entry(globals_.get(node), node))
        entries += [Entry(orphan, None) for orphan in orphans[node]]
    return entries


def _gathers_last(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes, each gather of whole values in front of the first step that needs it."""
    ordered: list[fx.Node] = []
    waiting: set[fx.Node] = set()
    for node in nodes:
        if is_gather(node):
            waiting.add(node)
            continue
        needed = [x for x in node.all_input_nodes if x in waiting]
        waiting.difference_update(needed)
        ordered += [*needed, node]
    return [*ordered, *(node for node in nodes if node in waiting)]


def is_gather(node: fx.Node) -> bool:
    return ORIGIN not in node.meta and getattr(node.target, "__name__", "").startswith("all_gather")


def _representative(nodes: Sequence[fx.Node]) -> fx.Node:
    return next((node for node in reversed(nodes) if not is_collective(node)), nodes[-1])


def is_collective(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", "") == collectives.__name__
