"""Whole steps and degrees: splits that the hardware can have, times and memory that add up, and what would fit when nothing does."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseq.planner import NamedSite, Plan, SitePlan, make_plan
from autoseq.planning.choice import Offer, Placed, three_digits
from autoseq.planning.degrees import Candidate, Split, beside_other_meshes, candidates, splits
from autoseq.planning.topology import KernelRates, Link, Rate, Topology
from autoseq.planning.training import Memory, StepTime, Training
from autoseq.readable import readable_seconds
from autoseq.runtime.errors import PlanError, StrategyError, TopologyError
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Cost, Site
from trainings import H100, training

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
    assert list(splits(training(batch=batch), ranks, H100)) == expected


def test_a_sequence_has_a_token_for_each_rank() -> None:
    assert [split.sequence for split in splits(training(seq_len=3), 8, H100)] == [1, 2]


def test_the_shortest_attention_has_a_token_for_each_rank() -> None:
    """As the text that an image looks at, which a run would refuse to split over more ranks than it has tokens."""
    asked = training(batch=8)
    (first, *others) = asked.sites
    short = replace(asked, sites=(replace(first, site=replace(first.site, k_len=5, max_ahead=None)), *others))
    assert [split.sequence for split in splits(short, 8, H100) if not split.mesh] == [1, 2, 4]
    with pytest.raises(PlanError, match=r"a sequence needs a token for each of its ranks \(an attention has 5\).* --batch 2 would work"):
        candidates(short.at(batch=1), 8, H100)


# Whole steps ----------------------------------------------------------------------------------------------------------


def test_copies_of_the_data_are_fastest_where_they_fit() -> None:
    found = candidates(training(batch=8), 8, H100)
    assert found[0].split == Split(8, 1)
    assert found[0].strategies == {"local": 2}
    assert [each.fits for each in found] == sorted((each.fits for each in found), reverse=True)
    fitting = [three_digits(each.seconds) for each in found if each.fits]
    assert fitting == sorted(fitting)


MORE, LATER = "it sends .* bytes more", "ring comes first in the list of strategies"


FREE = replace(H100, inside=Link(*[Rate(0.0, 1e30)] * 5), memory_bytes_per_s=1e30, launch_s=0.0)
"""Links and memory that are never waited for: plans differ by what they send, and not in time."""


def unmasked(heads: int, batch: int = 1) -> Training:
    asked = training(batch=batch, layers=1)
    (named,) = asked.sites
    return replace(asked, sites=(replace(named, site=replace(named.site, heads=heads, kv_heads=heads, max_ahead=None)),))


@pytest.mark.parametrize(
    ("heads", "chosen", "tied"),
    [
        pytest.param(8, "ulysses", {"ring": MORE, "bidirectional_ring": MORE, "gather_kv": MORE}, id="what sends less"),
        pytest.param(2, "ring", {"bidirectional_ring": LATER, "gather_kv": MORE}, id="what comes first, where others send as much"),
    ],
)
def test_times_that_are_the_same_in_three_digits_go_to_the_simpler_plan(heads: int, chosen: str, tied: dict[str, str]) -> None:
    """Without a mask nothing gains by another layout or another strategy."""
    plan = make_plan(unmasked(heads).sites, group_size=4, strategy="auto", layout="auto", topology=FREE)
    assert plan.layout == "contiguous"
    (site,) = plan.sites
    told = {name: why for name, reason in site.losers if (why := reason.partition(", which is the same in three digits; ")[2])}
    assert (site.strategy, list(told)) == (chosen, list(tied))
    assert all(re.fullmatch(tied[name], why) for name, why in told.items()), told


@pytest.mark.parametrize(
    ("asked", "heads", "first"),
    [
        pytest.param("auto", 8, Split(1, 8), id="all heads on their rank send less than any mesh"),
        pytest.param("auto", 2, Split(1, 8, (4, 2)), id="a mesh that sends less than any flat strategy"),
        pytest.param("hybrid", 8, Split(1, 8, (2, 4)), id="of two meshes the one that sends less"),
    ],
)
def test_plans_that_take_as_long_are_ordered_by_what_they_send(asked: str, heads: int, first: Split) -> None:
    found = candidates(unmasked(heads), 8, FREE, strategy=asked)
    assert found[0].split == first
    assert len({three_digits(each.seconds) for each in found}) == 1
    sent = [each.sent_bytes for each in found]
    assert sent == sorted(sent)


def test_plans_that_take_as_long_have_few_ranks_a_sequence_first() -> None:
    """Whatever they send: more copies of the data are simpler."""
    found = candidates(unmasked(8, batch=8), 8, FREE)
    assert [each.split.sequence for each in found if each.fits] == [1, 2, 4, 8]


# Losers on other meshes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hybrid", "hybrid_gather", "hybrid_outer", "hybrid_gather_outer", "double_ring"])
def test_a_loser_that_a_mesh_of_the_same_ranks_serves_has_its_seconds_there(name: str) -> None:
    """On one node a plan without a mesh is best, and `--strategy` plans the others on a mesh inside the node."""
    asked = training(batch=1, seq_len=131072, layers=1)
    best = candidates(asked, 8, H100)[0]
    (site,) = best.plan.sites
    alone = min((each.plan.sites[0] for each in candidates(asked, 8, H100, strategy=name)), key=lambda each: each.offer.worth)
    found = site.best_offer(name)
    assert best.split == Split(1, 8) and found is not None
    assert (found.offer.seconds, found.mesh) == (alone.seconds, alone.site.site.mesh)
    nodes, ranks = found.mesh
    seconds = rf"{readable_seconds(alone.seconds)} a step on a mesh of {nodes} × {ranks}( with zigzag rows)?, ulysses "
    assert re.match(seconds + re.escape(readable_seconds(site.seconds)), dict(site.losers)[name])


def test_a_loser_that_no_mesh_serves_says_why_not_as_on_a_mesh() -> None:
    asked = training(batch=1, layers=1)
    (named,) = asked.sites
    hiding = replace(named, site=replace(named.site, score="f_add(s, c0(b, 0, q, k))"))
    (site,) = candidates(replace(asked, sites=(hiding,)), 4, H100)[0].plan.sites
    for name, reason in site.losers:
        on_mesh = STRATEGIES[name].cannot_serve(replace(hiding.site, mesh=(2, 2)), 4)
        assert site.best_offer(name) is not None or reason == on_mesh, name


def test_a_loser_that_needs_a_mesh_says_so_where_no_mesh_is() -> None:
    best = candidates(training(batch=1), 2, H100)[0]
    assert best.split == Split(1, 2)
    assert "needs several nodes of several ranks" in dict(best.plan.sites[0].losers)["hybrid"]


LOST = {
    "slower": (dict(seconds=1.2), {}, {}, "1.2 s a step on a mesh of 2 × 2, ulysses 1 s"),
    "as fast, and sends more": (
        dict(sent_bytes=9), {}, {}, "1 s a step on a mesh of 2 × 2, ulysses 1 s, which is the same in three digits; it sends 2 bytes more"
    ),
    "faster, but the step is slower": (
        dict(seconds=0.9), dict(seconds=3.0), {}, "a whole step would take 3 s with that mesh, not 2 s"
    ),
    "faster, but the step takes as long and sends more": (
        dict(seconds=0.9), dict(sent_bytes=109), {}, "a whole step would take as long with that mesh, and it would send 9 bytes more"
    ),
    "as fast in a step that is the same": (
        {}, {}, {}, "a whole step would take as long with that mesh, and what is simpler comes first"
    ),
    "faster, but nothing fits there": (dict(seconds=0.9), dict(fits=False), {}, "no plan for that mesh fits"),
    "faster, with rows that the plan for its mesh has not": (
        dict(seconds=0.9), {}, dict(strategy="ring", layout="contiguous"), "but all attentions share one layout, contiguous"
    ),
    "faster, but not taken there either": (
        dict(seconds=0.9), {}, dict(strategy="ring", losers=(("hybrid", "it does not fit"),)), "on a mesh of 2 × 2: it does not fit"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("offer", "step", "there", "expected"), LOST.values(), ids=LOST)
def test_why_a_strategy_on_another_mesh_was_not_taken(
    offer: dict[str, Any], step: dict[str, Any], there: dict[str, Any], expected: str
) -> None:
    def candidate(mesh: tuple[int, ...], offers: tuple[Offer, ...], planned: dict[str, Any], of_step: dict[str, Any]) -> Candidate:
        site = NamedSite("a", "model.py:1", "k <= q", replace(training(batch=1).sites[0].site, mesh=mesh))
        taken = SitePlan(site, offers[0].strategy, "contiguous", Cost(0, 0, 0, 0), (), offers)
        layout = planned.get("layout", "contiguous")
        told = {"split": Split(1, 4, mesh), "sent_bytes": 100, "fits": True, "seconds": 2.0} | of_step
        time = StepTime(told.pop("seconds"), 0.0, 0.0, 0.0, 0.0)
        plan = Plan(layout, (replace(taken, **planned),))
        return Candidate(**told, plan=plan, time=time, memory=Memory(*[0] * 6), tokens_per_s=1.0, mfu=0.5)  # type: ignore[arg-type]

    lost = replace(Offer("hybrid", 1.0, 0, 0, 7), **offer)
    best = candidate((), (Offer("ulysses", 1.0, 0, 0, 7),), {"losers": (("hybrid", "it needs a mesh"),)}, {})
    if there.get("layout"):
        place, there = Placed(lost, "zigzag", (2, 2)), there | {"elsewhere": (Placed(lost, "zigzag", (2, 2)),)}
        other = candidate((2, 2), (Offer("ring", 1.0, 0, 0, 7),), there, step)
    else:
        place, other = Placed(lost, "contiguous", (2, 2)), candidate((2, 2), (lost, Offer("ring", 1.0, 0, 0, 7)), there, step)
    (told,) = beside_other_meshes(best, [best, other]).plan.sites
    assert told.best_offer("hybrid") == place
    assert dict(told.losers)["hybrid"].endswith(expected)


def test_losers_have_the_seconds_of_their_own_best_layout_and_name_it() -> None:
    """A causal ring is faster with zigzag rows; all heads on their rank take contiguous ones, of equally fast ones the simpler."""
    best = candidates(training(batch=1, seq_len=131072), 8, H100)[0]
    assert best.strategies == {"ulysses": 2} and best.plan.layout == "contiguous"
    site = best.plan.sites[0]
    found = site.best_offer("ring")
    assert found is not None and (found.layout, found.mesh) == ("zigzag", ())
    assert found.offer.seconds < next(each.seconds for each in site.offers if each.strategy == "ring")
    told = f"{readable_seconds(found.offer.seconds)} a step with zigzag rows, ulysses {readable_seconds(site.seconds)}"
    assert dict(site.losers)["ring"] == told
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


def test_a_strategy_that_serves_no_split_is_an_error() -> None:
    with pytest.raises(StrategyError, match="strategy 'halo' cannot serve"):
        candidates(training(batch=1), 8, H100, strategy="halo")


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
