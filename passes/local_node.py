"""One node on local rows: what `shard` emits for an operator whose sharded factor passes or is summed.

Operands that hold the factor come by rows, the others whole and varied; sizes shrink along the sequence; a contraction over
local rows is summed over ranks. It is the `LocalEmitter` that a rule with its own local form writes through.
"""

from collections.abc import Callable
from typing import Any

from torch import fx

from autoseq.passes.factors import MARK, Factors, Mark, Place, Size, operand_at, place_in, tensor_operands
from autoseq.passes.placements import Placements
from autoseq.passes.rules import Rule
from autoseq.runtime import collectives, rows
from autoseq.runtime.layout import local_length


class LocalNode:
    """Emits one node's local form."""

    def __init__(self, placements: Placements, node: fx.Node, factors: Factors, rule: Rule, place: Place) -> None:
        self.placements, self.node, self.factors, self.rule, self.place = placements, node, factors, rule, place
        self.paths = tensor_operands(node)
        self.args, self.kwargs = self._local_arguments()

    def run(self) -> tuple[fx.Node, Any]:
        """The local node and where the sequence lies in its result (a tuple for several results)."""
        marks = tuple(place_in(dims, self.factors.sizes, self.place) for dims in self.factors.results)
        if self.rule.local is not None:
            made = self.rule.local(self.node, self)
        elif self.factors.is_partial(self.place.factor):
            made = self._partial()
        else:
            made = self.emit(self.node.target, self._resized(marks[0]), self.kwargs)  # type: ignore[arg-type]
        several = isinstance(self.node.meta["val"], (list, tuple))
        return made, marks if several else marks[0]

    def emit(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        made = self.placements.graph.call_function(target, args, kwargs)
        made.meta.update({k: v for k, v in self.node.meta.items() if k not in ("val", "tensor_meta", MARK)})
        return made

    def operand_mark(self, index: int) -> Mark | None:
        dims = self.factors.operands[index]
        return None if dims is None else place_in(dims, self.factors.sizes, self.place)

    def sharding(self, index: int) -> dict[str, Any]:
        operand, mark = operand_at(self.node, self.paths[index]), self.operand_mark(index)
        assert operand is not None and mark is not None
        return self.placements.sharding(operand.meta["val"], mark)

    def size(self, value: Size) -> Any:
        return self.placements.sizes.argument(value)

    def _local_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Operands that hold the factor, by rows; the others whole and varied; sizes, and operands that are not read, as they are."""
        args = list(fx.map_arg(self.node.args, self.placements.plain))
        kwargs = dict(fx.map_arg(self.node.kwargs, self.placements.plain))
        for index, path in enumerate(self.paths):
            operand, mark = operand_at(self.node, path), self.operand_mark(index)
            if operand is None or (mark is None and index in self.rule.unread):
                continue
            _put(args, kwargs, path, self.placements.varied(operand) if mark is None else self.placements.sharded(operand, mark))
        return tuple(args), kwargs

    def _resized(self, mark: Mark | None) -> tuple[Any, ...]:
        """The arguments, with the result's size along the sequence being that of the local rows."""
        if self.rule.sizes_arg is None or mark is None:
            return self.args
        sizes = list(self.args[self.rule.sizes_arg])
        rows_per_rank = local_length(mark.base, self.placements.P, self.placements.layout)
        sizes[mark.dim] = self.size(mark.outer * rows_per_rank * mark.inner)
        return (*self.args[: self.rule.sizes_arg], sizes, *self.args[self.rule.sizes_arg + 1:])

    def _partial(self) -> fx.Node:
        """A contraction over local rows: padding counts nothing, and the ranks' partial sums are added."""
        first = next(i for i, dims in enumerate(self.factors.operands) if dims is not None)
        args, kwargs = list(self.args), dict(self.kwargs)
        mine = _get(args, kwargs, self.paths[first])
        _put(args, kwargs, self.paths[first], self.emit(rows.zero_padding, (mine,), self.sharding(first)))
        partial = self.emit(self.node.target, tuple(args), kwargs)  # type: ignore[arg-type]
        return self.emit(collectives.all_reduce, (partial,), {"group": self.placements.group})


def _get(args: list[Any], kwargs: dict[str, Any], path: tuple[Any, ...]) -> Any:
    """The argument at a path of `tensor_operands`."""
    key, item = path
    value = args[key] if isinstance(key, int) else kwargs[key]
    return value if item is None else value[item]


def _put(args: list[Any], kwargs: dict[str, Any], path: tuple[Any, ...], value: fx.Node) -> None:
    """Replace the argument at a path; a list that holds it is copied."""
    key, item = path
    holder: Any = args if isinstance(key, int) else kwargs
    if item is None:
        holder[key] = value
    else:
        holder[key] = [value if i == item else old for i, old in enumerate(holder[key])]
