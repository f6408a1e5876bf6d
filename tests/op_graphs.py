"""One operator in a graph of its own, sharded along any dim of any of its tensors, on all ranks, against the operator itself.

What the table of rules is tested by. The outcome of a rule is written as one letter a dim: `r`, rows stay where they are;
`s`, the ranks' sums are added; `m`, rows move to other ranks; `w`, the dim is gathered and the operator runs whole; `.`, the dim
has size 1.
"""

import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from autoseq.passes.factors import MARK, Mark
from autoseq.passes.find_sequence import carry_moved, carry_shared, node_tensors
from autoseq.passes.shard import shard
from autoseq.runtime import collectives, moves, rows
from autoseq.runtime.layout import Layout
from lockstep import GROUP, run_lockstep

aten = torch.ops.aten
Op = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Start:
    """Where the sequence is said to be: dim `dim`, (outer, sequence, inner), of tensor `tensor` of the operands and results."""

    tensor: int
    dim: int
    length: int
    outer: int = 1
    inner: int = 1
    alone: bool = False  # only this tensor is marked, so `shard` itself must bring the others in line


class OpGraph:
    """A graph that runs `op` on copies of its tensor arguments; the copies are what is marked and sharded."""

    def __init__(self, op: Op, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.graph, self.inputs = fx.Graph(), []
        self._entered: dict[int, fx.Node] = {}
        entered = fx.node.map_aggregate(tuple(args), self._placeholder)
        copies = {node: self._call(aten.clone.default, (node,), node.meta["val"]) for node in list(self.graph.nodes)}
        self.node = self._call(op, fx.map_arg(entered, copies.__getitem__), op(*args, **kwargs), kwargs)
        self.results = [self.node]
        if isinstance(self.node.meta["val"], (list, tuple)):
            self.results = [self._call(operator.getitem, (self.node, i), val) for i, val in enumerate(self.node.meta["val"])]
        self.graph.output(tuple(self.results))
        self.tensors = node_tensors(self.node)

    def _placeholder(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in self._entered:
            node = self._entered[id(x)] = self.graph.placeholder(f"x{len(self.inputs)}")
            node.meta["val"] = x
            self.inputs.append(x)
        return self._entered[id(x)]

    def _call(self, op: Op, args: tuple[Any, ...], val: Any, kwargs: dict[str, Any] | None = None) -> fx.Node:
        node = self.graph.call_function(op, args, kwargs)
        node.meta["val"] = val
        return node

    def mark(self, start: Start) -> None:
        """Mark one tensor, then what the operator's factors carry it to, as `find_sequence` does."""
        self.tensors[start.tensor].meta[MARK] = Mark(start.dim, start.outer, start.inner, start.length)
        if not start.alone:
            carry_shared(self.node, deque())
            carry_moved(self.node, deque())

    def sharded(self, P: int, layout: Layout) -> tuple[str, fx.GraphModule]:
        """The local graph, and the letter of what became of the marked dim."""
        gm = fx.GraphModule({}, self.graph)
        # What can be computed again is not gathered: here it has to be, since it is the local form that is tested.
        with mock.patch("autoseq.passes.placements.Placements.can_be_made_again", return_value=False):
            shard(gm, group=GROUP, group_size=P, layout=layout, gather_outputs=True)
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        targets = {node.target for node in gm.graph.nodes}
        if moves.arrange_rows in targets:
            return "m", gm
        if any(result.target is collectives.all_gather for result in gm.graph.output_node().all_input_nodes):
            return "r", gm
        return ("s" if targets & {collectives.all_reduce, rows.cross_entropy, rows.nll_loss, rows.few_rows} else "w"), gm


def outcome(op: Op, args: Sequence[Any], kwargs: dict[str, Any], P: int = 2, layout: Layout = "contiguous") -> str:
    """What the rule does with each dim, and a check, for each, that outputs and gradients are the whole operator's."""
    whole = OpGraph(op, args, kwargs)
    words = []
    for index, tensor in enumerate(whole.tensors):
        if tensor is None:
            continue
        shape = tensor.meta["val"].shape
        letters = [
            "." if size == 1 else check_start(op, args, kwargs, Start(index, dim, size), P, layout) for dim, size in enumerate(shape)
        ]
        words.append("".join(letters) or "()")
    count = len(words) - len(whole.results)
    return f"{', '.join(words[:count])} -> {', '.join(words[count:])}".strip()


def starts(op: Op, args: Sequence[Any], kwargs: dict[str, Any], *, least: int) -> Iterator[Start]:
    """Every way a sequence of at least `least` rows can lie in one of the operator's tensors, alone or beside the others."""
    for index, tensor in enumerate(OpGraph(op, args, kwargs).tensors):
        for dim, size in enumerate(() if tensor is None else tensor.meta["val"].shape):
            for outer, inner in ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3)):
                length, rest = divmod(size, outer * inner)
                if rest == 0 and length >= least:
                    yield from (Start(index, dim, length, outer, inner, alone) for alone in (False, True))


def check_start(op: Op, args: Sequence[Any], kwargs: dict[str, Any], start: Start, P: int, layout: Layout) -> str:
    """Outputs and gradients on P ranks are those of the whole operator; returns the letter."""
    made = OpGraph(op, args, kwargs)
    made.mark(start)
    letter, gm = made.sharded(P, layout)
    where = f"{op} from {start} on {P} ranks, {layout} ({letter})"
    whole_inputs = [_leaf(x) for x in made.inputs]
    inputs = [[_leaf(x) for _ in range(P)] for x in made.inputs]
    wholes = _plain(op, args, kwargs, {id(x): leaf for x, leaf in zip(made.inputs, whole_inputs, strict=True)})
    locals_ = run_lockstep(gm, inputs, P)
    for whole, values in zip(wholes, locals_, strict=True):
        for value in values:
            assert value.shape == whole.shape and value.dtype == whole.dtype, f"{where}: {value.shape} for {whole.shape}"
            torch.testing.assert_close(value, whole, msg=lambda m: f"{where}: output\n{m}", equal_nan=True)
    check_gradients(wholes, locals_, whole_inputs, inputs, where)
    return letter


def check_gradients(
    wholes: list[Tensor], locals_: list[list[Tensor]], whole_inputs: list[Tensor], inputs: list[list[Tensor]], where: str
) -> None:
    """Every rank's gradient of every input is the whole operator's: replicated, and no factor of P off."""
    wanted = [i for i, whole in enumerate(wholes) if whole.requires_grad]
    if not wanted:
        return
    weights = {i: torch.randn(wholes[i].shape, dtype=wholes[i].dtype) for i in wanted}
    sum((wholes[i] * weights[i]).sum() for i in wanted).backward()
    sum((value * weights[i]).sum() for i in wanted for value in locals_[i]).backward()
    for whole, copies in zip(whole_inputs, inputs, strict=True):
        for copy in copies:
            expected = whole.grad if whole.grad is not None else torch.zeros_like(whole)
            actual = copy.grad if copy.grad is not None else torch.zeros_like(copy)
            torch.testing.assert_close(actual, expected, msg=lambda m: f"{where}: gradient\n{m}")


def _plain(op: Op, args: Sequence[Any], kwargs: dict[str, Any], leaves: dict[int, Tensor]) -> list[Tensor]:
    results = op(*fx.node.map_aggregate(tuple(args), lambda x: leaves.get(id(x), x)), **kwargs)
    return list(results) if isinstance(results, (list, tuple)) else [results]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)
