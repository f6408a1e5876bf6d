"""What a rule is: the factors of one node, and how its arguments change when one factor is sharded."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import fx

from autoseq.passes.factors import (
    Dims,
    Factors,
    Mark,
    Pattern,
    Size,
    bind,
    operand_at,
    parse_pattern,
    tensor_operands,
)
from autoseq.passes.sizes import same_size


class LocalEmitter(Protocol):
    """What `shard` offers a rule that needs more than the same operator on local rows."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def emit(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Add a node to the local graph."""
        ...

    def operand_mark(self, index: int) -> Mark | None:
        """Where the sequence lies in operand `index`, if that operand is sharded."""
        ...

    def sharding(self, index: int) -> dict[str, Any]:
        """Operand `index`'s sharding as the keyword arguments of the runtime's collectives."""
        ...

    def size(self, value: Size) -> Any:
        """A size as an argument: an int, or the node that computes it."""
        ...


@dataclass(frozen=True, slots=True)
class Rule:
    """`factors` reads a node (None: this form is not covered). `sizes_arg` is the argument that lists result sizes.

    `local`, where given, emits the node on local rows itself and returns a *finished* value: a partial sum is already
    reduced. Otherwise the same operator runs on local operands.

    Of the operands in `unread` only the dtype and the device matter, so they are never communicated; of those that are
    a pattern for a result of their shape (`zeros_like`), nothing but the shape.
    """

    factors: Callable[[fx.Node], Factors | None]
    sizes_arg: int | None = None
    local: Callable[[fx.Node, LocalEmitter], fx.Node] | None = None
    unread: frozenset[int] = frozenset()


def pattern(text: str) -> Callable[[fx.Node], Factors | None]:
    """A rule from the notation of `factors`."""
    parsed = parse_pattern(text)
    return lambda node: bind_node(parsed, node)


def bind_node(parsed: Pattern, node: fx.Node) -> Factors | None:
    given, count = operand_shapes(node), len(parsed.operands)
    if any(s is not None for s in given[count:]):
        return None
    shapes = (given + [None] * count)[:count]
    if any(s is None and not optional for s, optional in zip(shapes, parsed.optional, strict=True)):
        return None
    factors = bind(parsed, shapes, result_shapes(node))
    if factors is None or len(given) == count:
        return factors
    # The pattern may name more or fewer optional operands than the operator has (`rms_norm` has no bias).
    return replace(factors, operands=(*factors.operands, *(None,) * len(given))[: len(given)])


def operand_shapes(node: fx.Node) -> list[Sequence[Size] | None]:
    """Shapes of the tensor operands in schema order, None where an optional one is absent."""
    operands = (operand_at(node, path) for path in tensor_operands(node))
    return [None if x is None else x.meta["val"].shape for x in operands]


def result_shapes(node: fx.Node) -> list[Sequence[Size]]:
    val = node.meta["val"]
    return [v.shape for v in val] if isinstance(val, (list, tuple)) else [val.shape]


def result_nodes(node: fx.Node) -> dict[int, fx.Node]:
    """A node's results that are used, by their index: itself, or the `getitem`s of a tuple."""
    if not isinstance(node.meta["val"], (list, tuple)):
        return {0: node}
    return {user.args[1]: user for user in node.users if user.target is operator.getitem}  # type: ignore[misc]


def plain_dims(rank: int, prefix: str = "d") -> list[tuple[str, ...]]:
    return [(f"{prefix}{i}",) for i in range(rank)]


def dims_of(shape: Sequence[Size], names: list[tuple[str, ...]], sizes: dict[str, Size]) -> Dims:
    """Bind one tensor's dims to names of one factor each, recording their sizes; a dim of size 1 has no factor."""
    bound: list[tuple[str, ...]] = []
    for size, name in zip(shape, names, strict=True):
        if same_size(size, 1) or not name:
            bound.append(())
            continue
        sizes.setdefault(name[0], size)
        bound.append(name)
    return tuple(bound)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def first_val(node: fx.Node) -> torch.Tensor:
    operand = operand_at(node, tensor_operands(node)[0])
    assert operand is not None
    return operand.meta["val"]


def as_dim(dim: Any, rank: int) -> int:
    return int(dim) % max(rank, 1)
