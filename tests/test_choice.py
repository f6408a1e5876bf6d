"""Choosing offers under a limit of memory: never over it while anything fits, and no site could do better by itself."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseq.planning.choice import Offer, choose, needed_bytes, smallest, taken

FAST_AND_LARGE, SLOW_AND_SMALL = Offer("fast", 1.0, 100, 10), Offer("slow", 3.0, 40, 10)
BUFFERED = Offer("buffered", 2.0, 40, 60)

CHOICES = {
    "all that is fast fits": ([[FAST_AND_LARGE, SLOW_AND_SMALL]] * 2, 210, ["fast", "fast"]),
    "one has to do with less": ([[FAST_AND_LARGE, SLOW_AND_SMALL]] * 2, 209, ["slow", "fast"]),
    "both have to": ([[FAST_AND_LARGE, SLOW_AND_SMALL]] * 2, 149, ["slow", "slow"]),
    "nothing fits": ([[FAST_AND_LARGE, SLOW_AND_SMALL]] * 2, 89, None),
    "buffers are there once, not for each site": ([[BUFFERED]] * 3, 180, ["buffered"] * 3),
    "a large buffer is the trouble": ([[BUFFERED, SLOW_AND_SMALL]] * 2, 139, ["slow", "slow"]),
    "of equally fast ones what sends less": ([[Offer("a", 1.0, 1, 0, 7), Offer("b", 1.0, 9, 0, 6)]], 9, ["b"]),
    "as fast in three digits is equally fast": ([[Offer("a", 1.001, 1, 0, 7), Offer("b", 1.004, 9, 0, 6)]], 9, ["b"]),
    "of equally fast ones the first": ([[Offer("a", 1.0, 9, 0), Offer("b", 1.0, 1, 0)]], 9, ["a"]),
    "of equally fast ones the first that fits": ([[Offer("a", 1.0, 9, 0), Offer("b", 1.0, 1, 0)]], 8, ["b"]),
    "memory is spent on what is better, not on what is faster in the fourth digit": (
        [[Offer("a", 1.0001, 100, 0, 10), Offer("b", 1.0, 100, 0, 20), Offer("c", 0.5, 1000, 0)]], 200, ["a"]
    ),
    "time is given where a byte costs least": (
        [[Offer("a", 1.0, 100, 0), Offer("b", 9.0, 0, 0)], [Offer("c", 1.0, 100, 0), Offer("d", 2.0, 0, 0)]], 100, ["a", "d"]
    ),
    "no sites": ([], 0, []),
}  # fmt: skip


@pytest.mark.parametrize(("sites", "limit", "expected"), CHOICES.values(), ids=CHOICES)
def test_what_is_chosen(sites: list[list[Offer]], limit: float, expected: list[str] | None) -> None:
    picks = choose(sites, limit)
    assert (picks if picks is None else [offer.strategy for offer in taken(sites, picks)]) == expected


OFFERS = st.builds(Offer, st.just("any"), st.integers(0, 9).map(float), st.integers(0, 9), st.integers(0, 9))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.lists(OFFERS, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 40))
def test_against_every_choice_there_is(sites: list[list[Offer]], limit: int) -> None:
    every = [[offers[i] for offers, i in zip(sites, picks, strict=True)] for picks in product(*(range(len(of)) for of in sites))]
    fitting = [offers for offers in every if needed_bytes(offers) <= limit]
    assert needed_bytes(taken(sites, smallest(sites))) == min(map(needed_bytes, every))
    picks = choose(sites, limit)
    assert (picks is None) == (not fitting)
    if picks is None:
        return
    chosen = taken(sites, picks)
    assert needed_bytes(chosen) <= limit
    for number, offers in enumerate(sites):
        for offer in offers:
            swapped = [*chosen[:number], offer, *chosen[number + 1 :]]
            assert needed_bytes(swapped) > limit or offer.worth >= chosen[number].worth
    if limit >= max(map(needed_bytes, every)):
        assert sum(o.seconds for o in chosen) == min(sum(o.seconds for o in offers) for offers in fitting)
