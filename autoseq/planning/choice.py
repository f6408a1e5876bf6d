"""The fastest choice of one offer for each site whose memory fits, as plain numbers.

What attentions keep for their backward adds up over the sites, the buffers of their messages do not: only one attention runs at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoseq.runtime.layout import Layout


@dataclass(frozen=True, slots=True)
class Offer:
    """What one strategy would take for one site: seconds of a step, bytes kept from forward to backward, and bytes while it runs."""

    strategy: str
    seconds: float
    kept_bytes: int
    buffer_bytes: int
    sent_bytes: int = 0  # by the rank that sends most; decides where two take equally long

    @property
    def worth(self) -> tuple[float, int]:
        """What is less is better."""
        return three_digits(self.seconds), self.sent_bytes


@dataclass(frozen=True, slots=True)
class Placed:
    """An offer, with the layout and the mesh that it is for."""

    offer: Offer
    layout: Layout
    mesh: tuple[int, ...]


def three_digits(x: float) -> float:
    """Seconds (or bytes) as plans tell them, with three digits: what differs in later ones takes equally long, and the simpler is taken.

    A prediction is not as exact as that. A wider band would let a plan be beaten by another's own prediction.
    """
    return float(f"{x:.3g}")


Picks = tuple[int, ...]
"""The number of the offer taken, site by site."""


def needed_bytes(offers: Sequence[Offer]) -> int:
    """What sites with these strategies hold at most."""
    return sum(offer.kept_bytes for offer in offers) + max((offer.buffer_bytes for offer in offers), default=0)


def taken(sites: Sequence[Sequence[Offer]], picks: Picks) -> list[Offer]:
    return [offers[pick] for offers, pick in zip(sites, picks, strict=True)]


def smallest(sites: Sequence[Sequence[Offer]]) -> Picks:
    """The choice that holds least; of several the one that is found first."""
    found = [_least_kept(sites, limit) for limit in _buffers(sites)]
    return min((picks for picks in found if picks is not None), key=lambda picks: needed_bytes(taken(sites, picks)))


def choose(sites: Sequence[Sequence[Offer]], limit_bytes: float) -> Picks | None:
    """A choice that fits and of which no site can take a better offer (`Offer.worth`) that still fits; None if nothing fits.

    Without a limit in the way it is each site's fastest offer, of equally fast ones (`three_digits`) what sends less, or the first.
    Otherwise the largest buffer is guessed, time is traded for memory where a byte costs the fewest seconds, and what is left over is
    spent again. Finding the very best choice is a knapsack problem, but what comes out fits whenever anything does.
    """
    fastest = tuple(min(range(len(offers)), key=lambda i, of=offers: of[i].worth) for offers in sites)
    if needed_bytes(taken(sites, fastest)) <= limit_bytes:
        return fastest
    found = [_within(sites, buffer, limit_bytes) for buffer in _buffers(sites)]
    fitting = [_improved(sites, picks, limit_bytes) for picks in found if picks is not None]
    return min(fitting, key=lambda picks: _seconds(sites, picks), default=None)


def _buffers(sites: Sequence[Sequence[Offer]]) -> list[int]:
    return sorted({offer.buffer_bytes for offers in sites for offer in offers})


def _seconds(sites: Sequence[Sequence[Offer]], picks: Picks) -> float:
    return sum(offer.seconds for offer in taken(sites, picks))


def _allowed(offers: Sequence[Offer], buffer: int) -> list[int]:
    return [i for i, offer in enumerate(offers) if offer.buffer_bytes <= buffer]


def _least_kept(sites: Sequence[Sequence[Offer]], buffer: int) -> Picks | None:
    allowed = [_allowed(offers, buffer) for offers in sites]
    if not all(allowed):
        return None
    return tuple(min(able, key=lambda i, of=offers: (of[i].kept_bytes, of[i].seconds)) for offers, able in zip(sites, allowed, strict=True))


def _within(sites: Sequence[Sequence[Offer]], buffer: int, limit_bytes: float) -> Picks | None:
    """From the fastest offers with such buffers downwards, until the rest fits."""
    least = _least_kept(sites, buffer)
    if least is None or needed_bytes(taken(sites, least)) > limit_bytes:
        return None
    allowed = [_allowed(offers, buffer) for offers in sites]
    picks = [min(able, key=lambda i, of=offers: of[i].worth) for offers, able in zip(sites, allowed, strict=True)]
    while needed_bytes(taken(sites, tuple(picks))) > limit_bytes:
        swaps = [
            ((offers[i].seconds - offers[pick].seconds) / (offers[pick].kept_bytes - offers[i].kept_bytes), number, i)
            for number, (offers, able, pick) in enumerate(zip(sites, allowed, picks, strict=True))
            for i in able
            if offers[i].kept_bytes < offers[pick].kept_bytes
        ]
        if not swaps:
            return least  # only buffers are in the way, and these have smaller ones
        _, number, i = min(swaps)
        picks[number] = i
    return tuple(picks)


def _improved(sites: Sequence[Sequence[Offer]], picks: Picks, limit_bytes: float) -> Picks:
    """Better offers where there is room for them, until there is none."""
    better = True
    while better:
        better = False
        for number, offers in enumerate(sites):
            for i in sorted(range(len(offers)), key=lambda i, of=offers: of[i].worth):
                if offers[i].worth >= offers[picks[number]].worth:
                    break
                swapped = (*picks[:number], i, *picks[number + 1 :])
                if needed_bytes(taken(sites, swapped)) <= limit_bytes:
                    picks, better = swapped, True
                    break
    return picks
