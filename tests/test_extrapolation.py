"""What is told of many ranks by few: the same as counted one by one, wherever that can be waited for."""

from __future__ import annotations

import time
from dataclasses import replace
from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoseq.runtime import extrapolation
from autoseq.runtime.extrapolation import EXACT_RANKS, Case, cases_of, quadratic_samples, samples
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site, Strategy
from autoseq.runtime.timeline import WAYS, Exchanges

ROWS = 8
BASE = Site(batch=1, q_len=0, k_len=0, heads=4, kv_heads=2, head_dim=4, value_dim=4, element_bytes=2)
MASKS = {
    "no mask": BASE,
    "causal": replace(BASE, max_ahead=0),
    "a window of few shards": replace(BASE, max_ahead=0, max_behind=19),
    "a window on both sides": replace(BASE, max_ahead=5, max_behind=9),
}
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@given(st.integers(1, 5000), st.data())
def test_what_is_linear_is_found_exactly(size: int, data: st.DataObject) -> None:
    """In the number of ranks and in the place among them; the samples are small, and lie in their lines."""
    place = data.draw(st.integers(0, size - 1))
    a, b, c = (data.draw(st.integers(-9, 9)) for _ in range(3))
    found = samples(size, place)
    assert sum(each.weight * (a + b * each.size + c * each.place) for each in found) == a + b * size + c * place
    assert all(0 <= each.place < each.size <= EXACT_RANKS for each in found)


@given(st.integers(2, 600), st.sampled_from([2, 8, 16, 72]), st.lists(st.integers(-9, 9), min_size=3, max_size=3))
def test_what_is_quadratic_is_found_exactly(size: int, together: int, factors: list[int]) -> None:
    def value(x: int) -> int:
        return factors[0] + factors[1] * x + factors[2] * x * x

    assert sum((each.weight * value(each.size) for each in quadratic_samples(size, together=together)), Fraction(0)) == value(size)


def test_few_ranks_stand_for_themselves() -> None:
    case = Case(replace(BASE, q_len=512, k_len=512), EXACT_RANKS, "zigzag", 5)
    assert cases_of(case) == (case,)
    assert len(cases_of(replace(case, group_size=EXACT_RANKS + 1))) > 1


def test_long_bounds_keep_their_ratio_and_short_ones_their_length() -> None:
    P = 1024
    site = replace(BASE, q_len=ROWS * P, k_len=2 * ROWS * P, max_ahead=ROWS * P, max_behind=17)
    for case in cases_of(Case(site, P, "contiguous", 0)):
        assert (case.site.q_len, case.site.k_len) == (ROWS * case.group_size, 2 * ROWS * case.group_size)
        assert (case.site.max_ahead, case.site.max_behind) == (ROWS * case.group_size, 17)


def names_on(mesh: tuple[int, ...]) -> list[str]:
    """The strategies that serve a causal window there."""
    site = replace(MASKS["a window of few shards"], q_len=1024, k_len=1024, mesh=mesh)
    names = [name for name, strategy in STRATEGIES.items() if strategy.cannot_serve(site, 128) is None]
    return [name for name in names if not mesh or STRATEGIES[name].cannot_serve(replace(site, mesh=()), 128)]


def asked(P: int, mesh: tuple[int, ...]) -> list[tuple[str, str, Site, Layout]]:
    sites = {mask: replace(site, q_len=ROWS * P, k_len=ROWS * P, mesh=mesh) for mask, site in MASKS.items()}
    return [
        (name, mask, site, layout)
        for name in names_on(mesh)
        for mask, site in sites.items()
        if STRATEGIES[name].cannot_serve(site, P) is None
        for layout in LAYOUTS
        if STRATEGIES[name].cannot_lay_out(layout) is None
    ]


def without_peers(exchanges: Exchanges) -> Exchanges:
    """Of many ranks it is not told who they are."""
    return {name: replace(each, to=(), came=()) for name, each in exchanges.items()}


@pytest.mark.parametrize(("P", "mesh"), [(65, ()), (70, ()), (80, (10, 8))], ids=str)
def test_extrapolated_is_counted(P: int, mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, messages and work of ranks at both ends and in the middle, for masks that the bounds decide."""
    ranks = sorted({0, 1, P // 3, P // 2, P - 2, P - 1})
    wrong = []
    for name, mask, site, layout in asked(P, mesh):
        strategy = STRATEGIES[name]
        for rank in ranks:
            for way in WAYS:
                told = without_peers(strategy.exchanges(site, P, layout, rank, way)), strategy.work(site, P, layout, rank, way)
                with monkeypatch.context() as patch:
                    patch.setattr(extrapolation, "EXACT_RANKS", P)
                    counted = without_peers(strategy.exchanges(site, P, layout, rank, way)), strategy.work(site, P, layout, rank, way)
                if told != counted:
                    wrong.append((name, mask, layout, rank, way, told, counted))
    assert not wrong, f"{len(wrong)}: " + "\n".join(map(str, wrong[:5]))


@pytest.mark.parametrize("shards", [40, 64])
def test_long_windows_are_near(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The busiest rank's bytes and pairs, of a window that is neither short nor everything."""
    P = 128
    site = replace(BASE, q_len=ROWS * P, k_len=ROWS * P, max_ahead=0, max_behind=ROWS * shards)
    for name in names_on(()):
        strategy = STRATEGIES[name]

        def busiest(strategy: Strategy = strategy) -> tuple[int, int]:
            ranks = range(0, P, 9)
            sent = max(strategy.cost(site, P, "contiguous", rank).step_bytes for rank in ranks)
            return sent, max(strategy.work(site, P, "contiguous", rank, "forward").pairs for rank in ranks)

        told = busiest()
        with monkeypatch.context() as patch:
            patch.setattr(extrapolation, "EXACT_RANKS", P)
            assert told == pytest.approx(busiest(), rel=0.15), name


@pytest.mark.parametrize("mesh", [(), (512, 8)], ids=["flat", "on a mesh"])
def test_thousands_of_ranks_take_no_time(mesh: tuple[int, ...]) -> None:
    """Everything a planner asks of a rank, for each strategy within seconds on a slow machine."""
    P = 4096
    site = replace(MASKS["a window of few shards"], q_len=1024 * P, k_len=1024 * P, max_behind=4096, heads=32, kv_heads=8, mesh=mesh)
    for name in names_on(mesh):
        strategy, layout = STRATEGIES[name], "contiguous"
        start = time.process_time()
        for way in WAYS:
            assert strategy.exchanges(site, P, layout, P // 2, way)
            assert strategy.crossings(site, P, layout, P // 2, way, 8)
            assert strategy.steps(site, P, layout, P // 2, way)
            strategy.work(site, P, layout, P // 2, way)
            strategy.buffer_bytes(site, P, layout, P // 2, way)
        assert strategy.cost(site, P, layout, P // 2).step_bytes > 0
        assert time.process_time() - start < 10, name
