"""What a pass of an attention consists of, as a planner's clock needs it: messages by name, and which of them travel under which work.

A strategy says what a rank sends by the kind of message (`Exchange`), what it computes (`Work`), and in which order (`Phase`). Phases
are formulas in shares: of the pass's work, and of each exchange. What a topology makes of them is the planner's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import sympy

Way = Literal["forward", "backward"]
WAYS: tuple[Way, Way] = ("forward", "backward")

MessageKind = Literal["send", "all_to_all", "all_gather", "reduce_scatter", "all_reduce"]

Scope = Literal["flat", "inside", "across"]
"""Among all ranks of the sequence, among those of a node, or among those at one place of each node."""


ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another rank of the sequence, and what goes to it or comes from it in all."""

    rank: int
    bytes: int
    messages: int


Peers = tuple[Peer, ...]


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one rank sends in one pass for one purpose, in as many messages.

    `to` and `came` say whom it sends that to, and what it gets of whom; a collective that goes round a ring sends to the next rank. They
    are known where nothing was extrapolated.
    """

    kind: MessageKind
    scope: Scope
    bytes: int
    messages: int
    to: Peers = ()
    came: Peers = ()


Exchanges = dict[str, Exchange]
"""By the names that phases use. Every name of a pass is there where there are several ranks, also with nothing to send."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """What of one rank's exchange goes to other nodes and comes from there, in how many messages; and how many stay inside its node."""

    sent_bytes: int
    came_bytes: int
    messages: int
    inside_messages: int


def crossing(exchange: Exchange, rank: int, ranks_per_node: int) -> Crossing:
    """That of `rank` where nodes of so many ranks lie beside each other. A collective is one message wherever it goes."""
    node = rank // ranks_per_node
    sent, came = ([peer for peer in peers if peer.rank // ranks_per_node != node] for peers in (exchange.to, exchange.came))
    crossed, inside = max(_messages(sent), _messages(came)), exchange.messages - _messages(sent)
    if exchange.kind != "send":
        stays = len(sent) < len(exchange.to) or len(came) < len(exchange.came)
        crossed, inside = (exchange.messages if sent or came else 0), (exchange.messages if stays else 0)
    return Crossing(sum(peer.bytes for peer in sent), sum(peer.bytes for peer in came), crossed, inside)


def peers_of(parts: Iterable[tuple[int, Iterable[int]]]) -> Peers:
    """From the sizes of messages to or from ranks, of which some are empty and not sent."""
    sizes: dict[int, list[int]] = {}
    for rank, each in parts:
        sizes.setdefault(rank, []).extend(size for size in each if size)
    return tuple(Peer(rank, sum(each), len(each)) for rank, each in sizes.items() if each)


def sends_to(scope: Scope, to: Peers, came: Peers) -> Exchange:
    """Point-to-point messages to and from these ranks."""
    return Exchange("send", scope, sum(peer.bytes for peer in to), _messages(to), to, came)


def _messages(peers: Sequence[Peer]) -> int:
    return sum(peer.messages for peer in peers)


@dataclass(frozen=True, slots=True)
class Phase:
    """Work and messages that run side by side, so many times one after the other; what follows begins when both are done.

    `work` is a share of the pass's work and `sends` are shares of exchanges by name, each time. Over all phases they add up to 1, but
    for an exchange that has no messages.
    """

    work: sympy.Expr
    sends: tuple[tuple[str, sympy.Expr], ...] = ()
    times: sympy.Expr = ONE


@dataclass(frozen=True, slots=True)
class Step:
    """A phase in numbers."""

    work: float
    sends: tuple[tuple[str, float], ...]
    times: int


@dataclass(frozen=True, slots=True)
class Work:
    """What one rank computes in one pass.

    `pairs` are those of a query and a key, for each batch element and query head, that the mask leaves; `launches` calls of a kernel;
    `merged_elements` what their results, and those that come home, add to in memory: out and lse forward, dq, dk and dv backward.

    What kernels are given for that is more, counted likewise: rectangles without a mask (`full_pairs`), squares of which they know the
    diagonal (`causal_pairs`, those past it too, in `causal_rows`), and tiles with a tensor that says what is allowed (`masked_pairs`).

    `packed_bytes` are those of buffers that heads, or keys for a gather, are copied into before they travel, or out of afterwards.
    """

    pairs: int
    launches: int
    merged_elements: int
    full_pairs: int = 0
    causal_pairs: int = 0
    causal_rows: int = 0
    masked_pairs: int = 0
    packed_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def computed_pairs(self, attention_tile: int) -> int:
        """What kernels compute that leave out keys past a diagonal in pieces of `attention_tile`, and nothing else.

        Row i of a square of n rows has i + 1 keys rounded up to pieces: in all n² up to a piece, else (n² + n · piece) / 2 if pieces fit.
        """
        in_pieces = (self.causal_pairs + attention_tile * self.causal_rows) // 2
        return self.full_pairs + min(self.causal_pairs, in_pieces) + self.masked_pairs


NO_WORK = Work(0, 0, 0)


def flops(pairs: int, head_dim: int, value_dim: int, way: Way) -> int:
    """Of the matrix products: two forward; five backward, for the scores are computed again."""
    return 2 * pairs * (head_dim + value_dim if way == "forward" else 3 * head_dim + 2 * value_dim)


def steps(phases: Iterable[Phase], sizes: Mapping[sympy.Symbol, int]) -> tuple[Step, ...]:
    """The phases at some sizes, without what does not occur."""
    values = {symbol: sympy.Integer(size) for symbol, size in sizes.items()}

    def sends(phase: Phase) -> tuple[tuple[str, float], ...]:
        shares = ((name, float(share.xreplace(values))) for name, share in phase.sends)
        return tuple((name, share) for name, share in shares if share)

    counted = [(phase, int(phase.times.xreplace(values))) for phase in phases]
    return tuple(Step(float(phase.work.xreplace(values)), sends(phase), times) for phase, times in counted if times > 0)


def pipeline(rounds: sympy.Expr, there: str | None, home: str | None, *, first_work: sympy.Expr = ZERO) -> tuple[Phase, ...]:
    """Rounds of work, at least one: what each needs comes under the work before it, what it has found leaves under the work after it.

        there    0           1          2     ...   -        -
        work     first_work  0          1     ...   last     -
        home     -           -          0     ...   before   last

    The rounds share equally in what `first_work` leaves of the work.
    """
    share, work = 1 / rounds, (1 - first_work) / rounds
    several = sympy.Min(1, rounds - 1)

    def sends(of_there: sympy.Expr, of_home: sympy.Expr) -> tuple[tuple[str, sympy.Expr], ...]:
        named = ((there, of_there), (home, of_home))
        return tuple((name, part) for name, part in named if name is not None and part != 0)

    return _occurring(
        Phase(first_work, sends(share, ZERO)),
        Phase(work, sends(several * share, ZERO)),
        Phase(work, sends(share, share), sympy.Max(0, rounds - 2)),
        Phase(work, sends(ZERO, share), several),
        Phase(ZERO, sends(ZERO, share)),
    )


def homeward_pipeline(rounds: sympy.Expr, there: str, home: str, *, last_work: sympy.Expr) -> tuple[Phase, ...]:
    """Rounds of work of which the first has all it needs, so that one less comes; `last_work` is done under the last way home."""
    share, work = 1 / rounds, (1 - last_work) / rounds
    coming, several = 1 / sympy.Max(1, rounds - 1), sympy.Min(1, rounds - 1)
    return _occurring(
        Phase(work, ((there, several * coming),)),
        Phase(work, ((there, coming), (home, share)), sympy.Max(0, rounds - 2)),
        Phase(work, ((home, share),), several),
        Phase(last_work, ((home, share),)),
    )


def alone(*names: str) -> tuple[Phase, ...]:
    """Messages that nothing is computed under, one exchange after the other."""
    return tuple(Phase(ZERO, ((name, ONE),)) for name in names)


def substituted(phases: Sequence[Phase], symbols: Mapping[sympy.Symbol, sympy.Expr]) -> tuple[Phase, ...]:
    """The phases in other symbols."""
    return tuple(
        Phase(phase.work.xreplace(symbols), tuple((name, x.xreplace(symbols)) for name, x in phase.sends), phase.times.xreplace(symbols))
        for phase in phases
    )


def nested(outer: Sequence[Phase], inner: Sequence[Phase]) -> tuple[Phase, ...]:
    """The inner phases within each of the outer ones: what that sends is spread over their work."""
    return tuple(
        Phase(
            around.work * phase.work,
            (
                *((name, share * phase.work) for name, share in around.sends if phase.work != 0),
                *((name, share * around.work) for name, share in phase.sends),
            ),
            around.times * phase.times,
        )
        for around in outer
        for phase in inner
    )


def repeated(phases: Sequence[Phase], times: sympy.Expr) -> tuple[Phase, ...]:
    """The phases so many times each; with 1 or 0, whether they occur."""
    return tuple(Phase(phase.work, phase.sends, phase.times * times) for phase in phases)


def _occurring(*phases: Phase) -> tuple[Phase, ...]:
    return tuple(phase for phase in phases if phase.times != 0 and (phase.work != 0 or phase.sends))
