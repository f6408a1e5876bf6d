"""Double ring: a ring across nodes, and inside each of its hops a ring inside the node (Gu et al., LoongTrain, arXiv:2406.18485).

At outer hop h each rank has the keys of the rank at its own place in another node, which came in one message, and these go round the
node while the next ones are under way. So the slow links between nodes carry each key N-1 times, not once for every rank that passes it on:

    outer hop   0                    1                        ...  N-1
    across      K, V of my column    K, V of my column             -
    inside      K, V of my node      K, V of the node before

The backward is nested likewise: the gradients for a node's keys come together where the keys arrived, and ride the outer circle home.
Both circles go in the direction in which the mask lets fewer rows travel. The last keys of the outer circle are kept for the backward.

Bytes without a mask, with k the size of a local K: forward 2k(N-1) across and 2kN(R-1) inside, a ring's 2k(P-1) in all.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache
from math import lcm
from typing import Any

import sympy
from torch import Tensor

from autoseq.runtime import blocks, runs, strategy
from autoseq.runtime.attention_call import Terms, attention_function
from autoseq.runtime.attention_op import as_many_as_own, attention_op
from autoseq.runtime.blockwise import Backward, Forward
from autoseq.runtime.circle import Circle, finish
from autoseq.runtime.extrapolation import Case, cases_of
from autoseq.runtime.lanes import (
    Lane,
    LanePlace,
    cheapest_lane,
    common_lanes,
    exchanges_at,
    keeps_last_keys,
    key_bytes,
    key_row_elements,
    own_keys,
    ring_phases,
    visitor,
    with_gradients,
    with_keys,
)
from autoseq.runtime.layout import Layout
from autoseq.runtime.local import whole_attention
from autoseq.runtime.needs import Needs
from autoseq.runtime.op_call import Call
from autoseq.runtime.packed import Packed
from autoseq.runtime.plain import accumulate_dtype
from autoseq.runtime.strategy import (
    Site,
    Strategy,
    accumulator_bytes,
    needs_of_site,
    needs_two_dims,
    rows_of_site,
    task_of,
)
from autoseq.runtime.timeline import WAYS, Exchanges, Phase, Way, nested, pipeline
from autoseq.runtime.work_counts import Task, part_of

_INSIDE = 2  # the tag of the inner circles' messages, beside which the outer circle's are in flight


@dataclass(frozen=True, slots=True)
class Routes:
    """The ways of the keys: `across[place]` between the ranks at one place of each node, `inside[n][o]` in node n for those of node o.

    The ranks of a node take the nodes in one order, or they would not meet: all go the same way across, and if one has to wait
    for keys from another node at the start of a backward, all start with the keys of their own.
    """

    across: tuple[Lane, ...]
    inside: tuple[tuple[Lane, ...], ...]

    @staticmethod
    @lru_cache(maxsize=256)
    def of(needs: Needs, ranks: int, key_bytes: int, grad_bytes: int) -> Routes:
        nodes = range(len(needs) // ranks)
        parts = [[_between(needs, asker, holder, ranks) for holder in nodes] for asker in nodes]

        def column(place: int) -> Needs:
            """What arrives across nodes is for the whole node."""
            return tuple(tuple(runs.union(*(of_one[place] for of_one in part)) for part in of_node) for of_node in parts)

        across = common_lanes([column(place) for place in range(ranks)], key_bytes, grad_bytes)
        inside = [[cheapest_lane(part, key_bytes, grad_bytes, keeps=False) for part in of_node] for of_node in parts]
        return Routes(across, tuple(map(tuple, inside)))

    def own_first(self, node: int) -> bool:
        """Whether some rank of a node starts its backward by waiting for keys."""
        return any(back.size > 1 and bool(back.first_keys(node, forward)) for forward, back in self.across)


def _between(needs: Needs, asker: int, holder: int, ranks: int) -> Needs:
    """What the ranks of one node need of those of another."""
    return tuple(of_one[holder * ranks : (holder + 1) * ranks] for of_one in needs[asker * ranks : (asker + 1) * ranks])


@dataclass(frozen=True)
class _Circles:
    """The circles of one call: one across nodes, and inside the node one for the keys of each node."""

    op: str
    call: Call
    routes: Routes

    @classmethod
    def of(cls, op: str, call: Call) -> _Circles:
        sizes = (call.k.element_size(), accumulate_dtype(call.k.dtype).itemsize)
        return cls(op, call, Routes.of(call.needs, call.groups[1].size, *sizes))

    def across(self, direction: int) -> Circle:
        across, inside = self.call.groups
        return Circle(self.op, across, self.routes.across[inside.rank][direction])

    def inside(self, node: int, direction: int) -> Circle:
        across, inside = self.call.groups
        return Circle(self.op, inside, self.routes.inside[across.rank][node][direction], _INSIDE)

    def forward(self) -> Generator[Any, None, Packed]:
        """Yields what a circle through all ranks would; returns the last keys of the outer one."""
        walk = self.across(0).forward(own_keys(self.call))
        return (yield from _nested(walk, lambda node, held: self._numbered(node, self.inside(node, 0).forward(held))))

    def backward(self, own_grads: Packed, kept: Packed | None) -> Generator[Any, None, None]:
        """The same with room for gradients; those of a node's keys come together in what the outer circle sends on."""
        own_first = self.routes.own_first(self.call.groups[0].rank)
        walk = self.across(1).backward(own_keys(self.call), own_grads, kept, self.across(0).route, own_first)
        yield from _nested(
            walk,
            lambda node, held, grads: self._numbered(node, self.inside(node, 1).backward(held, grads, None, None)),
        )

    def _numbered(self, node: int, walk: Generator[Any, None, Any]) -> Generator[Any, None, None]:
        """Places in a node as participants."""
        for place, *step in walk:
            yield node * self.call.groups[1].size + place, *step


def _nested(walk: Generator[Any, None, Any], inside: Callable[..., Generator[Any, None, Any]]) -> Generator[Any, None, Any]:
    """For each step of a walk the steps of the walk inside it; what the outer one returns."""
    while True:
        try:
            step = next(walk)
        except StopIteration as end:
            return end.value
        yield from inside(*step)


def _forward(call: Call, work: Forward) -> Tensor | None:
    last = finish(_Circles.of("double_ring_attention", call).forward(), visitor(call, with_keys(work)))
    return last.message() if call.groups[0].size > 1 else None


def _backward(call: Call, work: Backward, kept: Tensor) -> tuple[Tensor, Tensor]:
    circles, own = _Circles.of("double_ring_attention_backward", call), own_keys(call)
    dk, dv = (x.new_zeros(x.shape, dtype=work.dq.dtype) for x in own.tensors)
    across = circles.across(0)
    ends = [across.route.keys_at(across.group.rank, across.route.size - 1)] if across.route.size > 1 else []
    (left,) = Packed.split(kept, [(own.tensors, rows) for rows in ends]) or [None]
    finish(circles.backward(Packed((dk, dv), own.rows), left), visitor(call, with_gradients(work)))
    return dk, dv


double_ring_attention = attention_op("double_ring_attention", _forward, _backward, kept=as_many_as_own)


def _compute(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """Sends at most (P-1)·B·K·t·(D+Dv) elements forward, N-1 of these parts across nodes; see the formulas for the backward."""
    axes = terms.two_axes
    return terms.call_on_all_rows(whole_attention, q, k, v) if axes is None else terms.call(double_ring_attention, q, k, v, groups=axes)


attention = attention_function(__name__, _compute)


class DoubleRing(Strategy):
    """Keys and values go round the nodes, and inside each."""

    name = "double_ring"
    merges_partial_softmaxes = True
    balanced_by_zigzag = True
    attention = staticmethod(attention)

    def cannot_serve(self, site: Site, group_size: int) -> str | None:
        return needs_two_dims(site) or super().cannot_serve(site, group_size)

    def formulas(self) -> dict[str, sympy.Expr]:
        across, inside = strategy.N - 1, strategy.N * (strategy.R - 1)
        elements = strategy.B * strategy.K * strategy.t * (strategy.D + strategy.V)
        return {
            "forward_bytes": (across + inside) * elements * strategy.e,
            "backward_bytes": elements * ((across - 1 + inside) * strategy.e + (across + inside) * strategy.a),
            "forward_messages": across + inside,
            "backward_messages": 2 * (across + inside) - 1,
        }

    def work_formulas(self) -> dict[str, sympy.Expr]:
        return keeps_last_keys(super().work_formulas())

    def cases(self, site: Site, group_size: int, layout: Layout, rank: int, together: int = 1) -> tuple[Case, ...]:
        return cases_of(Case(site, group_size, layout, rank), lcm(site.mesh[1], together))

    def exchanged(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Exchanges:
        ranks = site.mesh[1]
        node, place = divmod(rank, ranks)
        routes, own_node = _routes(site, group_size, layout), range(node * ranks, (node + 1) * ranks)
        across = [LanePlace(routes.across[place], node, range(place, group_size, ranks))]
        inside = [LanePlace(lane, place, own_node, keeps=False) for lane in routes.inside[node]]
        return exchanges_at(site, across, way, "across", "across_") | exchanges_at(site, inside, way, "inside", "inside_")

    def phases(self, way: Way) -> tuple[Phase, ...]:
        """A circle inside the node for each hop across; a backward's begin with the keys at hand, and end with the way home."""
        across = ring_phases(way, strategy.N, "across_")
        home = "inside_gradients" if way == "backward" else None
        return nested(across, pipeline(strategy.R - 1, "inside_keys", home, first_work=1 / strategy.R))

    def tasks(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> list[Task]:
        nodes, ranks = site.mesh
        node, place = divmod(rank, ranks)
        rows, needs = rows_of_site(site, group_size, layout), needs_of_site(site, group_size, layout)
        routes, direction = _routes(site, group_size, layout), WAYS.index(way)
        across, keys = routes.across[place][direction], [rows.keys(rank)]
        circles = [across]
        for hop in range(nodes):
            origin = across.origin(node, hop)
            inside = routes.inside[node][origin][direction]
            circles.append(inside)
            here = {inside.origin(place, step): inside.keys_at(place, step) for step in range(1, ranks)}
            here[place] = across.keys_at(node, hop)
            holders = [(origin * ranks + at, held) for at, held in here.items()]
            keys += [part_of(rows.keys(holder), held) for holder, held in holders if holder != rank and needs[rank][holder]]
        at = [node, *[place] * nodes]
        came_home = sum(circle.came_home(me) for circle, me in zip(circles, at, strict=True)) if way == "backward" else 0
        return [task_of(rows, rank, keys, range(site.heads), site.kv_heads, came_home * key_row_elements(site))]

    def kept_bytes(self, site: Site, group_size: int, layout: Layout, rank: int) -> int:
        return super().kept_bytes(site, group_size, layout, rank) + (key_bytes(site, group_size, layout)[0] if group_size > 1 else 0)

    def buffer_bytes(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> int:
        """Those of a circle inside a circle, of which the outer one's first hop holds most forward."""
        if group_size == 1:
            return 0
        nodes, ranks = site.mesh
        keys, grads = key_bytes(site, group_size, layout)
        if way == "forward":
            return (2 + min(ranks, 3)) * keys
        return (min(nodes - 2, 2) + min(ranks, 4)) * keys + (min(nodes, 3) + min(ranks, 3)) * grads


def _routes(site: Site, P: int, layout: Layout) -> Routes:
    return _routes_of_site(site, P, layout, blocks.TILE)


@lru_cache(maxsize=256)
def _routes_of_site(site: Site, P: int, layout: Layout, tile: int) -> Routes:
    """All ranks ask for the same. Who needs what is proven in tiles of that size."""
    return Routes.of(needs_of_site(site, P, layout), site.mesh[1], site.element_bytes, accumulator_bytes(site))
