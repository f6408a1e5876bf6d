"""Large groups from small ones: who needs what of whom is quadratic in the number of ranks, and a plan asks for thousands.

At the same local length, what a rank sends and computes is linear in the number of ranks (of nodes, on a mesh of two dims) and in its
place among them, as long as a mask's bounds either stay as they are or grow with the sequence. So two smaller groups tell it: a bound
of few shards is kept there, a longer one keeps its ratio to the sequence. Where the rows of all nodes meet inside of each, it is
quadratic, and three groups tell it. Without a mask, with a causal one, and with a window of few shards that is exact; with predicates
and bounds in between it is near.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING, TypeVar

from autoseq.runtime.layout import Layout, local_length
from autoseq.runtime.timeline import Crossing, Exchanges, Work, crossing

if TYPE_CHECKING:
    from autoseq.runtime.strategy import Site

EXACT_RANKS = 64
"""Of more ranks costs are extrapolated."""

# Half of them, and of one less where the number is even, still have nodes in the middle, with neighbours on both sides.
_LEAST_NODES = 9


@dataclass(frozen=True, slots=True)
class Sample:
    """A smaller line of ranks or nodes, a place in it, and the factor of what is found there in the sum over samples."""

    size: int
    place: int
    weight: Fraction


def samples(size: int, place: int, *, together: int = 1) -> tuple[Sample, ...]:
    """The smaller lines for a line of `size` times `together` ranks; itself, if that is not too many."""
    more = max(_LEAST_NODES, EXACT_RANKS // together)
    if size <= more:
        return (Sample(size, place, Fraction(1)),)
    more -= (size - more) % 2  # as even or odd as the size is
    few = more // 2 + (more // 2 - more) % 2
    near = _nearest(size, place, few)
    between = near + Fraction(place - near) * (more - few) / (size - few)
    growth = Fraction(size - more, more - few)
    low, above = int(between), between - int(between)
    found = [Sample(few, near, -growth), Sample(more, low, (1 + growth) * (1 - above))]
    return (*found, Sample(more, low + 1, (1 + growth) * above)) if above else tuple(found)


def quadratic_samples(size: int, *, together: int) -> tuple[Sample, ...]:
    """The same for what grows with the square of the number of nodes, and is the same in all of them."""
    most = max(6, EXACT_RANKS // together)
    if size <= most:
        return (Sample(size, 0, Fraction(1)),)
    few = (most - 4, most - 2, most)
    return tuple(Sample(x, 0, Fraction(prod(size - y for y in few if y != x), prod(x - y for y in few if y != x))) for x in few)


def _nearest(size: int, place: int, few: int) -> int:
    """The place in a line of few: as far from an end near that end, and at the same part of the way in the middle."""
    edge = few // 4
    if place < edge:
        return place
    if size - 1 - place < edge:
        return few - 1 - (size - 1 - place)
    middle = Fraction(place - edge, max(1, size - 1 - 2 * edge))
    return edge + round(middle * (few - 1 - 2 * edge))


Name = TypeVar("Name")


def summed(parts: Iterable[tuple[Fraction, Mapping[Name, int]]]) -> dict[Name, int]:
    """The numbers by name, each part's times its weight, rounded; no less than nothing."""
    total: dict[Name, Fraction] = {}
    for weight, numbers in parts:
        for name, number in numbers.items():
            total[name] = total.get(name, Fraction(0)) + weight * number
    return {name: max(0, round(number)) for name, number in total.items()}


def bound_at(bound: int | None, size: int, sample: Sample, longest: int) -> int | None:
    """A bound of a mask in a smaller line: as it is, if it is no longer than that, else in the same ratio to the sequence."""
    if bound is None or sample.size == size or abs(bound) <= longest:
        return bound
    return bound * sample.size // size


@dataclass(frozen=True, slots=True)
class Case:
    """An attention on some ranks, and one of them. Where it stands for a larger one, `weight` is its factor in a sum."""

    site: Site
    group_size: int
    layout: Layout
    rank: int
    weight: Fraction = Fraction(1)

    @property
    def asked(self) -> tuple[Site, int, Layout, int]:
        return self.site, self.group_size, self.layout, self.rank


def cases_of(case: Case, together: int = 1, *, quadratic: bool = False) -> tuple[Case, ...]:
    """The case, or smaller ones for one of very many ranks. `together` ranks make a node, of which there are fewer then."""
    site, P, layout = case.site, case.group_size, case.layout
    node, place = divmod(case.rank, together)
    nodes = P // together
    found = quadratic_samples(nodes, together=together) if quadratic else samples(nodes, node, together=together)
    if len(found) == 1:
        return (case,)
    s, t = (local_length(n, P, layout) * together for n in (site.q_len, site.k_len))
    longest = found[0].size // 4 * min(s, t)

    def smaller(sample: Sample) -> Case:
        bounds = (bound_at(bound, nodes, sample, longest) for bound in (site.max_ahead, site.max_behind))
        mesh = (sample.size * together // site.mesh[1], site.mesh[1]) if site.mesh else ()
        max_ahead, max_behind = bounds
        part = replace(
            site, q_len=s * sample.size, k_len=t * sample.size, max_ahead=max_ahead, max_behind=max_behind, mesh=mesh
        )
        return Case(part, sample.size * together, layout, sample.place * together + place, sample.weight)

    return tuple(map(smaller, found))


@dataclass(frozen=True, slots=True)
class Part:
    """Exchanges of a rank, and their factor in a sum."""

    weight: Fraction
    rank: int
    exchanges: Exchanges


def weighted(parts: Sequence[Part]) -> Exchanges:
    """What parts stand for: each exchange by name, whole in one of them or in several that stand for it, of which no peers are told."""
    sizes = summed([(part.weight, {name: each.bytes for name, each in part.exchanges.items()}) for part in parts])
    messages = summed([(part.weight, {name: each.messages for name, each in part.exchanges.items()}) for part in parts])
    found: Exchanges = {}
    for part in parts:
        for name, each in part.exchanges.items():
            told = each if part.weight == 1 else replace(each, to=(), came=())
            found[name] = replace(told, bytes=sizes[name], messages=messages[name])
    return found


def weighted_crossings(parts: Sequence[Part], ranks_per_node: int) -> dict[str, Crossing]:
    """What of the exchanges crosses between nodes of so many ranks."""
    found = [
        (part.weight, {name: crossing(each, part.rank, ranks_per_node) for name, each in part.exchanges.items()}) for part in parts
    ]
    numbers = {
        of: summed([(weight, {name: getattr(each, of) for name, each in crossings.items()}) for weight, crossings in found])
        for of in Crossing.__dataclass_fields__
    }
    return {name: Crossing(**{of: numbers[of][name] for of in numbers}) for _, crossings in found for name in crossings}


def weighted_work(parts: Sequence[tuple[Fraction, Work]]) -> Work:
    """What cases stand for."""
    return Work(**summed([(weight, {name: getattr(work, name) for name in Work.__dataclass_fields__}) for weight, work in parts]))
