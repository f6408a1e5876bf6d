"""From a rewritten program to its tree of blocks: each node goes to the call of the module that made it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from autoseq.html_blocks import Block, Gradients, Item, Picture
from autoseq.html_lines import Rows
from autoseq.html_pairs import Entry, is_gather, paired
from autoseq.node_traffic import NOTHING_SENT, NodeTraffic, Sent
from autoseq.passes.sizes import num_bytes
from autoseq.passes.source import dotted
from autoseq.program import Program


def picture(program: Program, traffic: NodeTraffic) -> Picture:
    """The blocks of a program, unfolded; `traffic` is that of `node_traffic`."""
    entries = paired(program)
    rows = Rows(program, traffic)
    gradients = [entry for entry in entries if _sums_gradients(entry)]
    root = _Open("", "", "")
    blocks: dict[tuple[str, ...], _Open] = {(): root}
    homes: dict[fx.Node, _Open] = {}
    for entry in entries:
        if _sums_gradients(entry) or not _is_shown(entry.node):
            continue
        home = homes[entry.node] = _home(entry, blocks, homes)
        home.items.append(entry)
    summed = [_gradients(entry.node, traffic[entry.node]) for entry in gradients if entry.node in traffic]
    return Picture(_closed(root, rows), tuple(_together(summed)))


def _gradients(node: fx.Node, sent: Sent) -> Gradients:
    val = node.meta["val"]
    values = val if isinstance(val, (list, tuple)) else [val]
    are_parameters = all(x.meta.get("is_parameter") for x in node.all_input_nodes)
    return Gradients(len(values), are_parameters, sum(map(num_bytes, values)), sent)


def _together(gradients: Sequence[Gradients]) -> Iterator[Gradients]:
    """All parameters, then all other values."""
    for are_parameters in (True, False):
        found = [each for each in gradients if each.are_parameters == are_parameters]
        if found:
            counts = sum(each.num_values for each in found), are_parameters, sum(each.num_bytes for each in found)
            yield Gradients(*counts, sum((each.sent for each in found), NOTHING_SENT))


@dataclass(slots=True, eq=False)
class _Open:
    """A block while it is being filled."""

    path: str
    label: str
    kind: str
    items: list["Entry | _Open"] = field(default_factory=list)


def _sums_gradients(entry: Entry) -> bool:
    """A parameter on its way into the graph, whose gradient is summed over ranks."""
    return entry.before is None and getattr(entry.node.target, "__name__", "") in ("vary", "vary_many")


def _is_shown(node: fx.Node) -> bool:
    """Not the sizes, modes, attributes and items of tuples between the operators."""
    val = node.meta.get("val")
    made = isinstance(val, torch.Tensor) or (isinstance(val, (list, tuple)) and any(isinstance(x, torch.Tensor) for x in val))
    return made and node.op == "call_function" and getattr(node.target, "__name__", "") != "getitem"


def _home(entry: Entry, blocks: dict[tuple[str, ...], _Open], homes: Mapping[fx.Node, _Open]) -> _Open:
    """The block of the module call that made a node, opened where it is new. Without one it is the model's own, or the compiler's."""
    user = next(iter(entry.node.users), None) if is_gather(entry.node) else None
    stack = (user if user is not None else entry.node).meta.get("nn_module_stack")
    if not stack and user is None:
        operands = entry.node.all_input_nodes if entry.before is None else []
        return next((homes[x] for x in operands if x in homes), blocks[()])
    keys = tuple(map(str, stack or ()))
    for depth, (path, kind) in enumerate((stack or {}).values(), 1):
        if keys[:depth] not in blocks:
            parent = blocks[keys[: depth - 1]]
            name, of_kind = dotted(path), kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            if not name:
                blocks[keys[:depth]] = parent  # the model itself
                continue
            label = name[len(parent.path) :].lstrip(".") if name.startswith(parent.path) else name
            call = keys[depth - 1].partition("@")[2]
            opened = _Open(name, f"{label}, call {int(call) + 1}" if call.isdigit() else label, of_kind.rpartition(".")[2])
            parent.items.append(opened)
            blocks[keys[:depth]] = opened
    return blocks[keys]


def _closed(block: _Open, rows: "Rows") -> tuple[Item, ...]:
    """The items of a block: entries that belong together become rows."""
    made: list[Item] = []
    together: list[Entry] = []

    def finish() -> None:
        if together:
            made.append(rows.row(together))
            together.clear()

    for item in block.items:
        if isinstance(item, _Open):
            finish()
            made.append(Block(item.path, item.label, item.kind, _closed(item, rows)))
            continue
        if together and not rows.go_together(together[-1], item):
            finish()
        together.append(item)
    finish()
    return tuple(made)
