"""Keys and values that go round a group of participants, and the gradients that come back to them.

A circle is one direction of travel. At hop h participant r has the keys of participant r - h·step. What is sent at each hop follows
from what the mask lets the participants further on see (`Route`): nothing that nobody needs any more travels on.

    hop                0      1      2          ...   P-1
    forward:  K, V     send   send   send             -              the last ones held are kept for the backward
    backward: K, V     -      send   send             -              which goes the other way round and starts with them
              dK, dV   -      start  add, send        add, send home

Each hop's messages are posted before its block is worked on. The gradients of a hop leave with the next one, so no message waits
for the block that runs. The walks are generators: they yield what can be worked on and go on when it is done, so several circles
can run in step (`bidirectional_ring`) or inside each other (`double_ring`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch

from autoseq.runtime import runs
from autoseq.runtime.groups import SequenceGroup
from autoseq.runtime.messages import Message, Pending, post
from autoseq.runtime.needs import Needs
from autoseq.runtime.packed import Packed
from autoseq.runtime.runs import Runs

Forward = Generator[tuple[int, Packed], None, Packed]
"""Yields (origin, its keys) hop by hop; returns the last ones."""

Backward = Generator[tuple[int, Packed, Packed], None, None]
"""Yields (origin, its keys, where to add their gradients, row by row)."""


@dataclass(frozen=True, slots=True)
class Route:
    """The rows that travel in one direction, by origin and hop.

    `keys[o][h]` are those of o's keys that participant o + h·step needs or passes on, `grads[o][h]` those for which it or a participant
    before it has found a gradient.
    """

    step: int
    keys: tuple[tuple[Runs, ...], ...]
    grads: tuple[tuple[Runs, ...], ...]

    @staticmethod
    @lru_cache(maxsize=256)
    def of(needs: Needs, step: int) -> Route:
        everyone = range(len(needs))
        wanted = [[needs[(origin + hop * step) % len(needs)][origin] for hop in everyone] for origin in everyone]
        # What is passed on is what anybody from this hop on needs; what has been found is what anybody up to it has seen.
        keys = tuple(tuple(accumulate(reversed(of_one), runs.union))[::-1] for of_one in wanted)
        grads = tuple(tuple(accumulate(of_one[1:], runs.union, initial=())) for of_one in wanted)
        return Route(step, keys, grads)

    @property
    def size(self) -> int:
        return len(self.keys)

    def origin(self, rank: int, hop: int) -> int:
        """Whose keys `rank` has at a hop."""
        return (rank - hop * self.step) % self.size

    def keys_at(self, rank: int, hop: int) -> Runs:
        """The rows that `rank` gets for a hop, and has then."""
        return self.keys[self.origin(rank, hop)][hop]

    def grads_at(self, rank: int, hop: int) -> Runs:
        """The rows whose gradients `rank` sends on after a hop."""
        return self.grads[self.origin(rank, hop)][hop]

    def first_keys(self, rank: int, kept: Route | None) -> Runs:
        """What `rank` gets for hop 1 of a backward along this route after a forward along `kept`, whose last keys it still has."""
        rows = self.keys_at(rank, 1)
        opposite = kept is not None and (kept.step + self.step) % self.size == 0
        return runs.difference(rows, kept.keys_at(rank, self.size - 1)) if kept is not None and opposite else rows

    def sent_forward(self, rank: int) -> list[int]:
        """Rows in each message of a forward."""
        after = (rank + self.step) % self.size
        return _messages(self.keys_at(after, hop) for hop in range(1, self.size))

    def sent_backward(self, rank: int, kept: Route | None) -> tuple[list[int], list[int]]:
        """Rows in each message of keys, and of gradients, of a backward."""
        if self.size == 1:
            return [], []
        after = (rank + self.step) % self.size
        keys = [self.first_keys(after, kept), *(self.keys_at(after, hop) for hop in range(2, self.size))]
        return _messages(keys), _messages(self.grads_at(rank, hop) for hop in range(1, self.size))

    def came_home(self, rank: int) -> int:
        """Rows of gradients that `rank` gets in a backward: those found before each of its hops, and those of its own keys."""
        before = (self.grads[self.origin(rank, hop)][hop - 1] for hop in range(1, self.size))
        return sum(map(runs.count, (*before, self.grads[rank][-1])))


def _messages(sets: Iterable[Runs]) -> list[int]:
    return [runs.count(rows) for rows in sets if rows]


@dataclass(frozen=True, slots=True)
class Circle:
    """One route through one group. `tag` tells the messages of circles apart that are in flight together."""

    op: str
    group: SequenceGroup
    route: Route
    tag: int = 0

    def forward(self, own: Packed) -> Forward:
        """All keys that come by; `own` are this participant's. Sends what `Route.sent_forward` says."""
        here = own
        for hop in range(self.route.size):
            arriving = self._room(own, self._keys_at(hop + 1))
            leaving = here.part(self._keys_after(hop + 1)) if self._keys_after(hop + 1) else None
            pending = self._post(f"hop {hop}", [(leaving, arriving)])
            yield self._origin(hop), here
            pending.wait()
            if arriving is not None:
                here = arriving
            elif hop < self.route.size - 1:
                here = Packed.empty(own.tensors, ())
        return here

    def backward(
        self, own: Packed, own_grads: Packed, kept: Packed | None, forward: Route | None, own_first: bool = False
    ) -> Backward:
        """All keys again and room for their gradients; this participant's come together in `own_grads`.

        `kept` are the last keys of a forward along the route `forward`. Sends what `Route.sent_backward` says. The own keys come first
        if others have to be waited for, or if `own_first` says so, else last.
        """
        if self.route.size == 1:
            yield self.group.rank, own, own_grads
            return
        dtype, route, me = own_grads.tensors[0].dtype, self.route, self.group.rank
        missing = route.first_keys(me, forward)
        arriving = self._room(own, missing)
        theirs = route.first_keys((me + route.step) % route.size, forward)
        pending = self._post("first hop", [(own.part(theirs) if theirs else None, arriving)])
        own_first = own_first or bool(missing)
        if own_first:
            yield me, own, own_grads
        pending.wait()
        yield from self._round(own, self._first(own, kept, arriving), dtype, own_grads, None if own_first else (me, own, own_grads))

    def _first(self, own: Packed, kept: Packed | None, arrived: Packed | None) -> Packed:
        """The keys of hop 1, from what was kept and what has come."""
        rows = self._keys_at(1)
        for source in (kept, arrived):
            if source is not None and source.rows == rows:
                return source
        here = Packed.empty(own.tensors, rows)
        for source in (kept, arrived):
            if source is not None:
                here.put(source)
        return here

    def _round(
        self, own: Packed, here: Packed, dtype: torch.dtype, own_grads: Packed, last: tuple[int, Packed, Packed] | None
    ) -> Backward:
        """Hops 1 to P-1 of a backward, and the gradients' way home, while which `last` is worked on."""
        leaving: Packed | None = None
        for hop in range(1, self.route.size):
            onward, next_rows = self._keys_after(hop + 1), self._keys_at(hop + 1)
            coming = self._room(own, next_rows)
            found_before = self._room(own, self.route.grads[self._origin(hop)][hop - 1], dtype)
            pending = self._post(
                f"hop {hop}", [(here.part(onward) if onward else None, coming), (leaving, found_before)]
            )
            grads = Packed.empty(own.tensors, here.rows, dtype, zero=True)
            yield self._origin(hop), here, grads
            pending.wait()
            leaving = self._joined(grads, found_before, self.route.grads_at(self.group.rank, hop), own, dtype)
            del grads, found_before  # or they would be held while the next ones are made
            here = coming if coming is not None else Packed.empty(own.tensors, ())
        home = self._room(own, self.route.grads[self.group.rank][-1], dtype)
        pending = self._post(f"hop {self.route.size}", [(None, None), (leaving, home)])
        if last is not None:
            yield last
        pending.wait()
        if home is not None:
            own_grads.add(home)

    def _joined(self, share: Packed, before: Packed | None, rows: Runs, own: Packed, dtype: torch.dtype) -> Packed | None:
        """This hop's gradients and those of the hops before it."""
        if not rows:
            return None
        total = share if rows == share.rows else Packed.empty(own.tensors, rows, dtype, zero=True)
        for part in (share, before):
            if part is not None and part is not total:
                total.add(part)
        return total

    def _post(self, when: str, pairs: list[tuple[Packed | None, Packed | None]]) -> Pending:
        to, source = ((self.group.rank + way * self.route.step) % self.route.size for way in (1, -1))
        messages = [
            Message(to, leaving and leaving.message(), source, arriving and arriving.message(), 2 * self.tag + i)
            for i, (leaving, arriving) in enumerate(pairs)
        ]
        return post(self.op, self.group, f"{when} of {self.route.size}", messages)

    def _room(self, own: Packed, rows: Runs, dtype: torch.dtype | None = None) -> Packed | None:
        return Packed.empty(own.tensors, rows, dtype) if rows else None

    def _origin(self, hop: int) -> int:
        return self.route.origin(self.group.rank, hop)

    def _keys_at(self, hop: int) -> Runs:
        return self.route.keys_at(self.group.rank, hop) if hop < self.route.size else ()

    def _keys_after(self, hop: int) -> Runs:
        """What the next participant gets for a hop."""
        return self.route.keys_at((self.group.rank + self.route.step) % self.route.size, hop) if hop < self.route.size else ()


def in_step(walks: Iterable[Generator[Any, None, Any]]) -> Generator[Any, None, list[Any]]:
    """What several walks yield, step by step: all of them have posted their messages before anything of the step is worked on."""
    running = dict(enumerate(walks))
    returned: dict[int, Any] = {}
    while running:
        step = []
        for number, walk in list(running.items()):
            try:
                step.append(next(walk))
            except StopIteration as end:
                returned[number] = end.value
                del running[number]
        while step:
            yield step.pop(0)
    return [returned[number] for number in sorted(returned)]


def finish(walk: Generator[Any, None, Any], visit: Callable[..., None]) -> Any:
    """Do the work of every step of a walk; what the walk returns."""
    while True:
        try:
            step = next(walk)
        except StopIteration as end:
            return end.value
        visit(*step)
        del step  # it is not held while the next messages are made
