"""The phases of a pass: each has its share, and nothing is left out; and heads, which are exchanged as formulas say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_job import layouts_of, site_of
from autoseq.runtime import strategy as symbols
from autoseq.runtime.head_costs import HEADS, ROWS
from autoseq.runtime.layout import Layout
from autoseq.runtime.mask import Mask
from autoseq.runtime.stages import STAGES
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site, cost_of, evaluated
from autoseq.runtime.timeline import WAYS, Phase, flops, homeward_pipeline, nested, pipeline, steps
from autoseq.runtime.work_counts import pairs_within
from dense_attention import Case

MESHES: dict[int, tuple[int, ...]] = {2: (), 3: (), 4: (2, 2), 6: (2, 3)}
NAMES = [name for name in STRATEGIES if name != "local"]

WIDE = Site(batch=1, q_len=4096, k_len=4096, heads=8, kv_heads=4, head_dim=64, value_dim=64, element_bytes=4)
CASES = {
    "even": Case(16, 16, batch=2, mask="none"),
    "more ranks than KV heads": Case(16, 16, heads=8, kv_heads=1, dtype=torch.bfloat16, mask="none"),
    "uneven heads": Case(16, 16, heads=9, kv_heads=3, mask="none"),
    "some ranks without heads": Case(16, 16, heads=2, kv_heads=1, mask="none"),
    "cross attention, padded": Case(7, 21, value_dim=5, mask="none"),
    "few queries": Case(8, 64, kv_heads=2, mask="none", dtype=torch.bfloat16),
    "causal, padded": Case(13, 13),
    "a window": Case(32, 32, mask="window"),
    "a window on both sides, other lengths": Case(24, 19, mask="window on both sides"),
    "rows without keys that are worth a mean of all": Case(16, 16, mask="only the future", empty_rows="uniform"),
}
SITES = {name: site_of(case) for name, case in CASES.items()} | {
    "a prefix": site_of(Case(24, 24, mask="prefix", kv_heads=2)),
    "segments that a tensor tells": site_of(Case(23, 23, batch=2, mask="segments")),
    "several stages": WIDE,
    "several stages, a window": replace(WIDE, max_ahead=0, max_behind=100),
}


def asked() -> Iterator[tuple[str, str, Site, int, Layout]]:
    """Strategy, case, site, ranks and layout of all that can be served."""
    for (case, site), (P, mesh) in product(SITES.items(), MESHES.items()):
        on_mesh = replace(site, mesh=mesh)
        for name in NAMES:
            if STRATEGIES[name].cannot_serve(on_mesh, P) is None:
                for layout in layouts_of(name):
                    yield name, case, on_mesh, P, layout


def test_every_strategy_is_asked() -> None:
    assert {name for name, *_ in asked()} == set(NAMES)


def check_heads(name: str, site: Site, P: int, layout: Layout) -> None:
    """Whatever the mask, the formulas of `ulysses` say what goes to the ranks of a head and back; along a dim of a mesh, in one stage."""
    strategy, formulas = STRATEGIES[name], STRATEGIES["ulysses"].formulas()
    among = {} if name == "ulysses" else {symbols.P: site.mesh[ALONG[name]], STAGES: 1}
    for rank in range(P):
        exchanges = [strategy.exchanges(site, P, layout, rank, way) for way in WAYS]
        of_heads = [{of: each for of, each in of_way.items() if of in (ROWS, HEADS)} for of_way in exchanges]
        expected = evaluated(formulas, strategy.sizes(site, P, layout, rank) | among)
        assert cost_of(*of_heads) == expected, (name, site, P, layout, rank)


ALONG = {"hybrid": 1, "hybrid_gather": 1, "hybrid_outer": 0, "hybrid_gather_outer": 0}
"""The dim of the mesh along which a strategy trades heads."""


def test_heads_are_exchanged_as_the_formulas_say() -> None:
    for name, _, site, P, layout in asked():
        if name in ("ulysses", *ALONG):
            check_heads(name, site, P, layout)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_without_a_mask_all_that_ulysses_and_hybrids_send_is_in_their_formulas(layout: Layout) -> None:
    full = replace(WIDE, q_len=6144, k_len=6144)  # shards without padding
    sites = [replace(full, mesh=mesh, heads=heads, kv_heads=heads // 2) for mesh in ((2, 2), (2, 3)) for heads in (2, 8, 18)]
    for site, name in product(sites, ("ulysses", *ALONG)):
        P = site.mesh[0] * site.mesh[1]
        for rank in range(P):
            assert STRATEGIES[name].cost(site, P, layout, rank) == STRATEGIES[name].full_cost(site, P, layout, rank), (name, site, rank)


def test_phases_leave_nothing_out() -> None:
    """The shares of the work, and of every exchange that sends something, add up to 1, and phases name no other exchanges."""
    named = {(name, way): {of for phase in STRATEGIES[name].phases(way) for of, _ in phase.sends} for name in NAMES for way in WAYS}
    for name, case, site, P, layout in asked():
        strategy = STRATEGIES[name]
        for way in WAYS:
            exchanges = strategy.exchanges(site, P, layout, 0, way)
            assert named[name, way] <= set(exchanges), (name, way)
            found = strategy.steps(site, P, layout, 0, way)
            assert sum(step.times * step.work for step in found) == pytest.approx(1), (name, case, P, way)
            for of, exchange in exchanges.items():
                share = sum(step.times * part for step in found for to, part in step.sends if to == of)
                assert not exchange.bytes or share == pytest.approx(1), (name, case, P, layout, way, of)


@st.composite
def sites(draw: st.DrawFn) -> Site:
    """Any lengths, heads and bounds, on two nodes of two ranks; also long enough for several stages."""
    kv_heads, scale = draw(st.integers(1, 6)), draw(st.sampled_from([1, 1, 512]))
    q_len, k_len = draw(st.integers(1, 40)) * scale, draw(st.integers(1, 40)) * scale
    bounds = [draw(st.none() | st.integers(-3, 30)) for _ in range(2)]
    return Site(
        batch=draw(st.integers(1, 2)), q_len=q_len, k_len=draw(st.sampled_from([q_len, k_len])), heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads, head_dim=64, value_dim=draw(st.sampled_from([64, 32])), element_bytes=draw(st.sampled_from([2, 4, 8])),
        max_ahead=bounds[0], max_behind=bounds[1], mesh=(2, 2), empty_rows=draw(st.sampled_from(["zero", "uniform"])),
    )  # fmt: skip


@given(sites(), st.sampled_from(get_args(Layout)))
@settings(max_examples=60, deadline=None)
def test_of_any_site_nothing_is_left_out(site: Site, layout: Layout) -> None:
    """Heads are exchanged as the formulas say, and between all ranks each pair is computed once."""
    queries, keys = (0, 0, site.q_len), (0, 0, site.k_len)
    pairs = site.batch * site.heads * pairs_within(Mask(site.max_ahead, site.max_behind), queries, keys)
    for name in NAMES:
        strategy = STRATEGIES[name]
        if strategy.cannot_serve(site, 4) is not None or layout not in layouts_of(name):
            continue
        if name in ("ulysses", *ALONG):
            check_heads(name, site, 4, layout)
        for way in WAYS:
            assert sum(strategy.work(site, 4, layout, rank, way).pairs for rank in range(4)) == pairs, name


def test_one_rank_sends_nothing_and_only_works() -> None:
    site = site_of(Case(16, 16))
    for name, strategy in STRATEGIES.items():
        for way in WAYS:
            assert strategy.exchanges(site, 1, "contiguous", 0, way) == {}, name
            assert [step.work for step in strategy.steps(site, 1, "contiguous", 0, way)] == [1.0], name
            assert strategy.work(site, 1, "contiguous", 0, way).pairs == 4 * 16 * 17 // 2, name
            assert strategy.buffer_bytes(site, 1, "contiguous", 0, way) == 0, name


c = sympy.Symbol("c", positive=True, integer=True)
HOMEWARD = homeward_pipeline(c, "in", "out", last_work=1 / (c + 1))
PIPELINES = {
    "one stage hides nothing": (pipeline(c, "in", "out"), 1, "in|work|out"),
    "two stages": (pipeline(c, "in", "out"), 2, "in|work in|work out|out"),
    "four stages": (pipeline(c, "in", "out"), 4, "in|work in|work in out|work in out|work out|out"),
    "nothing goes home": (pipeline(c, "in", None), 3, "in|work in|work in|work"),
    "work that is there at once": (pipeline(c, "in", None, first_work=1 / (c + 1)), 3, "work in|work in|work in|work"),
    "the first is there, the own is last": (HOMEWARD, 3, "work in|work in out|work out|work out"),
    "a single hop back": (HOMEWARD, 1, "work|work out"),
}


@pytest.mark.parametrize(("phases", "rounds", "expected"), PIPELINES.values(), ids=PIPELINES)
def test_what_runs_side_by_side(phases: tuple[Phase, ...], rounds: int, expected: str) -> None:
    found = []
    for step in steps(phases, {c: rounds}):
        parts = (["work"] if step.work else []) + [name for name, _ in step.sends]
        found += [" ".join(parts)] * step.times
    assert "|".join(found) == expected


def test_a_circle_inside_a_circle() -> None:
    """Three nodes of two ranks: what goes across is spread over the work inside."""
    across = pipeline(sympy.Integer(2), "across", None, first_work=sympy.Rational(1, 3))
    inside = pipeline(sympy.Integer(1), "inside", None, first_work=sympy.Rational(1, 2))
    found = [step for step in steps(nested(across, inside), {}) for _ in range(step.times)]
    assert [round(6 * step.work) for step in found] == [1] * 6
    assert [dict(step.sends).get("across", 0) for step in found] == [0.25] * 4 + [0] * 2
    assert [bool(dict(step.sends).get("inside")) for step in found] == [True, False] * 3


def test_flops_of_a_pair() -> None:
    """Scores and values forward; backward the scores again, and the gradients of weights, values, queries and keys."""
    assert flops(10, 3, 5, "forward") == 2 * 10 * 8
    assert flops(10, 3, 5, "backward") == 2 * 10 * (3 + 5 + 5 + 3 + 3)


SITE = Site(batch=2, q_len=4096, k_len=4096, heads=8, kv_heads=4, head_dim=64, value_dim=64, element_bytes=2, max_ahead=0, mesh=(2, 2))
KINDS = {
    ("ulysses", "forward"): {"rows": ("all_to_all", "flat"), "heads": ("all_to_all", "flat")},
    ("ring", "backward"): {"keys": ("send", "flat"), "gradients": ("send", "flat")},
    ("gather_kv", "backward"): {"keys": ("all_to_all", "flat"), "gradients": ("all_to_all", "flat")},
    ("balanced", "forward"): {"there": ("send", "flat"), "home": ("send", "flat")},
    ("hybrid", "forward"): {"rows": ("all_to_all", "inside"), "heads": ("all_to_all", "inside"), "keys": ("send", "across")},
    ("hybrid_outer", "forward"): {"rows": ("all_to_all", "across"), "heads": ("all_to_all", "across"), "keys": ("send", "inside")},
    ("double_ring", "forward"): {"across_keys": ("send", "across"), "inside_keys": ("send", "inside")},
}


@pytest.mark.parametrize(("name", "way"), KINDS)
def test_kinds_of_messages_and_who_exchanges_them(name: str, way: str) -> None:
    found = STRATEGIES[name].exchanges(SITE, 4, "contiguous", 3, way)  # type: ignore[arg-type]
    assert {of: (each.kind, each.scope) for of, each in found.items()} == KINDS[name, way]


def test_without_a_mask_everything_is_gathered() -> None:
    found = STRATEGIES["gather_kv"].exchanges(replace(SITE, max_ahead=None), 4, "contiguous", 0, "backward")
    assert {of: each.kind for of, each in found.items()} == {"keys": "all_gather", "gradients": "reduce_scatter"}


def test_every_layout_is_asked() -> None:
    assert {layout for *_, layout in asked()} == set(get_args(Layout))
