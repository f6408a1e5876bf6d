"""Who visits whom: what the strategies share whose ranks exchange rows directly (`halo`, `balanced`, queries that go round).

An asker whose queries may see keys of a holder makes a pair of participants. Either the keys go to the asker, or its queries go to the
holder: whoever travels is the guest, whoever stays and works is the host, and what the host finds goes home.

    guest     there, forward   home, forward       there, backward               home, backward
    keys      K, V             -                   K, V unless kept              dK, dV in float32
    queries   q                out, lse, float32   lse, grad_out, out, and q     dq in float32
                                                   unless kept

In round n a participant is host of the one n places before it and guest of the one n places after it. All of this follows from the
mask and the sizes, so all ranks know it without asking. `runtime/visit_op.py` does what is planned here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import sympy

from autoseq.runtime import blocks, runs, strategy
from autoseq.runtime.layout import Layout, local_length
from autoseq.runtime.mask import Mask
from autoseq.runtime.needs import Needs, Rows, fills_rows, within_bounds
from autoseq.runtime.runs import Runs
from autoseq.runtime.strategy import Site, accumulator_bytes, needs_of_site, rows_of_site, task_of, terms_of_site
from autoseq.runtime.timeline import Exchanges, Way, peers_of, sends_to
from autoseq.runtime.work_counts import Task, part_of

KEYS, QUERIES = range(2)
KINDS = (KEYS, QUERIES)

THERE, HOME = "there", "home"
"""The names of what guests bring and of what hosts send back."""

Guest = tuple[int, int]
"""(KEYS or QUERIES, participant)."""

Goes = Callable[[int, int, int], bool]
"""Whether the queries of an asker go to a holder, of P participants; otherwise the holder's keys go to the asker."""


@dataclass(frozen=True, slots=True)
class Visits:
    """`keys[host][guest]` and `queries[host][guest]`: the guest's local rows that go to the host."""

    keys: Needs
    queries: Needs

    def rows(self, kind: int, host: int, guest: int) -> Runs:
        return (self.keys, self.queries)[kind][host][guest]

    @property
    def rounds(self) -> tuple[int, ...]:
        """The rounds in which anybody is anybody's guest, neighbours first."""
        return _rounds(self)

    def guests(self, host: int) -> list[Guest]:
        """All that come to a host, in the order in which they come."""
        return _guests(self, host, self.rounds)

    def kept(self, host: int, elements: tuple[int, int], room: int | None) -> tuple[Guest, ...]:
        """The last guests whose rows, of so many elements of keys or of queries, a host has room for until the backward."""
        return self.kept_by_host(elements, room)[host]

    def kept_by_host(self, elements: tuple[int, int], room: int | None) -> tuple[tuple[Guest, ...], ...]:
        """The same of all hosts."""
        return _kept(self, elements, room)


@lru_cache(maxsize=256)
def _rounds(visits: Visits) -> tuple[int, ...]:
    size = len(visits.keys)
    held = {(host - guest) % size for host in range(size) for guest in range(size) for kind in KINDS if visits.rows(kind, host, guest)}
    return tuple(sorted(held, key=lambda n: (min(n, size - n), n)))


def _guests(visits: Visits, host: int, rounds: Sequence[int]) -> list[Guest]:
    comers = [(kind, (host - n) % len(visits.keys)) for n in rounds for kind in KINDS]
    return [(kind, guest) for kind, guest in comers if visits.rows(kind, host, guest)]


@lru_cache(maxsize=256)
def _kept(visits: Visits, elements: tuple[int, int], room: int | None) -> tuple[tuple[Guest, ...], ...]:
    rounds = visits.rounds  # found by their hash, which takes long among many ranks

    def of_host(host: int) -> tuple[Guest, ...]:
        kept, left = list[Guest](), room
        for kind, guest in reversed(_guests(visits, host, rounds)):
            if left is not None:
                left -= runs.count(visits.rows(kind, host, guest)) * elements[kind]
                if left < 0:
                    break
            kept.append((kind, guest))
        return tuple(reversed(kept))

    return tuple(of_host(host) for host in range(len(visits.keys)))


@lru_cache(maxsize=256)
def _visits(needs: Needs, rows: Rows, max_ahead: int | None, max_behind: int | None, goes: Goes) -> Visits:
    everyone = range(len(needs))
    # Seen from a key, the bounds change places: these are the queries that may see some key of a holder.
    turned = Rows(rows.k_holdings, rows.q_holdings, rows.t, rows.s, rows.k_len, rows.q_len)
    seeing = within_bounds(turned, max_behind, max_ahead, len(needs))

    def keys(asker: int, holder: int) -> Runs:
        return () if asker == holder or goes(asker, holder, len(needs)) else needs[asker][holder]

    def queries(holder: int, asker: int) -> Runs:
        goes_there = asker != holder and goes(asker, holder, len(needs)) and needs[asker][holder]
        return seeing[holder][asker] if goes_there else ()

    return Visits(*(tuple(tuple(of(host, guest) for guest in everyone) for host in everyone) for of in (keys, queries)))


def never(asker: int, holder: int, P: int) -> bool:
    """All keys go to whoever asks for them."""
    return False


def always(asker: int, holder: int, P: int) -> bool:
    """All queries go to the keys that they may see."""
    return True


@dataclass(frozen=True, slots=True)
class Manner:
    """How the participants of an attention visit each other.

    `early`: as many rounds ahead are messages posted; None: all at once. `keeps_all`: whatever came in the forward stays for the
    backward; otherwise the last that came, as far as they are no larger than a participant's own keys and values.
    """

    goes: Goes
    early: int | None = 1
    keeps_all: bool = False

    def visits(self, needs: Needs, rows: Rows, mask: Mask, *, fills: bool) -> Visits:
        """`fills`: a row without keys is worth something that depends on all keys, so no part of it may be computed elsewhere."""
        return _visits(needs, rows, mask.max_ahead, mask.max_behind, never if fills else self.goes)

    def room(self, own_elements: int) -> int | None:
        """How many elements a participant keeps, whose own keys and values are so many."""
        return None if self.keeps_all else own_elements

    def of_site(self, site: Site, P: int, layout: Layout) -> Visits:
        """The visits for a site, without what only the values of a tensor rule out."""
        terms, rows = terms_of_site(site), rows_of_site(site, P, layout)
        return self.visits(needs_of_site(site, P, layout), rows, terms.mask, fills=fills_rows(terms, rows))

    def exchanges(self, site: Site, P: int, layout: Layout, rank: int, way: Way) -> Exchanges:
        """What `rank` sends for a site in one pass, row by row of what its mask leaves: what goes there, and what goes home."""
        there, _, home = _sizes(self, site, P, layout, way, blocks.TILE)
        hosted, visited = (peers_of(enumerate(each)) for each in (there[rank], [of_host[rank] for of_host in there]))
        found, back = (peers_of(enumerate(each)) for each in (home[rank], [of_host[rank] for of_host in home]))
        return {THERE: sends_to("flat", visited, hosted), HOME: sends_to("flat", found, back)}

    def buffers(self, site: Site, P: int, layout: Layout, rank: int, way: Way) -> int:
        """The most bytes that messages hold at once: of the rounds under way, of the one worked on, and of those on their way home."""
        rounds = self._rounds(site, P, layout, rank, way)
        if way == "backward":
            rounds.reverse()
        ahead, most, before = len(rounds) if self.early is None else self.early, 0, 0
        for i, here in enumerate(rounds):
            posted = sum(each.on_the_way for each in rounds[i + 1 : i + 1 + ahead])
            most = max(most, posted + here.on_the_way + before, posted + here.came + here.on_the_way_home + before)
            before = here.on_the_way_home
        return most

    def _rounds(self, site: Site, P: int, layout: Layout, rank: int, way: Way) -> list[_Bytes]:
        there, arriving, home = _sizes(self, site, P, layout, way, blocks.TILE)
        pairs = [((rank + n) % P, (rank - n) % P) for n in self.of_site(site, P, layout).rounds]
        rounds = [(there[host][rank], arriving[rank][guest], home[rank][guest], home[host][rank]) for host, guest in pairs]
        return [_Bytes(*map(sum, messages)) for messages in rounds]

    def tasks(self, site: Site, P: int, layout: Layout, rank: int, way: Way) -> list[Task]:
        """What `rank` computes for itself, and for each guest whose queries come."""
        came_home = sum(each.back for each in self._rounds(site, P, layout, rank, way)) // accumulator_bytes(site)
        visits, rows = self.of_site(site, P, layout), rows_of_site(site, P, layout)
        own, heads = tuple(rows.keys(rank)), range(site.heads)
        keys = [own, *(part_of(rows.keys(guest), visits.keys[rank][guest]) for guest in range(P))]
        guests = (part_of(rows.queries(guest), visits.queries[rank][guest]) for guest in range(P))
        return [
            task_of(rows, rank, filter(None, keys), heads, site.kv_heads, came_home),
            *(Task(queries, (own,), heads, site.kv_heads, own) for queries in guests if queries),
        ]

    def counts(self, site: Site, P: int, layout: Layout, rank: int) -> dict[sympy.Symbol, int]:
        """The values of this module's symbols for full shards and a mask without a predicate."""
        s, t = (local_length(n, P, layout) for n in (site.q_len, site.k_len))
        visits = self.of_site(replace(site, q_len=s * P, k_len=t * P, predicate="", score="", empty_rows="zero"), P, layout)
        elements = _row_elements(site)
        by_host = visits.kept_by_host(elements, self.room(t * elements[KEYS]))
        kept = {(kind, guest, host) for host, guests in enumerate(by_host) for kind, guest in guests}
        counts = dict.fromkeys((KEYS_SENT, KEYS_AGAIN, KEYS_HOSTED, QUERIES_SENT, QUERIES_AGAIN, QUERIES_HOSTED), 0)
        for kind, (sent, again, hosted) in enumerate(_SYMBOLS):
            for other in range(P):
                if visits.rows(kind, other, rank):
                    counts[sent] += 1
                    counts[again] += (kind, rank, other) not in kept
                counts[hosted] += bool(visits.rows(kind, rank, other))
        return counts


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Of one round on a rank: what goes to its host, room for its guest's, what goes home to the guest, and room for what comes home."""

    left: int
    came: int
    found: int
    back: int

    @property
    def on_the_way(self) -> int:
        return self.left + self.came

    @property
    def on_the_way_home(self) -> int:
        return self.found + self.back


Sizes = tuple[tuple[tuple[int, ...], ...], ...]
"""sizes[host][guest][kind]: the bytes of a message."""


@lru_cache(maxsize=8)
def _sizes(manner: Manner, site: Site, P: int, layout: Layout, way: Way, tile: int) -> tuple[Sizes, Sizes, Sizes]:
    """What guests bring, what of that needs room of its own on arrival, and what hosts send back; all ranks ask for the same.

    Who needs what is proven in tiles of that size.
    """
    visits, elements = manner.of_site(site, P, layout), _row_elements(site)
    room = manner.room(local_length(site.k_len, P, layout) * elements[KEYS])
    kept = [set(guests) for guests in visits.kept_by_host(elements, room)]
    values = site.heads * site.value_dim
    e, a = site.element_bytes, accumulator_bytes(site)
    results, given = (values + site.heads) * a, 2 * values * e + site.heads * a

    def there(kind: int, host: int, guest: int, rows: int, *, arriving: bool = False) -> int:
        again = 0 if (kind, guest) in kept[host] and (arriving or way == "backward") else elements[kind] * e
        lse = given if way == "backward" and kind == QUERIES else 0
        return site.batch * rows * (again + lse)

    def home(kind: int, host: int, guest: int, rows: int) -> int:
        return site.batch * rows * (elements[kind] * a if way == "backward" else results if kind == QUERIES else 0)

    everyone = range(P)
    counts = [[[runs.count(visits.rows(kind, host, guest)) for kind in KINDS] for guest in everyone] for host in everyone]

    def sizes(size: Callable[[int, int, int, int], int]) -> Sizes:
        def of_pair(host: int, guest: int) -> tuple[int, ...]:
            return tuple(size(kind, host, guest, counts[host][guest][kind]) for kind in KINDS)

        return tuple(tuple(of_pair(host, guest) for guest in everyone) for host in everyone)

    return sizes(there), sizes(partial(there, arriving=True)), sizes(home)


def _row_elements(site: Site) -> tuple[int, int]:
    """Of a row of keys and values, and of queries."""
    return site.kv_heads * (site.head_dim + site.value_dim), site.heads * site.head_dim


# How many shards of keys, and of queries, a rank sends, sends again in the backward, and hosts.
KEYS_SENT, KEYS_AGAIN, KEYS_HOSTED = sympy.symbols("n_k m_k h_k", nonnegative=True, integer=True)
QUERIES_SENT, QUERIES_AGAIN, QUERIES_HOSTED = sympy.symbols("n_q m_q h_q", nonnegative=True, integer=True)
_SYMBOLS = ((KEYS_SENT, KEYS_AGAIN, KEYS_HOSTED), (QUERIES_SENT, QUERIES_AGAIN, QUERIES_HOSTED))


def work_formulas() -> dict[str, sympy.Expr]:
    """`Strategy.work_formulas` where whole shards visit: of a rank's own keys and of all its guests."""
    met = 1 + KEYS_HOSTED + QUERIES_HOSTED
    s, t, H, K = strategy.s, strategy.t, strategy.H, strategy.K
    kept = strategy.saved_formula(H, K, s, t) + strategy.B * K * t * (strategy.D + strategy.V) * strategy.e
    return {"pairs": strategy.B * H * s * t * met, "kept_bytes": kept}


def formulas() -> dict[str, sympy.Expr]:
    """The fields of `Cost` where whole shards visit, in the symbols of this module and of `strategy`."""
    keys = strategy.B * strategy.t * strategy.K * (strategy.D + strategy.V)
    rows, D, V, e, a = strategy.B * strategy.s * strategy.H, strategy.D, strategy.V, strategy.e, strategy.a
    return {
        "forward_bytes": keys * KEYS_SENT * e + rows * (QUERIES_SENT * D * e + QUERIES_HOSTED * (V + 1) * a),
        "backward_bytes": keys * (KEYS_AGAIN * e + KEYS_HOSTED * a)
        + rows * (QUERIES_SENT * (2 * V * e + a) + QUERIES_AGAIN * D * e + QUERIES_HOSTED * D * a),
        "forward_messages": KEYS_SENT + QUERIES_SENT + QUERIES_HOSTED,
        "backward_messages": KEYS_AGAIN + KEYS_HOSTED + QUERIES_SENT + QUERIES_HOSTED,
    }
