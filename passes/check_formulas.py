"""Check that a formula is what its subgraph computes: before a formula replaces a tensor, both are computed on small sizes and compared.

The subgraph between the tensor and what the formula looks up is copied with short sequences (the real lengths where those are
short), run by torch on random data, read again there, and compared element by element. A difference is an internal error.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import SymInt, fx

from autoseq.passes.formula import Known, Reader
from autoseq.passes.formula.values import Index, h, is_bool
from autoseq.passes.score_structure import Structure
from autoseq.passes.sizes import hint
from autoseq.runtime.formula import Points, evaluate_float

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

    def value(self, node: fx.Node) -> torch.Tensor:
        return self.of[node].meta["val"]


def shrink(root: fx.Node, leaves: Iterable[fx.Node], *, q_len: Any, k_len: Any, lanes: int) -> Small:
    """Copy and run what makes `root` out of `leaves` (given random values). `lanes` is batch times heads, for how large small may be."""
    lengths = _small_lengths(hint(q_len), hint(k_len), lanes)
    copier = _Copier(set(leaves), lengths)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        copier.node(root)
    return Small(copier.of, lengths[hint(q_len)], lengths[hint(k_len)])


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
        self.module = fx.GraphModule(torch.nn.Module(), fx.Graph())
        self.graph = self.module.graph
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
        given = node in self.leaves or node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor)
        return [] if given else list(node.all_input_nodes)

    def _copy(self, node: fx.Node) -> fx.Node:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            made = self.graph.placeholder(node.name)
            made.meta["val"] = self._size(val)
            return made
        if node.op == "get_attr" and not val.dim():
            return self._held(node)
        if node in self.leaves or node.op != "call_function":
            made = self.graph.placeholder(node.name)
            made.meta["val"] = self._random(val)
            return made
        args = self._sizes(node.args, node)
        made = self.graph.create_node("call_function", node.target, *self._mapped(args, node.kwargs), name=node.name)
        made.meta["val"] = self._run(made)
        return made

    def _held(self, node: fx.Node) -> fx.Node:
        value = getattr(node.graph.owning_module, str(node.target))
        self.module.register_buffer(str(node.target), value)
        made = self.graph.get_attr(str(node.target))
        made.meta["val"] = value
        return made

    def _mapped(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        def copied(n: fx.Node) -> Any:
            made = self.of[n]
            return made if isinstance(made.meta["val"], torch.Tensor) else made.meta["val"]

        return fx.map_arg(args, copied), fx.map_arg(kwargs, copied)

    def _run(self, node: fx.Node) -> Any:
        args, kwargs = (fx.map_arg(a, lambda n: n.meta["val"]) for a in (node.args, node.kwargs))
        kwargs = {**kwargs, **({"device": torch.device("cpu")} if "device" in kwargs else {})}
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            raise CannotShrink(f"{node.target} at short lengths: {error}") from error

    def _random(self, val: torch.Tensor) -> torch.Tensor:
        shape = [self._size(size) for size in val.shape]
        if val.dtype == torch.bool:
            return torch.rand(shape) < 0.7
        if val.is_floating_point():
            return torch.randn(shape, dtype=torch.float32).to(val.dtype)
        return torch.randint(0, 2, shape).to(val.dtype)

    def _size(self, value: Any) -> Any:
        value = hint(value) if isinstance(value, SymInt) else value
        return self._shorter.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    def _sizes(self, args: tuple[Any, ...], node: fx.Node) -> tuple[Any, ...]:
        """The arguments that are sizes or bounds, shortened; numbers to compute with stay."""
        types = [str(argument.type) for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        shortened = []
        for i, value in enumerate(args):
            is_size = "SymInt" in types[i] or types[i].startswith(("int", "List[int]", "Optional[int]"))
            if (is_size and not _is_dim(node, i)) or (node.target in _RANGES and i == _RANGES[node.target]):
                value = [self._size(item) for item in value] if isinstance(value, (list, tuple)) else self._size(value)
            shortened.append(value)
        return tuple(shortened)


_RANGES = {aten.arange.default: 0, aten.arange.start: 1, aten.arange.start_step: 1}


def _is_dim(node: fx.Node, position: int) -> bool:
    name = node.target._schema.arguments[position].name  # type: ignore[union-attr]
    return name.startswith("dim") or name in ("diagonal", "n", "step")


IndexOf = Callable[[Sequence[Any]], Index]
"""The index at (b, h, q, k) of a tensor of a given shape."""


def check_reading(
    root: fx.Node, reader: Reader, index_of: IndexOf, *, q_len: Any, k_len: Any, batch: Any, heads: int
) -> None:
    """Raise AssertionError if what `reader` reads of `root` is not what `root` holds; CannotShrink if that cannot be found out."""
    known = reader.known
    leaves = [*reader.captures, *([known.node] if known else [])]
    small = shrink(root, leaves, q_len=q_len, k_len=k_len, lanes=max(1, hint(batch) * heads))
    value = small.value(root)
    again = Reader(Known(small.of[known.node], known.index, known.value) if known else None, limits={h: heads})
    read = again.at(small.of[root], index_of(value.shape))
    points = Points.of(hint(batch), range(heads), torch.arange(small.q_len), torch.arange(small.k_len))
    s = _looked_up(small.value(known.node), known.index, points) if known else None
    captured = [node.meta["val"] for node in again.captures]
    actual, expected = _evaluated(read, points, captured, s), _looked_up(value, index_of(value.shape), points)
    _compare(f"{root} at short lengths", actual, expected, 0.0 if is_bool(read) else 1e-5)


def check_structure(
    score: Any, predicate: Any, structure: Structure, captures: Sequence[fx.Node], *, heads: int, q_len: Any, k_len: Any
) -> None:
    """Raise AssertionError if a score formula's structure gives other probabilities than the formula: at some positions, on random data."""
    generator = torch.Generator().manual_seed(0)
    points = Points.of(1, range(heads), *(_some_positions(hint(n)) for n in (q_len, k_len)))
    captured = [_random_like(node.meta["val"], generator) for node in captures]
    s = torch.randn(1, heads, points.q.numel(), points.k.numel(), generator=generator)
    plain = _masked(_evaluated(score, points, captured, s), predicate, points, captured)
    ours = _masked(_evaluated(structure.score, points, captured, s * structure.scale), structure.predicate, points, captured)
    empty = (ours == -torch.inf).all(-1, keepdim=True)
    expected = torch.softmax(plain, -1)
    fill = {"uniform": 1.0 / ours.shape[-1], "mean": 1.0 / ours.shape[-1], "nan": torch.nan, "zero": torch.nan}[structure.empty_rows]
    actual = torch.where(empty, fill, torch.softmax(ours, -1))
    _compare("the attention probability", actual, expected, 1e-5)


def _masked(score: torch.Tensor, predicate: Any, points: Points, captures: list[torch.Tensor]) -> torch.Tensor:
    allowed = _evaluated(predicate, points, captures, None)
    return torch.where(allowed, score, -torch.inf)


def _evaluated(formula: Any, points: Points, captures: list[torch.Tensor], s: torch.Tensor | None) -> torch.Tensor:
    value = evaluate_float(formula, points, captures, s)
    return value.bool() if is_bool(formula) else value


def _looked_up(value: torch.Tensor, index: Index, points: Points) -> torch.Tensor:
    at = [torch.as_tensor(evaluate_float(sympy.sympify(i), points, [])) for i in index]
    return value[tuple(i.long() for i in at)] if at else value


def _some_positions(length: int, most: int = 40) -> torch.Tensor:
    if length <= most:
        return torch.arange(length)
    spread = torch.arange(0, length, max(1, length // (most - 8)))
    return torch.unique(torch.cat([torch.arange(4), spread, torch.arange(length - 4, length)]))


def _random_like(val: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    shape = [hint(size) for size in val.shape]
    if val.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.7
    if val.is_floating_point():
        return torch.randn(shape, generator=generator).to(val.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(val.dtype)


def _compare(what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    actual, expected = torch.broadcast_tensors(actual, expected)
    same = torch.isclose(actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    if not bool(same.all()):
        at = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(f"{what} is {expected[at].item():g} at {at}, and its formula gives {actual[at].item():g}")
