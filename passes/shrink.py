"""A subgraph at short lengths, run for real: what a formula or a rewrite is checked on.

The nodes between a result and its leaves are copied with short sequences (the real lengths where those are short); the leaves get
random values and every node is run by torch on the spot, so each copy holds its value.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, fx

from autoseq.passes.formula.held import CONTENT, content_of
from autoseq.passes.sizes import hint

aten = torch.ops.aten
_MOST_ELEMENTS = 1 << 18
_SHORTEST, _LONGEST = 24, 512


class CannotShrink(Exception):
    """The subgraph does not run at other lengths, or not without its inputs' real values."""


@dataclass(frozen=True, slots=True)
class Small:
    """A subgraph at small sizes: its nodes hold real values, `of` maps the nodes of the real graph to them."""

    of: dict[fx.Node, fx.Node]
    q_len: int
    k_len: int
    shorter: dict[int, int]

    def size(self, real: int) -> int:
        """What stands for a size: one that happens to be a length of the sequence is shortened with it."""
        return self.shorter.get(real, real)

    def value(self, node: fx.Node) -> torch.Tensor:
        return self.of[node].meta["val"]


def shrink(root: fx.Node, leaves: Iterable[fx.Node], *, q_len: Any, k_len: Any, lanes: int) -> Small:
    """Copy and run what makes `root` out of `leaves` (given random values). `lanes` is batch times heads, for how large small may be."""
    lengths = _small_lengths(hint(q_len), hint(k_len), lanes)
    copier = _Copier(set(leaves), lengths)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        copier.node(root)
    return Small(copier.of, lengths[hint(q_len)], lengths[hint(k_len)], lengths)


def _small_lengths(q_len: int, k_len: int, lanes: int) -> dict[int, int]:
    """The short length that stands for each real one; equal to it if everything is small anyway."""
    if q_len * k_len * lanes <= _MOST_ELEMENTS:
        return {q_len: q_len, k_len: k_len}
    side = min(_LONGEST, max(_SHORTEST, int((_MOST_ELEMENTS / lanes) ** 0.5)))
    short = {q_len: min(q_len, side), k_len: min(k_len, side)}
    if q_len != k_len and short[q_len] == short[k_len]:
        short[max(q_len, k_len)] = side + 5
    return short


class _Copier:
    """Copies nodes with shortened sizes and runs each on the spot."""

    def __init__(self, leaves: set[fx.Node], lengths: dict[int, int]) -> None:
        self.leaves, self.lengths = leaves, lengths
        self.graph = fx.Graph()
        self.of: dict[fx.Node, fx.Node] = {}
        near = {length + d: short + d for length, short in lengths.items() for d in (-1, 1)}
        self._shorter = near | lengths

    def node(self, node: fx.Node) -> fx.Node:
        stack = [node]
        while stack:  # no recursion: a mask's making may be deep
            top = stack[-1]
            missing = [n for n in self._inputs(top) if n not in self.of]
            if top not in self.of and not missing:
                self.of[top] = self._copy(top)
            if not missing:
                stack.pop()
            stack.extend(missing)
        return self.of[node]

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        given = node in self.leaves or node.op != "call_function" or not _holds_tensors(node)
        return [] if given else list(node.all_input_nodes)

    def _copy(self, node: fx.Node) -> fx.Node:
        val: Any = node.meta.get("val")
        if not _holds_tensors(node):
            made = self.graph.placeholder(node.name)
            made.meta["val"] = self._size(val)
            return made
        content = content_of(node) if node not in self.leaves else None
        if content is not None:
            return self._held(node, content)
        if node in self.leaves or node.op != "call_function":
            made = self.graph.placeholder(node.name)
            made.meta["val"] = random_values([self._size(size) for size in val.shape], _in_single(val.dtype))
            return made
        args = self._sizes(node.args, node)
        made = self.graph.create_node("call_function", node.target, *self._mapped(args, node.kwargs), name=node.name)
        made.meta["val"] = self._run(made)
        return made

    def _held(self, node: fx.Node, content: torch.Tensor) -> fx.Node:
        """A tensor whose content is known, or the first part of it."""
        value = content[tuple(slice(self._size(size)) for size in content.shape)].to(_in_single(content.dtype))
        made = self.graph.placeholder(node.name)
        made.meta.update({"val": value, CONTENT: value})
        return made

    def _mapped(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        def copied(n: fx.Node) -> Any:
            made = self.of[n]
            return made if _holds_tensors(made) else made.meta["val"]

        return fx.map_arg(args, copied), fx.map_arg(kwargs, copied)

    def _run(self, node: fx.Node) -> Any:
        if node.target is aten.dropout.default:  # a draw cannot be compared
            return node.args[0].meta["val"]  # type: ignore[union-attr]
        args, kwargs = (fx.map_arg(_in_single(a), lambda n: n.meta["val"]) for a in (node.args, node.kwargs))
        kwargs = {name: torch.device("cpu") if name == "device" else value for name, value in kwargs.items()}  # type: ignore[union-attr]
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            raise CannotShrink(f"{node.target} at short lengths: {error}") from error

    def _size(self, value: Any) -> Any:
        value = hint(value) if isinstance(value, SymInt) else value
        return self._shorter.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    def _sizes(self, args: tuple[Any, ...], node: fx.Node) -> tuple[Any, ...]:
        """The arguments that are sizes or bounds, shortened; numbers to compute with stay."""
        schema = getattr(node.target, "_schema", None)
        if schema is None:  # an item of a tuple
            return args
        types = [str(argument.type) for argument in schema.arguments]
        shortened = []
        for i, value in enumerate(args):
            is_size = "SymInt" in types[i] or types[i].startswith(("int", "List[int]", "Optional[int]"))
            if (is_size and not _is_dim(node, i)) or (node.target in _RANGES and i == _RANGES[node.target]):
                value = [self._size(item) for item in value] if isinstance(value, (list, tuple)) else self._size(value)
            shortened.append(value)
        return tuple(shortened)


def random_values(shape: list[int], dtype: torch.dtype, generator: torch.Generator | None = None) -> torch.Tensor:
    """What stands for a tensor whose content is not known: normal floats, truth values, or 0 and 1, which index anything."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.7
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=torch.float32, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _in_single(arguments: Any) -> Any:
    """Halves round away what a check compares, so the copy computes in float32 where the program computes in halves."""
    if isinstance(arguments, dict):
        return {name: _in_single(value) for name, value in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(_in_single(value) for value in arguments)
    return torch.float32 if arguments in (torch.float16, torch.bfloat16) else arguments


def _holds_tensors(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))


_RANGES = {aten.arange.default: 0, aten.arange.start: 1, aten.arange.start_step: 1}


def _is_dim(node: fx.Node, position: int) -> bool:
    name = node.target._schema.arguments[position].name  # type: ignore[union-attr]
    return name.startswith("dim") or name in ("diagonal", "n", "step")
