"""Whole steps and degrees: splits that the hardware can have, times and memory that add up, and what would fit when nothing does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseq.plan_model import plan_training
from autoseq.planner import NamedSite, make_plan
from autoseq.planning.choice import three_digits
from autoseq.planning.degrees import Split, candidates, splits
from autoseq.planning.model_cost import Collective, ModelCost, PassCost
from autoseq.planning.presets import load_topology
from autoseq.planning.sweep import overtakings, sweep, would_fit
from autoseq.planning.topology import KernelRates, Link, Rate, Topology
from autoseq.planning.training import Training
from autoseq.runtime.errors import PlanError, StrategyError, TopologyError
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site

H100 = load_topology("8xH100")


def training(*, batch: int = 8, seq_len: int = 8192, layers: int = 2, sharded: bool = False, window: int | None = None) -> Training:
    """Some layers of the size of Llama 3 8B's."""
    site = Site(
        batch=batch, q_len=seq_len, k_len=seq_len, heads=32, kv_heads=8, head_dim=128, value_dim=128, element_bytes=2,
        max_ahead=0, max_behind=window,
    )  # fmt: skip
    weights = 218_000_000 * layers
    cost = ModelCost(
        tokens=1024, ranks=1,
        forward=PassCost((("bfloat16", 2 * 1024 * weights),), 0, 1024 * 400_000 * layers, 20 * layers),
        backward=PassCost((("bfloat16", 4 * 1024 * weights),), 2 * weights, 1024 * 700_000 * layers, 40 * layers),
        reduced=(Collective("all_reduce", 2 * weights, layers),),
        exchanged=(),
        parameters=weights, trained=weights, parameter_bytes=2 * weights, gradient_bytes=2 * weights,
        kept_bytes=1024 * 200_000 * layers, largest_bytes=1024 * 28_672,
    )  # fmt: skip
    return Training(tuple(NamedSite(f"layers.{i}", "model.py:1", "k <= q", site) for i in range(layers)), cost, batch, seq_len, sharded)


# Splits ---------------------------------------------------------------------------------------------------------------

SPLITS = {
    "one rank": (1, 1, [Split(1, 1)]),
    "one sequence on a node": (8, 1, [Split(1, 8), Split(1, 8, (4, 2)), Split(1, 8, (2, 4))]),
    "copies of the data divide the batch": (
        8, 2, [Split(2, 4), Split(2, 4, (2, 2)), Split(1, 8), Split(1, 8, (4, 2)), Split(1, 8, (2, 4))]
    ),
    "a sequence fills whole nodes": (16, 1, [Split(1, 16), Split(1, 16, (2, 8))]),
    "a part of a node": (6, 1, [Split(1, 6), Split(1, 6, (3, 2)), Split(1, 6, (2, 3))]),
    "an odd part of a node": (3, 3, [Split(3, 1), Split(1, 3)]),
    "a batch that no number of copies divides": (8, 3, [Split(1, 8), Split(1, 8, (4, 2)), Split(1, 8, (2, 4))]),
}  # fmt: skip


@pytest.mark.parametrize(("ranks", "batch", "expected"), SPLITS.values(), ids=SPLITS)
def test_which_splits_there_are(ranks: int, batch: int, expected: list[Split]) -> None:
    assert list(splits(ranks, H100, batch=batch, seq_len=8192)) == expected


def test_a_sequence_has_a_token_for_each_rank() -> None:
    assert [split.sequence for split in splits(8, H100, batch=8, seq_len=3)] == [1, 2]


# Whole steps ----------------------------------------------------------------------------------------------------------


def test_copies_of_the_data_are_fastest_where_they_fit() -> None:
    found = candidates(training(batch=8), 8, H100)
    assert found[0].split == Split(8, 1)
    assert found[0].strategies == {"local": 2}
    assert [each.fits for each in found] == sorted((each.fits for each in found), reverse=True)
    fitting = [three_digits(each.seconds) for each in found if each.fits]
    assert fitting == sorted(fitting)


MORE, LATER = "it sends .* bytes more", "ring comes first in the list of strategies"


@pytest.mark.parametrize(
    ("heads", "chosen", "tied"),
    [
        pytest.param(8, "ulysses", {"ring": MORE, "bidirectional_ring": MORE, "gather_kv": MORE}, id="what sends less"),
        pytest.param(2, "ring", {"bidirectional_ring": LATER, "gather_kv": MORE}, id="what comes first, where others send as much"),
    ],
)
def test_times_that_are_the_same_in_three_digits_go_to_the_simpler_plan(heads: int, chosen: str, tied: dict[str, str]) -> None:
    """On links and memory that are never waited for, without a mask, nothing gains by a mesh, another layout or another strategy."""
    free = replace(H100, inside=Link(*[Rate(0.0, 1e30)] * 5), memory_bytes_per_s=1e30, launch_s=0.0)
    asked = training(batch=1, layers=1)
    (named,) = asked.sites
    unmasked = replace(named, site=replace(named.site, heads=heads, kv_heads=heads, max_ahead=None))
    best, *others = candidates(replace(asked, sites=(unmasked,)), 4, free)
    assert (best.split, best.plan.layout) == (Split(1, 4), "contiguous")
    assert all(three_digits(best.seconds) <= three_digits(each.seconds) for each in others)
    (site,) = best.plan.sites
    told = {name: why for name, reason in site.losers if (why := reason.partition(", which is the same in three digits; ")[2])}
    assert (site.strategy, list(told)) == (chosen, list(tied))
    assert all(re.fullmatch(tied[name], why) for name, why in told.items()), told


def test_losers_have_the_seconds_of_their_own_best_layout_and_name_it() -> None:
    """A causal ring is faster with zigzag rows; all heads on their rank take contiguous ones, of equally fast ones the simpler."""
    best = candidates(training(batch=1, seq_len=131072), 8, H100)[0]
    assert best.strategies == {"ulysses": 2} and best.plan.layout == "contiguous"
    site = best.plan.sites[0]
    layout, offer = site.best_offer("ring") or (None, None)
    assert layout == "zigzag" and offer is not None
    assert offer.seconds < next(each.seconds for each in site.offers if each.strategy == "ring")
    assert dict(site.losers)["ring"] == f"{offer.seconds:.3g} s a step with zigzag rows, ulysses {site.seconds:.3g}"
    ((refused, reason),) = best.plan.refused
    assert refused == "zigzag" and "the same in three digits; contiguous is simpler" in reason


def test_sharded_parameters_take_less_memory_and_not_less_time() -> None:
    whole, sharded = (candidates(training(sharded=sharded), 8, H100)[0] for sharded in (False, True))
    assert sharded.memory.parameters == whole.memory.parameters // 8
    assert sharded.memory.optimizer == whole.memory.optimizer // 8
    assert sharded.sent_bytes >= whole.sent_bytes


def test_mfu_counts_each_product_once() -> None:
    (best, *_) = candidates(training(batch=1), 1, H100)
    weights, tokens = 436_000_000, 8192
    pairs = 32 * 8192 * 8193 // 2
    flops = 6 * weights * tokens + 2 * 3 * 2 * pairs * 256
    assert best.mfu == pytest.approx(flops / best.seconds / H100.kernels["bfloat16"].peak_flops_per_s)
    assert best.tokens_per_s == pytest.approx(tokens / best.seconds)


def test_what_is_computed_again_takes_time_and_is_no_use() -> None:
    plain = training(batch=1)
    backward = plain.cost.backward
    once_more = replace(plain, cost=replace(plain.cost, backward=replace(backward, again=plain.cost.forward.flops)))
    assert once_more.step_flops == plain.step_flops
    (of_plain, *_), (of_more, *_) = candidates(plain, 1, H100), candidates(once_more, 1, H100)
    assert of_more.time.products_s == pytest.approx(of_plain.time.products_s * 4 / 3)
    assert of_more.mfu == pytest.approx(of_plain.mfu * of_plain.seconds / of_more.seconds)


def test_what_is_frozen_has_no_moments() -> None:
    whole = training(batch=1)
    adapters = replace(whole, cost=replace(whole.cost, trained=1000, gradient_bytes=2000))
    held = candidates(adapters, 1, H100)[0].memory
    assert (held.parameters, held.gradients, held.optimizer) == (whole.cost.parameter_bytes, 2000, 8 * 1000)


def test_a_model_with_windows_gets_a_mix() -> None:
    full, windowed = training(batch=1, seq_len=65536), training(batch=1, seq_len=65536, window=512)
    mixed = replace(full, sites=(full.sites[0], *(replace(named, name=f"{named.name} in a window") for named in windowed.sites)))
    slow = replace(H100, inside=Link(*[Rate(1e-5, 1e8)] * 5))
    best = candidates(mixed, 4, slow)[0]
    chosen = {planned.site.name: planned.strategy for planned in best.plan.sites}
    assert chosen["layers.0 in a window"] == chosen["layers.1 in a window"] == "halo"
    assert chosen["layers.0"] != "halo"


def test_what_cannot_be_split_is_an_error_that_says_why() -> None:
    with pytest.raises(PlanError, match=r"8 ranks cannot share a batch of 1 .*whole nodes of 8 or a part of one\. --batch 4 would work"):
        candidates(training(batch=1, seq_len=3), 8, H100)
    assert candidates(training(batch=4, seq_len=3), 8, H100)
    with pytest.raises(TopologyError, match="12 ranks"):
        candidates(training(batch=1), 12, H100)


def test_a_limit_that_nothing_fits_says_what_would() -> None:
    with pytest.raises(PlanError) as caught:
        plan_training(training(batch=1, seq_len=65536), world_size=4, topology=H100, memory_gib=8)
    message = str(caught.value)
    assert "no plan fits in 8.59 GB a rank: the smallest, 1 × 4" in message
    assert re.search(r"What would fit: .*tokens: [\d.]+ GB a rank", message)


@pytest.mark.parametrize(
    ("change", "of"),
    [
        pytest.param(r"\(--shard-parameters\)$", lambda asked: replace(asked, shard_parameters=True), id="sharded parameters"),
        pytest.param("^activation checkpointing", Training.checkpointed, id="layers computed again"),
        pytest.param("^a sequence of 32,768 tokens$", lambda asked: asked.at(seq_len=32768), id="a shorter sequence"),
    ],
)
def test_what_would_fit_does_and_needs_what_is_said(change: str, of: Callable[[Training], Training]) -> None:
    asked, limit = training(batch=1, seq_len=65536, layers=4), replace(H100, memory_bytes=int(19e9))
    assert not candidates(asked, 4, limit)[0].fits
    ((_, size),) = [each for each in would_fit(asked, 4, limit) if re.search(change, each[0])]
    best = candidates(of(asked), 4, limit)[0]
    assert best.fits and best.memory.total == size


def test_a_share_of_the_memory_is_kept_free() -> None:
    asked = training(batch=1)
    needs = plan_training(asked, world_size=4, topology=H100).best.memory.total
    limit = replace(H100, memory_bytes=int(needs * 1.04))
    assert plan_training(asked, world_size=4, topology=limit).best.memory.total == needs
    with pytest.raises(PlanError, match=r"more are kept free, --reserve"):
        plan_training(asked, world_size=4, topology=limit, strategy="ulysses", layout="contiguous", reserve=0.2)


def test_a_strategy_that_serves_no_split_is_an_error() -> None:
    with pytest.raises(StrategyError, match="strategy 'halo' cannot serve"):
        candidates(training(batch=1), 8, H100, strategy="halo")


def test_a_sweep_has_a_point_for_each_value_and_finds_where_strategies_overtake() -> None:
    points = sweep(training(batch=1, layers=1), 8, H100, "seq-len")
    assert [point.value for point in points] == [8192 * 2**k // 16 for k in range(9)]
    for point in points:
        assert point.best is not None
        alone = [seconds for seconds in point.seconds.values() if seconds is not None]
        assert three_digits(point.best.seconds) <= three_digits(min(alone))  # what is the same in three digits goes to the simpler
        assert point.seconds["halo"] is None and point.seconds["ring"] is not None
    for value, before, after in overtakings(points):
        assert value in [point.value for point in points] and before != after


def test_a_sweep_of_ranks_asks_for_those_that_fill_nodes() -> None:
    points = sweep(training(batch=1, layers=1), 16, load_topology("2x8xA800-4nic"), "world-size", strategy="ulysses")
    assert [point.value for point in points] == [1, 2, 4, 8, 16]


def test_a_sweep_of_a_part_of_a_node() -> None:
    points = sweep(training(batch=1, layers=1), 6, H100, "world-size", strategy="ring")
    assert [(point.value, point.best is not None) for point in points] == [(1, False), (2, True), (4, True), (6, True)]


# Properties -----------------------------------------------------------------------------------------------------------


def rates() -> st.SearchStrategy[Rate]:
    return st.builds(Rate, st.sampled_from([0.0, 1e-6, 1e-4]), st.sampled_from([1e8, 1e9, 1e10, 4e11]))


def links() -> st.SearchStrategy[Link]:
    return st.builds(Link, *[rates()] * 5, duplex=st.sampled_from(["full", "half"]), lanes=st.integers(1, 4))


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    kernels = {"bfloat16": KernelRates(*[draw(st.sampled_from([1e11, 1e14]))] * 4)}
    memory = draw(st.sampled_from([10**6, 10**7, 10**8, 10**9, 10**12]))
    return Topology("drawn", draw(st.sampled_from([2, 4, 8])), 1, draw(links()), draw(links()), kernels, memory, 1e11, 1e-6)


@st.composite
def drawn_sites(draw: st.DrawFn, P: int) -> Site:
    length, kv_heads = draw(st.sampled_from([64, 500, 4096])), draw(st.sampled_from([1, 2, 3]))
    window = draw(st.sampled_from([None, 0, 37, 999]))
    mesh = draw(st.sampled_from([(), (2, P // 2)])) if P >= 4 else ()
    return Site(
        batch=draw(st.integers(1, 2)), q_len=length, k_len=length, heads=kv_heads * draw(st.integers(1, 4)), kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 64])), value_dim=draw(st.sampled_from([16, 64])), element_bytes=2,
        max_ahead=draw(st.sampled_from([0, 0, None])) if window is None else 0, max_behind=window, mesh=mesh,
    )  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_no_strategy_beats_the_choice_and_no_choice_exceeds_memory_that_something_fits_in(data: st.DataObject) -> None:
    P = data.draw(st.sampled_from([2, 4, 8]))
    topology = data.draw(topologies())
    named = [NamedSite(f"site {i}", "model.py:1", "a mask", data.draw(drawn_sites(P))) for i in range(data.draw(st.integers(1, 2)))]
    chosen = make_plan(named, group_size=P, strategy="auto", layout="auto", topology=topology)
    assert chosen == make_plan(list(named), group_size=P, strategy="auto", layout="auto", topology=topology)
    single = len(named) == 1
    for layout in ("contiguous", "zigzag"):
        for name, strategy in STRATEGIES.items():
            if any(strategy.cannot_serve(each.site, P) or strategy.cannot_lay_out(layout) for each in named):  # type: ignore[arg-type]
                continue
            other = make_plan(named, group_size=P, strategy=name, layout=layout, topology=topology)
            if other.memory_bytes() <= topology.memory_bytes:
                assert chosen.memory_bytes() <= topology.memory_bytes
                assert not single or three_digits(chosen.seconds()) <= three_digits(other.seconds())  # three digits: `choice.three_digits`
            elif chosen.memory_bytes() > topology.memory_bytes:
                assert chosen.memory_bytes() <= other.memory_bytes()
