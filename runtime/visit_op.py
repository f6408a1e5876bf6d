"""Turns a plan of visits (`runtime/visits.py`) into an attention op: posts the messages, works on what comes, sends home what was found.

    post round 1; work on one's own keys
    for each round:  post the next one; wait; work on what came; send home what was found; add what came home from the round before

So the messages of a round travel under the work of the one before it. In the backward the rounds come in reverse: what was kept of
the forward is worked on first, and one's own keys last, under the last gradients' way home. Every sum has one order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from autoseq.runtime import runs
from autoseq.runtime.attention_op import AttentionOp, Kept, attention_op
from autoseq.runtime.blockwise import Backward, Forward
from autoseq.runtime.messages import Message, Pending, post
from autoseq.runtime.needs import fills_rows
from autoseq.runtime.op_call import Call
from autoseq.runtime.packed import Packed, elements
from autoseq.runtime.plain import accumulate_dtype
from autoseq.runtime.visits import KEYS, KINDS, QUERIES, Guest, Manner, Visits


def visiting_op(name: str, manner: Manner, kept: Kept) -> AttentionOp:
    """Register the op; `kept` is at least what `manner` keeps of any mask."""

    def forward(call: Call, work: Forward) -> Tensor | None:
        if call.participants == 1:
            work.add(call.k, call.v, call.all_keys)
            return None
        trip = _ForwardTrip(name, call, manner, work)
        trip.run(trip.visits.rounds, manner.early)
        return trip.buffer

    def backward(call: Call, work: Backward, left: Tensor) -> tuple[Tensor, Tensor]:
        dk, dv = (x.new_zeros(x.shape, dtype=work.dq.dtype) for x in (call.k, call.v))
        if call.participants == 1:
            work.add(call.k, call.v, call.all_keys, dk, dv)
        else:
            trip = _BackwardTrip(f"{name}_backward", call, manner, work, (dk, dv), left)
            trip.run(trip.visits.rounds[::-1], manner.early)
        return dk, dv

    return attention_op(name, forward, backward, kept=kept)


Both = list[Packed | None]
"""Keys, then queries, or what belongs to them."""


@dataclass(frozen=True, slots=True)
class _Round:
    """One round under way. `left` is what must not be freed before it has arrived elsewhere."""

    number: int
    pending: Pending
    left: Both
    came: Both


class _Trip(ABC):
    """The rounds of a forward or a backward."""

    def __init__(self, op: str, call: Call, manner: Manner) -> None:
        self.op, self.call, self.me = op, call, call.me
        fills = fills_rows(call.terms, call.rows)
        self.visits: Visits = manner.visits(call.needs, call.rows, call.problem.mask, fills=fills)
        key, query = (sum(x.shape[1] * x.shape[3] for x in tensors) for tensors in ((call.k, call.v), (call.q,)))
        self.kept_by = partial(self.visits.kept, elements=(key, query), room=manner.room(call.k.shape[2] * key))

    @abstractmethod
    def leaving(self, kind: int, host: int) -> Packed | None:
        """What goes to a host."""

    @abstractmethod
    def room(self, kind: int, guest: int) -> Packed | None:
        """Where a guest's rows arrive."""

    @abstractmethod
    def work_on(self, kind: int, guest: int, came: Packed | None) -> Packed | None:
        """Work on a guest's rows; what goes home."""

    @abstractmethod
    def home(self, kind: int, host: int) -> Packed | None:
        """Where it arrives what a host has found."""

    @abstractmethod
    def add(self, kind: int, found: Packed) -> None:
        """Add what came home."""

    @abstractmethod
    def own(self) -> None:
        """Work on this rank's own queries and keys."""

    @abstractmethod
    def own_first(self, first: _Round | None) -> bool:
        """Whether to do that while the first round is under way, or while the last results are."""

    def run(self, rounds: Sequence[int], early: int | None) -> None:
        ahead = len(rounds) if early is None else early
        under_way = deque(self._set_out(number) for number in rounds[:ahead])
        own_first = self.own_first(under_way[0] if under_way else None)
        if own_first:
            self.own()
        before: _Round | None = None
        for i in range(len(rounds)):
            under_way.extend(self._set_out(number) for number in rounds[i + ahead : i + ahead + 1])
            returning = self._received(under_way.popleft())
            self._add(before)
            before = returning
        if not own_first:
            self.own()
        self._add(before)

    def _set_out(self, number: int) -> _Round:
        host, guest = self._partners(number)
        left, came = ([of(kind, who) for kind in KINDS] for of, who in ((self.leaving, host), (self.room, guest)))
        return self._posted(number, f"round {number}", left, came, host, guest, 0)

    def _received(self, arrived: _Round) -> _Round:
        """Work on what comes in a round and send home what was found."""
        arrived.pending.wait()
        number, came = arrived.number, arrived.came
        del arrived  # or what has left would be held under the work
        host, guest = self._partners(number)
        found = [self.work_on(kind, guest, came[kind]) if self.visits.rows(kind, self.me, guest) else None for kind in KINDS]
        back: Both = [self.home(kind, host) if self.visits.rows(kind, host, self.me) else None for kind in KINDS]
        return self._posted(number, f"the way home from round {number}", found, back, guest, host, len(KINDS))

    def _posted(self, number: int, when: str, left: Both, came: Both, to: int, source: int, first_tag: int) -> _Round:
        pairs = enumerate(zip(left, came, strict=True), first_tag)
        messages = [Message(to, x and x.message(), source, y and y.message(), tag) for tag, (x, y) in pairs]
        return _Round(number, post(self.op, self.call.group, when, messages), left, came)

    def _add(self, returning: _Round | None) -> None:
        if returning is not None:
            returning.pending.wait()
            for kind, found in enumerate(returning.came):
                if found is not None:
                    self.add(kind, found)

    def _partners(self, number: int) -> tuple[int, int]:
        """The host and the guest of a round."""
        return (self.me + number) % self.call.participants, (self.me - number) % self.call.participants

    def _shared_out(self, buffer: Tensor | None, *, like: Sequence[tuple[Tensor, ...]]) -> tuple[dict[Guest, Packed], Tensor]:
        """Views of what is kept, guest by guest, in a buffer that is made if there is none."""
        kept = self.kept_by(self.me)
        parts = [(like[kind], self.visits.rows(kind, self.me, guest)) for kind, guest in kept]
        if buffer is None:
            buffer = self.call.k.new_empty(sum(elements(*part) for part in parts))
        return dict(zip(kept, Packed.split(buffer, parts), strict=True)), buffer


class _ForwardTrip(_Trip):
    """Brings keys to queries and queries to keys, and (out, lse) home."""

    def __init__(self, op: str, call: Call, manner: Manner, work: Forward) -> None:
        super().__init__(op, call, manner)
        self._work = work
        self._likes = ((call.k, call.v), (call.q,))
        self._kept, self.buffer = self._shared_out(None, like=self._likes)
        rows = call.q.new_empty((), dtype=accumulate_dtype(call.q.dtype)).expand(*call.q.shape[:3], 1)
        self._result_like = (rows.expand(*call.q.shape[:3], call.v.shape[3]), rows)

    def leaving(self, kind: int, host: int) -> Packed | None:
        return _part(self._likes[kind], self.visits.rows(kind, host, self.me))

    def room(self, kind: int, guest: int) -> Packed | None:
        rows = self.visits.rows(kind, self.me, guest)
        return self._kept.get((kind, guest)) or (Packed.empty(self._likes[kind], rows) if rows else None)

    def work_on(self, kind: int, guest: int, came: Packed | None) -> Packed | None:
        assert came is not None
        call = self.call
        if kind == KEYS:
            k, v = came.tensors
            self._work.add(k, v, came.chunks(call.keys_of(guest)))
            return None
        chunks, keys = came.chunks(call.rows.queries(guest)), call.keys_of(self.me)
        work = Forward(came.tensors[0], call.k.shape[1], call.v.shape[3], chunks, keys, call.problem.for_guests())
        work.add(call.k, call.v, keys)
        out, lse = work.result()
        return Packed((out, lse[..., None]), came.rows).part(came.rows)

    def home(self, kind: int, host: int) -> Packed | None:
        return Packed.empty(self._result_like, self.visits.rows(kind, host, self.me)) if kind == QUERIES else None

    def add(self, kind: int, found: Packed) -> None:
        out, lse = found.tensors
        for place, start, rows in runs.offsets(found.rows, found.rows):
            at = slice(place, place + rows)
            self._work.add_result(out[:, :, at], lse[:, :, at, 0], slice(start, start + rows))

    def own(self) -> None:
        self._work.add(self.call.k, self.call.v, self.call.keys_of(self.me))

    def own_first(self, first: _Round | None) -> bool:
        return True


class _BackwardTrip(_Trip):
    """Brings them together again, as far as they are not still there, and the gradients home."""

    def __init__(self, op: str, call: Call, manner: Manner, work: Backward, grads: tuple[Tensor, Tensor], left: Tensor) -> None:
        super().__init__(op, call, manner)
        self._work, self._dtype = work, work.dq.dtype
        grad_out, out, lse = work.given()
        # First in a message, so that it is aligned; as elements of q's dtype, so that all travel in one.
        lse = lse.contiguous()[..., None].view(call.q.dtype)
        self._keys, self._queries = (call.k, call.v), (lse, grad_out, out, call.q)
        self._kept, _ = self._shared_out(left, like=(self._keys, (call.q,)))
        self._grads = (Packed.whole(grads), Packed.whole((work.dq,)))

    def _travelling(self, kind: int, host: int, guest: int) -> tuple[Tensor, ...]:
        """Tensors like those that go to a host that has not kept them."""
        kept = (kind, guest) in self.kept_by(host)
        if kind == KEYS:
            return () if kept else self._keys
        return self._queries[:-1] if kept else self._queries

    def leaving(self, kind: int, host: int) -> Packed | None:
        return _part(self._travelling(kind, host, self.me), self.visits.rows(kind, host, self.me))

    def room(self, kind: int, guest: int) -> Packed | None:
        rows, like = self.visits.rows(kind, self.me, guest), self._travelling(kind, self.me, guest)
        return Packed.empty(like, rows) if rows and like else None

    def work_on(self, kind: int, guest: int, came: Packed | None) -> Packed | None:
        kept = self._kept.get((kind, guest))
        if kind == KEYS:
            keys = kept or came
            assert keys is not None
            found = Packed.empty(keys.tensors, keys.rows, self._dtype, zero=True)
            (k, v), (dk, dv) = keys.tensors, found.tensors
            self._work.add(k, v, keys.chunks(self.call.keys_of(guest)), dk, dv)
            return found
        assert came is not None
        lse, grad_out, out, *again = came.tensors
        (q,) = kept.tensors if kept is not None else again
        lse = lse.view(self._dtype)[..., 0]
        keys = self.call.keys_of(self.me)
        work = self._work.of_guests(grad_out, q, out, lse, came.chunks(self.call.rows.queries(guest)), keys)
        work.add(self.call.k, self.call.v, keys, *self._grads[KEYS].tensors)
        return Packed((work.dq,), came.rows, work.dq.view(-1))

    def home(self, kind: int, host: int) -> Packed | None:
        return Packed.empty((self._keys, self._queries[-1:])[kind], self.visits.rows(kind, host, self.me), self._dtype)

    def add(self, kind: int, found: Packed) -> None:
        self._grads[kind].add(found)

    def own(self) -> None:
        self._work.add(self.call.k, self.call.v, self.call.keys_of(self.me), *self._grads[KEYS].tensors)

    def own_first(self, first: _Round | None) -> bool:
        return first is None or any(arriving is not None for arriving in first.came)


def _part(tensors: tuple[Tensor, ...], rows: runs.Runs) -> Packed | None:
    """Some rows of tensors that are still where the program has them."""
    return Packed.whole(tensors).part(rows) if rows and tensors else None
