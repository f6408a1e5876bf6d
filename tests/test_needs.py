"""Who holds which rows, who needs which, and what of it goes round a ring: sets of rows against plain Python sets and dense masks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_job import site_of
from autoseq.runtime import blocks, runs
from autoseq.runtime.circle import Route
from autoseq.runtime.holdings import Holdings
from autoseq.runtime.layout import Layout, local_length, rank_positions
from autoseq.runtime.mask import Mask
from autoseq.runtime.needs import Needs, NeedTerms, needs_of
from autoseq.runtime.runs import Runs
from autoseq.runtime.strategy import needs_of_site
from dense_attention import MASKS, Case
from dense_needs import as_set, dense_needs, rows_of

LAYOUTS: list[Layout] = ["contiguous", "zigzag"]
row_sets = st.frozensets(st.integers(0, 30))


def as_runs(rows: frozenset[int]) -> Runs:
    return runs.union(tuple((row, 1) for row in sorted(rows)))


@given(row_sets, row_sets, st.integers(0, 31))
def test_runs_are_sets(left: frozenset[int], right: frozenset[int], rows: int) -> None:
    a, b = as_runs(left), as_runs(right)
    assert all(start + rows < after for (start, rows), (after, _) in pairwise(a)), "ascending and not adjacent"
    assert as_set(a) == left and runs.count(a) == len(left)
    assert as_set(runs.union(a, b)) == left | right
    assert as_set(runs.intersection(a, b)) == left & right
    assert as_set(runs.difference(a, b)) == left - right
    assert as_set(runs.head(a, rows)) == set(sorted(left)[:rows])
    in_order = sorted(left)
    assert [in_order[place + i] for place, _, n in runs.offsets(b, a) for i in range(n)] == sorted(left & right)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("P", "places"), [(4, ()), (1, ()), (2, (0, 1, 2, 3)), (2, (0, 2, 1, 3)), (3, (0, 3, 1, 4, 2, 5))])
def test_a_participant_holds_its_ranks_rows_in_global_order(P: int, places: tuple[int, ...], layout: Layout) -> None:
    ranks = len(places) or P
    held = Holdings.of(P, layout, places)
    for n in (1, 7, 12, 29):
        s = local_length(n, ranks, layout)
        for participant in range(P):
            own = (places or tuple(range(P)))[participant * ranks // P : (participant + 1) * ranks // P]
            expected = torch.cat([rank_positions(rank, ranks, s, layout, "cpu") for rank in own]).sort().values.tolist()
            spans = held.spans(participant, s * ranks // P, n)
            found = [start + i for _, start, _, padded in spans for i in range(padded)]
            assert found == expected
            assert [local for local, *_ in spans] == [expected.index(start) for _, start, *_ in spans]
            assert sum(valid for *_, valid, _ in spans) == sum(position < n for position in expected)


@pytest.mark.parametrize("mask", MASKS)
def test_needs_are_what_the_dense_mask_says(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never less. Bounds are exact; a predicate is proven tile by tile, here of a single row and key, and of two."""
    for (q_len, k_len), P, layout, tile in product([(13, 13), (6, 15)], [1, 2, 3], LAYOUTS, [1, 2]):
        monkeypatch.setattr(blocks, "TILE", tile)
        case = Case(q_len, k_len, mask=mask, batch=2)
        own, rows = case.mask_case(), rows_of(case, P, layout)
        terms = NeedTerms(Mask(own.max_ahead, own.max_behind, own.predicate), own.captures, case.batch, range(case.heads), False)
        found, expected = needs_of(terms, rows, P), dense_needs(case, rows, P)
        everyone = range(P)
        assert all(expected[i][o] <= as_set(found[i][o]) for i in everyone for o in everyone)
        if not own.predicate:
            assert all(expected[i][o] == as_set(found[i][o]) for i in everyone for o in everyone)
        elif mask == "chunks" and P == 3 and layout == "contiguous" and q_len == k_len:
            bounds = needs_of(replace(terms, mask=replace(terms.mask, predicate="")), rows, P)
            assert sum(runs.count(s) for of in found for s in of) < sum(runs.count(s) for of in bounds for s in of)


def test_what_is_not_known_is_needed() -> None:
    """A predicate of tensors that are not at hand, and rows without keys whose value depends on all of them."""
    segments = site_of(Case(16, 16, mask="segments"))
    assert needs_of_site(segments, 4, "zigzag") == needs_of_site(replace(segments, predicate=""), 4, "zigzag")
    everything = needs_of_site(site_of(Case(16, 16, mask="none")), 4, "zigzag")
    assert needs_of_site(site_of(Case(16, 16, mask="only the future", empty_rows="uniform")), 4, "zigzag") == everything
    reached = site_of(Case(16, 16, mask="causal", empty_rows="uniform"))
    assert needs_of_site(reached, 4, "zigzag") == needs_of_site(replace(reached, empty_rows="zero"), 4, "zigzag")


@st.composite
def random_needs(draw: st.DrawFn) -> Needs:
    P = draw(st.integers(1, 5))
    return tuple(tuple(as_runs(draw(st.frozensets(st.integers(0, 5)))) for _ in range(P)) for _ in range(P))


@given(random_needs(), st.sampled_from([1, -1]), st.sampled_from([1, -1]))
def test_a_route_brings_what_is_needed_and_nothing_else(needs: Needs, step: int, back: int) -> None:
    """Forward and backward, for any needs at all; a gradient that was found comes home."""
    P = len(needs)
    route = Route.of(needs, step)
    for rank in range(P):
        for hop in range(1, P):
            origin = route.origin(rank, hop)
            assert as_set(needs[rank][origin]) <= as_set(route.keys_at(rank, hop)) <= set().union(*(as_set(of[origin]) for of in needs))
            if hop > 1:
                assert as_set(route.keys_at(rank, hop)) <= as_set(route.keys_at((rank - step) % P, hop - 1)), "only what came can go on"
        found = set().union(*(as_set(needs[other][rank]) for other in range(P) if other != rank))
        assert P == 1 or as_set(route.grads[rank][P - 1]) == found
    backward = Route.of(needs, back)
    for rank in range(P if P > 1 else 0):
        missing, kept = as_set(backward.first_keys(rank, route)), as_set(route.keys_at(rank, P - 1))
        assert missing <= as_set(backward.keys_at(rank, 1))
        assert (step + back) % P or missing | kept >= as_set(backward.keys_at(rank, 1))


@pytest.mark.parametrize(("layout", "share"), [("contiguous", 0.5), ("zigzag", 0.75)])
def test_a_causal_mask_saves_a_part_of_the_bytes(layout: Layout, share: float) -> None:
    """Three quarters of a ring's bytes with zigzag rows, half with contiguous ones (Brandon et al., and by counting pairs)."""
    causal, full = (needs_of_site(site_of(Case(64, 64, mask=mask)), 4, layout) for mask in ("causal", "none"))
    least = min(sum(sum(Route.of(causal, step).sent_forward(rank)) for rank in range(4)) for step in (1, -1))
    assert least == share * sum(sum(Route.of(full, 1).sent_forward(rank)) for rank in range(4))
