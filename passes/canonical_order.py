"""An order of a program that does not depend on the order in which Python came to it, for ranks that traced one program differently.

Each process hashes strings in another order, so a forward that walks a set of names traces the same operators in another order on
each rank, with other names, inputs and outputs. Messages follow the graph's order, which has to be the same on all ranks.

    near = cos(a); far = cos(b); out = near * far      and      far = cos(b); near = cos(a); out = near * far
                                    →      cos = cos(a); cos_1 = cos(b); mul = cos * cos_1

Legal because every node stays behind its operands, on its side of every node that writes or whose effects are unknown, and random
draws keep their order. Ranks compare the result: what still differs (sums in another order, draws) is an error there.
"""

import hashlib
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True, slots=True)
class SortedSignature:
    """Where each input and output of a graph stood before they were sorted."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def given(self, inputs: Sequence[Any]) -> list[Any]:
        """Inputs in their order before, in that of the sorted graph."""
        return [inputs[index] for index in self.inputs]

    def around(self, run: Callable[..., Sequence[Any]]) -> Callable[..., list[Any]]:
        """A sorted program as a function of what it was before."""

        def call(*args: Any) -> list[Any]:
            results = run(*self.given(args))
            return [result for _, result in sorted(zip(self.outputs, results, strict=True), key=lambda pair: pair[0])]

        return call


def sort_signature(gm: fx.GraphModule) -> SortedSignature | None:
    """Sort the inputs of Dynamo's graph by their names, sizes first, and its outputs by what computes them.

    None where two outputs read alike: a write or a draw between them may make them differ, so their order could not be told.
    """
    placeholders, output = gm.graph.find_nodes(op="placeholder"), gm.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    texts = _texts(gm.graph)
    made = {result for result in results if isinstance(result, fx.Node)}
    if len({texts[node] for node in made}) < len(made):
        return None
    inputs = sorted(range(len(placeholders)), key=lambda i: (not _is_size(placeholders[i]), placeholders[i].name))
    outputs = sorted(range(len(results)), key=lambda i: texts.get(results[i], repr(results[i])))
    _place(placeholders[index] for index in inputs)
    output.args = (tuple(results[index] for index in outputs),)
    gm.recompile()
    return SortedSignature(tuple(inputs), tuple(outputs))


def _place(placeholders: Iterable[fx.Node]) -> None:
    for before, after in pairwise(placeholders):
        before.append(after)


def _is_size(placeholder: fx.Node) -> bool:
    return isinstance(placeholder.meta.get("example_value"), torch.SymInt)


def _texts(graph: fx.Graph) -> dict[fx.Node, str]:
    """For each node a digest of how it is computed."""
    texts: dict[fx.Node, str] = {}
    for node in graph.nodes:
        operands = fx.map_arg((node.args, node.kwargs), lambda operand: texts[operand])
        text = node.name if node.op == "placeholder" else f"{node.op} {node._pretty_print_target(node.target)} {operands}"
        texts[node] = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    return texts


def sort_nodes(gm: fx.GraphModule) -> int:
    """Sort and name the nodes of a functional ATen graph: each stands just before the first that needs it. Returns how many there are.

    The needs are followed from draws, writes and unknown effects in their own order, then from the outputs.
    """
    computed = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    part, parts = 0, dict[fx.Node, int]()  # a node that writes, or may, ends a part of the program
    roots: list[fx.Node] = []
    for node in computed:
        parts[node] = part
        writes = _may_write(node)
        part += writes
        if writes or _may_draw(node) or node.is_impure():
            roots.append(node)
    order = [node for node in _by_need([*roots, gm.graph.output_node()]) if node in parts]
    _rebuild(gm, sorted(order, key=parts.__getitem__))
    return len(order)


def _by_need(roots: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes that `roots` need, and themselves, each behind its operands in the order of arguments."""
    order: dict[fx.Node, None] = {}
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, has_operands = stack.pop()
        if node in order:
            continue
        if has_operands:
            order[node] = None
        else:
            stack += [(node, True), *((operand, False) for operand in reversed(node.all_input_nodes))]
    return list(order)


def _rebuild(gm: fx.GraphModule, order: Sequence[fx.Node]) -> None:
    """The same graph with its nodes in this order, named by it; what is in no order is dropped."""
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in (*gm.graph.find_nodes(op="placeholder"), *order, gm.graph.output_node()):
        args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
        name = node.name if node.op == "placeholder" else re.sub(r"(_\d+)+$", "", node.name)
        made[node] = graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        made[node].meta = dict(node.meta)
    graph.set_codegen(gm.graph._codegen)
    gm.graph = graph


_DRAWING = {"dropout", "dropout_p", "train", "training", "generator", "use_input_stats", "p"}
"""Arguments of operators that draw random numbers, or update statistics, where their schemas do not say so."""


def _may_draw(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target.namespace == "autoseq" or torch.Tag.nondeterministic_seeded in node.target.tags:
        return True
    return any(x.name in _DRAWING for x in node.target._schema.arguments)


def _may_write(node: fx.Node) -> bool:
    target: Any = node.target
    if node.op == "get_attr":
        return False
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    name = getattr(target, "__name__", "")
    of_numbers = getattr(target, "__module__", "") in ("_operator", "math") and not name.startswith("i") and "item" not in name
    return not (target is operator.getitem or of_numbers or name.startswith("sym_"))
