"""Keys that go round a group in lanes: what `ring`, `bidirectional_ring` and `double_ring` share.

A lane is some of the keys and the directions in which they go round; `runtime/circle.py` has the walk of one lane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import sympy
import torch
from torch import Tensor

from autoseq.runtime import blocks, strategy
from autoseq.runtime.attention_op import AttentionOp, as_many_as_own, attention_op
from autoseq.runtime.blocks import Chunk
from autoseq.runtime.blockwise import Backward, Forward
from autoseq.runtime.circle import Circle, Route, finish, in_step
from autoseq.runtime.layout import Layout, local_length
from autoseq.runtime.needs import Needs
from autoseq.runtime.op_call import Call
from autoseq.runtime.packed import Packed
from autoseq.runtime.plain import accumulate_dtype
from autoseq.runtime.strategy import Site, accumulator_bytes, needs_of_site, rows_of_site, task_of
from autoseq.runtime.timeline import (
    WAYS,
    Exchanges,
    Peers,
    Phase,
    Scope,
    Way,
    homeward_pipeline,
    peers_of,
    pipeline,
    sends_to,
)
from autoseq.runtime.work_counts import Task, part_of

Lane = tuple[Route, Route]
"""The routes of some of the keys, forward and backward."""

Lanes = Callable[[Needs, int, int], tuple[Lane, ...]]
"""The lanes for what is needed, given the bytes of an element of a key and of its gradient."""


@lru_cache(maxsize=256)
def cheapest_lane(needs: Needs, key_bytes: int, grad_bytes: int, *, keeps: bool = True) -> Lane:
    """The directions in which the fewest bytes are sent; where both send as many, up in the forward and back in the backward.

    `keeps` says that the backward starts with the last keys of the forward.
    """
    return common_lanes((needs,), key_bytes, grad_bytes, keeps=keeps)[0]


def common_lanes(groups: Sequence[Needs], key_bytes: int, grad_bytes: int, *, keeps: bool = True) -> tuple[Lane, ...]:
    """The same for several groups of which all are to go the same way."""
    up, down = ([Route.of(needs, step) for needs in groups] for step in (1, -1))

    def forward_rows(routes: list[Route]) -> int:
        return sum(sum(route.sent_forward(rank)) for route in routes for rank in range(route.size))

    def backward_bytes(routes: list[Route]) -> int:
        each = zip(routes, forward, strict=True)
        sent = [route.sent_backward(rank, before if keeps else None) for route, before in each for rank in range(route.size)]
        return sum(key_bytes * sum(keys) + grad_bytes * sum(grads) for keys, grads in sent)

    forward = min((up, down), key=forward_rows)
    return tuple(zip(forward, min((up, down) if forward is down else (down, up), key=backward_bytes), strict=True))


def lanes_op(name: str, lanes: Lanes) -> AttentionOp:
    """An attention op whose keys go round in these lanes."""

    def forward(call: Call, work: Forward) -> Tensor | None:
        return _walk_forward(name, call, work, _lanes_of(call, lanes))

    def backward(call: Call, work: Backward, kept: Tensor) -> tuple[Tensor, Tensor]:
        return _walk_backward(f"{name}_backward", call, work, kept, _lanes_of(call, lanes))

    return attention_op(name, forward, backward, kept=as_many_as_own)


MessageRows = tuple[list[int], list[int]]
"""Rows in each message of keys, and of their gradients."""


@dataclass(frozen=True, slots=True)
class LanePlace:
    """A place in a lane, and the ranks that have the places. `keeps` says that a backward starts with the last keys of the forward."""

    lane: Lane
    place: int
    ranks: range
    keeps: bool = True

    def sent(self, way: Way, place: int) -> MessageRows:
        """From a place."""
        forward, backward = self.lane
        if way == "forward":
            return forward.sent_forward(place), []
        return backward.sent_backward(place, forward if self.keeps else None)

    def neighbours(self, way: Way) -> tuple[int, int]:
        """The places to which keys and gradients go, and from which they come."""
        route = self.lane[WAYS.index(way)]
        return (self.place + route.step) % route.size, (self.place - route.step) % route.size


def exchanges_at(site: Site, places: Sequence[LanePlace], way: Way, scope: Scope = "flat", prefix: str = "") -> Exchanges:
    """What the rank at a place in each of some lanes sends in one pass: keys and, in a backward, their gradients."""
    elements = key_row_elements(site)
    sizes = {"keys": elements * site.element_bytes}
    if way == "backward":
        sizes["gradients"] = elements * accumulator_bytes(site)
    ends = [(each, *each.neighbours(way)) for each in places]
    sent = [(each.ranks[to], each.sent(way, each.place)) for each, to, _ in ends]
    came = [(each.ranks[source], each.sent(way, source)) for each, _, source in ends]

    def peers(rows: Sequence[tuple[int, MessageRows]], kind: int, row_bytes: int) -> Peers:
        return peers_of((rank, (row_bytes * count for count in of_kinds[kind])) for rank, of_kinds in rows)

    return {
        prefix + name: sends_to(scope, peers(sent, kind, row_bytes), peers(came, kind, row_bytes))
        for kind, (name, row_bytes) in enumerate(sizes.items())
    }


def lanes_exchanges(
    lanes: Lanes, site: Site, P: int, layout: Layout, rank: int, way: Way, places: tuple[int, ...] = (), heads: range | None = None,
    scope: Scope = "flat", ranks: range | None = None,
) -> Exchanges:  # fmt: skip
    """What `rank` sends for a site in one pass, row by row of what its mask leaves.

    `places` and `heads` are as for `needs_of_site`, and `ranks` those of the participants, if they are not all there are.
    """
    found = _lanes_of_site(lanes, site, P, layout, places, heads, blocks.TILE)
    return exchanges_at(site, [LanePlace(lane, rank, ranks or range(P)) for lane in found], way, scope)


@lru_cache(maxsize=256)
def _lanes_of_site(
    lanes: Lanes, site: Site, P: int, layout: Layout, places: tuple[int, ...], heads: range | None, tile: int
) -> tuple[Lane, ...]:
    """All ranks ask for the same, and the hash of what many ranks need takes long. It is proven in tiles of that size."""
    return lanes(needs_of_site(site, P, layout, places, heads), site.element_bytes, accumulator_bytes(site))


def lanes_task(
    lanes: Lanes, site: Site, P: int, layout: Layout, rank: int, way: Way, places: tuple[int, ...] = (), heads: range | None = None
) -> Task:
    """What `rank` computes: its queries meet its own keys, and at every hop those that it needs some of."""
    needs, rows = needs_of_site(site, P, layout, places, heads), rows_of_site(site, P, layout, places)
    keys, came_home = [rows.keys(rank)], 0
    for lane in _lanes_of_site(lanes, site, P, layout, places, heads, blocks.TILE):
        route = lane[WAYS.index(way)]
        came_home += route.came_home(rank) if way == "backward" else 0
        here = [(route.origin(rank, hop), route.keys_at(rank, hop)) for hop in range(1, P)]
        keys += [part_of(rows.keys(origin), held) for origin, held in here if needs[rank][origin]]
    return task_of(rows, rank, keys, heads or range(site.heads), site.kv_heads, came_home * key_row_elements(site))


def key_row_elements(site: Site) -> int:
    """Of one row of keys and values, of the whole batch."""
    return site.batch * site.kv_heads * (site.head_dim + site.value_dim)


@lru_cache(maxsize=64)
def ring_phases(way: Way, ranks: sympy.Expr, prefix: str = "") -> tuple[Phase, ...]:
    """Hop by hop, the next one's messages under the work of this one; a backward has the keys of its first hop and ends with its own."""
    keys, grads = prefix + "keys", prefix + "gradients"
    if way == "forward":
        return pipeline(ranks - 1, keys, None, first_work=1 / ranks)
    return homeward_pipeline(ranks - 1, keys, grads, last_work=1 / ranks)


def keeps_last_keys(formulas: dict[str, sympy.Expr]) -> dict[str, sympy.Expr]:
    """Formulas of work, for a strategy that also keeps as much of what came as it has of keys itself."""
    came = strategy.B * strategy.K * strategy.t * (strategy.D + strategy.V) * strategy.e
    return formulas | {"kept_bytes": formulas["kept_bytes"] + came}


def key_bytes(site: Site, P: int, layout: Layout) -> tuple[int, int]:
    """Of the keys and values of a participant, and of their gradients on their way."""
    elements = site.batch * site.kv_heads * local_length(site.k_len, P, layout) * (site.head_dim + site.value_dim)
    return elements * site.element_bytes, elements * accumulator_bytes(site)


def ring_buffers(keys: int, grads: int, P: int, way: Way) -> int:
    """The most that packed rows hold, of keys of so many bytes and gradients of so many.

    Forward what leaves, what is here and what arrives, which is the own keys' copy at first; backward the keys here and those that
    arrive, and of gradients those that leave, those that arrive and those that are being found.
    """
    if way == "forward":
        return min(P, 3) * keys
    return min(P - 2, 2) * keys + min(P, 3) * grads


def _lanes_of(call: Call, lanes: Lanes) -> tuple[Lane, ...]:
    return lanes(call.needs, call.k.element_size(), accumulate_dtype(call.k.dtype).itemsize)


def _walk_forward(op: str, call: Call, work: Forward, lanes: Sequence[Lane]) -> Tensor | None:
    """Bring all keys to `work`; what is left of them at the end, lane by lane, is kept for the backward."""
    visit = visitor(call, with_keys(work))
    circles = [Circle(op, call.group, forward, number) for number, (forward, _) in enumerate(lanes)]
    last = finish(in_step(circle.forward(own_keys(call)) for circle in circles), visit)
    return torch.cat([keys.message() for keys in last]) if call.participants > 1 else None


def _walk_backward(op: str, call: Call, work: Backward, kept: Tensor, lanes: Sequence[Lane]) -> tuple[Tensor, Tensor]:
    """Bring all keys again, first those kept, and the gradients home: dk and dv."""
    own, dtype = own_keys(call), work.dq.dtype
    dk, dv = (x.new_zeros(x.shape, dtype=dtype) for x in own.tensors)
    visit = visitor(call, with_gradients(work))
    circles = [Circle(op, call.group, backward, number) for number, (_, backward) in enumerate(lanes)]
    ends = [forward.keys_at(call.me, forward.size - 1) for forward, _ in lanes] if call.participants > 1 else []
    left = Packed.split(kept, [(own.tensors, rows) for rows in ends]) or [None] * len(lanes)
    grads = Packed((dk, dv), own.rows)
    own_first = len(lanes) > 1 and _somebody_waits(lanes)
    starts = zip(circles, left, lanes, strict=True)
    finish(in_step(circle.backward(own, grads, last, forward, own_first) for circle, last, (forward, _) in starts), visit)
    return dk, dv


def _somebody_waits(lanes: Sequence[Lane]) -> bool:
    """Whether any rank begins its backward, in any lane, by waiting for keys. Then all work on their own first, in every lane: with
    NCCL messages have no tags, and two lanes that took their steps in another order on other ranks would wait for each other."""
    return any(bool(back.first_keys(rank, forward)) for forward, back in lanes for rank in range(back.size) if back.size > 1)


def visitor(call: Call, work: Callable[..., None]) -> Callable[..., None]:
    """Works on the keys of a participant that this one needs; its own come once in every lane, whole."""
    seen: set[int] = set()

    def visit(origin: int, keys: Packed, *grads: Packed) -> None:
        if not call.needs[call.me][origin] or (origin == call.me and origin in seen):
            return
        seen.add(origin)
        work(keys, keys.chunks(call.keys_of(origin)), *grads)

    return visit


def with_keys(work: Forward) -> Callable[[Packed, list[Chunk]], None]:
    """What to do with keys in a forward."""

    def add(keys: Packed, chunks: list[Chunk]) -> None:
        k, v = keys.tensors
        work.add(k, v, chunks)

    return add


def with_gradients(work: Backward) -> Callable[[Packed, list[Chunk], Packed], None]:
    """What to do with keys in a backward, and where their gradients go."""

    def add(keys: Packed, chunks: list[Chunk], grads: Packed) -> None:
        (k, v), (dk, dv) = keys.tensors, grads.tensors
        work.add(k, v, chunks, dk, dv)

    return add


def own_keys(call: Call) -> Packed:
    """The keys and values that a rank brings, where the program has them."""
    return Packed.whole((call.k, call.v))
