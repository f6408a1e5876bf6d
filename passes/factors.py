"""Named factors: what an operator does to each dim, in one notation.

A rule names the factors of an operator's operands and results:

    "... i, o i, [o] -> ... o"      linear: `i` is contracted, `...` are shared leading dims, the bias is optional
    "... n!, n!, n! -> ... n!"      layer_norm: `!` marks a factor that must be whole
    "(b s) v"                       a dim may be a product of factors

Everything else follows: a factor in operands and results passes a sharding through, a factor that is contracted leaves a
partial sum, a `!` factor must be gathered. The notation is in the spirit of Shardy's factors and einops' patterns.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import SymBool, SymFloat, SymInt, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from autoseq.passes.sizes import hint, same_size

MARK = "sequence"
"""The key in a node's metadata for its `Mark`."""

Size = int | SymInt
Dim = tuple[str, ...]
Dims = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Factors:
    """Factors of one node: per operand and result, per dim, the factors whose product the dim is (none: size 1)."""

    operands: tuple[Dims | None, ...]
    results: tuple[Dims, ...]
    sizes: dict[str, Size]
    whole: frozenset[str] = frozenset()
    sums: frozenset[str] = frozenset()  # contracted by addition: a sharded one leaves a partial sum
    cut: frozenset[str] = frozenset()  # shorter in the result: its last elements are dropped

    def passes(self, factor: str) -> bool:
        return factor not in self.whole

    def admits(self, place: "Place") -> bool:
        """Whether the sequence at `place` may stay sharded here."""
        if place.factor in self.cut:  # the last elements are the last rows only if the factor is the sequence alone
            return same_size(place.outer, 1) and same_size(place.inner, 1)
        return self.passes(place.factor)

    def is_partial(self, factor: str) -> bool:
        return not any(factor in dim for dims in self.results for dim in dims)


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """Where a tensor's sequence lies: dim `dim` is (outer, sequence, inner). `base` is the sequence space's full length.

    The tensor's own length along the sequence is its dim's size over outer·inner; it may be shorter than `base`
    (logits without the last position). Rows are dealt to ranks by `base`, so all tensors of a space line up.
    """

    dim: int
    outer: Size
    inner: Size
    base: Size

    def same(self, other: "Mark | None") -> bool:
        return other is not None and self.dim == other.dim and all(
            same_size(a, b) for a, b in ((self.outer, other.outer), (self.inner, other.inner), (self.base, other.base))
        )

    def is_all_of(self, dim: int) -> bool:
        """Whether dim `dim` is the sequence and nothing else, of a length known when compiling: only such rows are moved."""
        return self.dim == dim and same_size(self.outer, 1) and same_size(self.inner, 1) and isinstance(self.base, int)


@dataclass(frozen=True, slots=True)
class Place:
    """A sequence inside one factor: the factor is (outer, sequence, inner)."""

    factor: str
    outer: Size
    inner: Size
    base: Size = field(compare=False)


def product(sizes: Sequence[Size]) -> Size:
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def locate(dims: Dims, sizes: dict[str, Size], mark: Mark) -> Place | None:
    """The factor that holds `mark`'s sequence in a tensor with these dims, or None if it straddles factors."""
    before: Size = 1
    names = dims[mark.dim]
    for i, name in enumerate(names):
        after = product([sizes[n] for n in names[i + 1:]])
        outer, inner = _divide(mark.outer, before), _divide(mark.inner, after)
        if outer is not None and inner is not None:
            return Place(name, outer, inner, mark.base)
        before = before * sizes[name]
    return None


def place_in(dims: Dims, sizes: dict[str, Size], place: Place) -> Mark | None:
    """Where the sequence of `place` lies in another tensor of the same node; None if its factor is not there."""
    for d, names in enumerate(dims):
        if place.factor in names:
            i = names.index(place.factor)
            before, after = product([sizes[n] for n in names[:i]]), product([sizes[n] for n in names[i + 1:]])
            return Mark(d, before * place.outer, after * place.inner, place.base)
    return None


def fits(shape: Sequence[Size], mark: Mark) -> bool:
    """A tensor may be shorter along the sequence than its space (a cut end), never longer (a table of positions)."""
    length = _divide(shape[mark.dim], mark.outer * mark.inner)
    if length is None:
        return False
    return statically_known_true(length <= mark.base)


def _divide(a: Size, b: Size) -> Size | None:
    if same_size(b, 1):
        return a
    quotient = a // b
    return quotient if same_size(quotient * b, a) else None


# The notation ---------------------------------------------------------------------------------------------------------

_TERM = re.compile(r"\.\.\.|\(([^)]*)\)|([a-z]\w*)(!?)")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed rule: per tensor a list of terms, `...` or the factors of one dim."""

    operands: tuple[tuple[Dim | None, ...], ...]  # None stands for `...`
    optional: tuple[bool, ...]
    results: tuple[tuple[Dim | None, ...], ...]
    whole: frozenset[str]
    sums: frozenset[str]


def parse_pattern(text: str) -> Pattern:
    """Parse `"... i, o i, [o] -> ... o"`."""
    left, _, right = text.partition("->")
    whole: set[str] = set()

    def terms(tensor: str) -> tuple[Dim | None, ...]:
        dims: list[Dim | None] = []
        for match in _TERM.finditer(tensor):
            if match[0] == "...":
                dims.append(None)
            elif match[1] is not None:
                dims.append(tuple(match[1].split()))
            else:
                dims.append((match[2],))
                if match[3]:
                    whole.add(match[2])
        return tuple(dims)

    tensors = [t.strip() for t in left.split(",")]
    optional = tuple(t.startswith("[") for t in tensors)
    operands = tuple(terms(t.strip("[]")) for t in tensors)
    results = tuple(terms(t) for t in right.split(","))
    named = {f for dims in operands for dim in dims if dim for f in dim}
    kept = {f for dims in results for dim in dims if dim for f in dim}
    return Pattern(operands, optional, results, frozenset(whole), frozenset(named - kept - whole))


def bind(pattern: Pattern, shapes: Sequence[Sequence[Size] | None], result_shapes: Sequence[Sequence[Size]]) -> Factors | None:
    """Give a pattern's factors the sizes of real tensors; None if the shapes do not fit it.

    `...` stands for leading dims, aligned from the right; a dim of size 1 carries no factor, so it broadcasts.
    """
    sizes: dict[str, Size] = {}
    operands: list[Dims | None] = []
    for terms, shape in zip(pattern.operands, shapes, strict=False):
        operands.append(None if shape is None else _bind_tensor(terms, shape, sizes))
    results = [_bind_tensor(terms, shape, sizes) for terms, shape in zip(pattern.results, result_shapes, strict=True)]
    if any(dims is None and shape is not None for dims, shape in zip(operands, shapes, strict=True)) or None in results:
        return None
    for dims, shape in zip((*operands, *results), (*shapes, *result_shapes), strict=True):
        if dims is not None and not _multiply_up(dims, shape, sizes):  # type: ignore[arg-type]
            return None
    return Factors(tuple(operands), tuple(results), sizes, pattern.whole, pattern.sums)  # type: ignore[arg-type]


def _bind_tensor(terms: tuple[Dim | None, ...], shape: Sequence[Size], sizes: dict[str, Size]) -> Dims | None:
    spread = len(shape) - sum(t is not None for t in terms)
    if spread < 0 or (spread and None not in terms):
        return None
    dims: list[Dim] = []
    for term in terms:
        dims.extend([(f"_{spread - i}",) for i in range(spread)] if term is None else [term])
    bound: list[Dim] = []
    for dim, size in zip(dims, shape, strict=True):
        if same_size(size, 1):
            bound.append(())
            continue
        if len(dim) == 1 and not same_size(sizes.setdefault(dim[0], size), size):
            return None
        bound.append(dim)
    return tuple(bound)


def _multiply_up(dims: Dims, shape: Sequence[Size], sizes: dict[str, Size]) -> bool:
    """Whether each dim's size is the product of its factors: a product's factors are sized by the tensors that hold them alone."""
    return all(name in sizes for dim in dims for name in dim) and all(
        same_size(product([sizes[name] for name in dim]), size) for dim, size in zip(dims, shape, strict=True)
    )


def reshape_dims(old: Sequence[Size], new: Sequence[Size]) -> tuple[Dims, Dims, dict[str, Size], frozenset[str]]:
    """Factors of a row-major reshape from `old` to `new` sizes: (old dims, new dims, sizes, whole factors).

    A dim that splits or merges is written by the finer side: [B, S, V] → [B·S, V] gives `b s v -> (b s) v`. Groups of
    dims that do not nest ([6, 4] → [4, 6]) must be whole.
    """
    sizes: dict[str, Size] = {}
    whole: set[str] = set()
    old_dims: list[Dim] = [()] * len(old)
    new_dims: list[Dim] = [()] * len(new)
    for a, b in _groups(old, new):
        fine, coarse, fine_dims, coarse_dims = (a, b, old_dims, new_dims) if len(b) <= 1 else (b, a, new_dims, old_dims)
        fine_sizes = old if fine is a else new
        names = []
        for d in fine:
            name = f"f{len(sizes)}"
            sizes[name] = fine_sizes[d]
            fine_dims[d] = (name,)
            names.append(name)
        if len(coarse) == 1:
            coarse_dims[coarse[0]] = tuple(names)
            continue
        whole.update(names)
        for d in coarse:
            name = f"f{len(sizes)}"
            sizes[name] = (new if coarse is b else old)[d]
            coarse_dims[d] = (name,)
            whole.add(name)
    return tuple(old_dims), tuple(new_dims), sizes, frozenset(whole)


def _groups(old: Sequence[Size], new: Sequence[Size]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dims (size 1 left out) with equal products, left to right."""
    a = [d for d, size in enumerate(old) if not same_size(size, 1)]
    b = [d for d, size in enumerate(new) if not same_size(size, 1)]
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        run_a, run_b = [a[i]], [b[j]]
        i, j = i + 1, j + 1
        while not same_size(product([old[d] for d in run_a]), product([new[d] for d in run_b])):
            if hint(product([old[d] for d in run_a])) < hint(product([new[d] for d in run_b])) and i < len(a):
                run_a.append(a[i])
                i += 1
            elif j < len(b):
                run_b.append(b[j])
                j += 1
            elif i < len(a):
                run_a.append(a[i])
                i += 1
            else:
                break
        groups.append((run_a, run_b))
    if groups:
        groups[-1][0].extend(a[i:])
        groups[-1][1].extend(b[j:])
    return groups


_NUMBERS = (SymInt, SymFloat, SymBool)


def tensor_operands(node: fx.Node) -> list[tuple[object, ...]]:
    """Paths of a node's tensor arguments in schema order: (position or name, index in a list or None)."""
    schema = node.target._schema  # type: ignore[union-attr]
    paths: list[tuple[object, ...]] = []
    for position, argument in enumerate(schema.arguments):
        if "Tensor" not in str(argument.type):
            continue
        key: object = position if position < len(node.args) else argument.name
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if isinstance(value, (list, tuple)):
            paths.extend((key, i) for i in range(len(value)))
        else:
            paths.append((key, None))
    return paths


def operand_at(node: fx.Node, path: tuple[object, ...]) -> fx.Node | None:
    """The tensor at a path; None for a number, symbolic ones included, which an operator takes for a tensor (`arange(n) + start`)."""
    key, item = path
    value = node.args[key] if isinstance(key, int) else node.kwargs.get(key)  # type: ignore[arg-type]
    if item is not None:
        value = value[item]  # type: ignore[index]
    return value if isinstance(value, fx.Node) and not isinstance(value.meta.get("val"), _NUMBERS) else None
