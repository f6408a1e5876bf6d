"""The rows of a page and their lines: operators with their values, placements, products, parameters, and what they send."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from autoseq.graph_text import call_text, parameter_name, placement, shown_names, type_text
from autoseq.html_blocks import Line, Parameter, Product, Row, RowKind, Value
from autoseq.html_pairs import Entry, is_collective
from autoseq.node_traffic import NOTHING_SENT, NodeTraffic
from autoseq.passes.shard import Fallback
from autoseq.passes.sizes import hint, num_bytes
from autoseq.passes.source import source_line
from autoseq.program import Program


class Rows:
    """Rows and lines of a program's entries."""

    def __init__(self, program: Program, traffic: NodeTraffic) -> None:
        self._traffic = traffic
        self._names = {**shown_names(program.before), **shown_names(program.gm.graph)}
        self._sites = {planned.site.name: planned for planned in program.plan.sites}
        self._fallbacks: dict[tuple[str, str], list[Fallback]] = defaultdict(list)
        for fallback in program.fallbacks:
            self._fallbacks[fallback.op, fallback.source].append(fallback)
        self._fallback_of: dict[fx.Node, Fallback] = {}
        for node in program.before.nodes:
            if waiting := self._fallbacks.get((str(node.target), source_line(node))):
                self._fallback_of[node] = waiting.pop(0)

    def kind(self, entry: Entry) -> RowKind:
        if "attention" in entry.node.meta:
            return "attention"
        return "message" if entry.after is not None and entry.before is None and is_collective(entry.after) else "compute"

    def go_together(self, a: Entry, b: Entry) -> bool:
        """Operators that send nothing make one row, and so do splits and gathers of the same kind."""
        if self.kind(a) != self.kind(b) or self.kind(a) == "attention" or any(x.before in self._fallback_of for x in (a, b)):
            return False
        if self.kind(a) == "message":
            return a.node.target is b.node.target
        return not any(self._traffic.get(x.node) for x in (a, b))

    def row(self, entries: Sequence[Entry]) -> Row:
        kind = self.kind(entries[0])
        sent = sum((self._traffic.get(entry.node, NOTHING_SENT) for entry in entries), NOTHING_SENT)
        site = self._sites.get(entries[0].node.meta["attention"]["name"]) if kind == "attention" else None
        fallback = next((self._fallback_of[entry.before] for entry in entries if entry.before in self._fallback_of), None)
        return Row(kind, tuple(map(self.line, entries)), sent, site, fallback)

    def line(self, entry: Entry) -> Line:
        node, written = entry.node, entry.before if entry.before is not None else entry.node
        source = source_line(node)
        return Line(
            op=_op_text(entry),
            call=call_text(node, self._names), shape_of_call=call_text(node, _Nameless()),
            source="" if source.startswith("(no") else source,
            before=_value(entry.before), after=_value(entry.after), placement=_placement(entry),
            product_before=product(entry.before), product_after=product(entry.after), parameters=_parameters(written),
        )  # fmt: skip


def _op_text(entry: Entry) -> str:
    """`linear` of what the program says, `take_shard` of what the compiler put there."""
    if "attention" in entry.node.meta:
        return "attention"
    target = entry.node.target if entry.before is None else entry.before.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return str(getattr(target, "__name__", target))


class _Nameless(dict[fx.Node, str]):
    """Calls every node the same."""

    def __missing__(self, node: fx.Node) -> str:
        return "·"


def _value(node: fx.Node | None) -> Value | None:
    val = node.meta.get("val") if node is not None else None
    if isinstance(val, (list, tuple)):
        tensors = [x for x in val if isinstance(x, torch.Tensor)]
        shown = ", ".join(dict.fromkeys(map(type_text, tensors)))
        return Value(f"{len(tensors)} × {shown}" if len(set(map(type_text, tensors))) == 1 else shown, sum(map(num_bytes, tensors)))
    return Value(type_text(val), num_bytes(val)) if isinstance(val, torch.Tensor) else None


def _placement(entry: Entry) -> str:
    """That of the local value; Partial is what the next step adds up over ranks."""
    if entry.after is None:
        return ""
    users = [getattr(user.target, "__name__", "") for user in entry.after.users]
    if users and all(name in ("all_reduce", "reduce_scatter") for name in users):
        return "Partial"
    node = entry.after
    item = next((user for user in node.users if getattr(user.target, "__name__", "") == "getitem"), None)
    return placement(node) or (placement(item) if item is not None else "")


def _parameters(node: fx.Node) -> tuple[Parameter, ...]:
    found = [_parameter(x) for x in node.all_input_nodes]
    return tuple(each for each in found if each is not None)


def _parameter(node: fx.Node) -> Parameter | None:
    if node.op != "placeholder" or not node.meta.get("is_parameter"):
        return None
    value = _value(node)
    assert value is not None
    return Parameter(parameter_name(str(node.meta.get("source_name", node.target))), value, bool(node.meta.get("requires_grad")))


aten = torch.ops.aten
_MATMULS: Mapping[Any, int] = {  # the operand whose last dim is contracted
    aten.linear.default: 0, aten.matmul.default: 0, aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1,
}  # fmt: skip


def product(node: fx.Node | None) -> Product | None:
    """The matrix product that a node is, or None."""
    if node is None or node.target not in _MATMULS:
        return None
    operand = node.args[_MATMULS[node.target]]
    assert isinstance(operand, fx.Node)
    return Product(tuple(hint(size) for size in node.meta["val"].shape), hint(operand.meta["val"].shape[-1]))
