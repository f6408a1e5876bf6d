"""Strategies of two levels give one device's attention on real meshes, and send what their costs say."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import sympy

from attention_checks import SHAPES, TERMS, check_all
from attention_job import LEVELS, SPLIT, attend_on_rank, axes_of, layouts_of, runs_of, serves, site_of
from autoseq.runtime import circle
from autoseq.runtime import strategy as symbols
from autoseq.runtime.blockwise import Forward
from autoseq.runtime.groups import SequenceGroup
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site
from autoseq.runtime.ulysses import OWN_HEADS, OWN_KV_HEADS, SENT_KV_HEADS
from dense_attention import MASKS, Case
from ranks import run_ranks
from traffic_job import CASES, FULL, count_on_rank

MASKED = {mask: Case(23, 23, mask=mask, batch=2, heads=6, kv_heads=3, value_dim=5, seed=3) for mask in MASKS}
ACROSS = {f"{mask}, across": replace(case, q_len=9, k_len=22) for mask, case in MASKED.items() if mask in ("none", "key padding", "window")}
FURTHER = {name: replace(Case(11, 11, batch=2, heads=4, kv_heads=2, value_dim=5, seed=7), **terms) for name, terms in TERMS.items()}
SMALL = {name: case for name, case in SHAPES.items() if case.q_len < 100}


@pytest.mark.parametrize("strategy", LEVELS)
def test_two_nodes_of_two_ranks(strategy: str) -> None:
    """Any shape, mask and term, in both layouts: uneven and missing heads, padding, rows of other lengths."""
    check_all(4, runs_of(strategy, 4, SMALL | MASKED | ACROSS | FURTHER, (2, 2)), mesh=(2, 2))


@pytest.mark.parametrize("mesh", [(2, 3), (4, 2)], ids=str)
def test_dims_of_different_sizes(mesh: tuple[int, int]) -> None:
    P = mesh[0] * mesh[1]
    cases = {name: Case(37, 37, mask=name, batch=2, heads=5, kv_heads=5, seed=1) for name in ("causal", "window", "segments")}
    cases["grouped"] = Case(29, 29, heads=4, kv_heads=2)
    runs = {f"{strategy}, {name}": run for strategy in LEVELS for name, run in runs_of(strategy, P, cases, mesh).items()}
    check_all(P, runs, mesh=mesh)


def test_counted_equals_cost() -> None:
    """To the byte and to the message, also where the mask rules rows out or a rank has no heads."""
    for mesh in [(2, 2), (2, 3)]:
        P = mesh[0] * mesh[1]
        named = {f"{strategy}, {name}": run for strategy in LEVELS for name, run in runs_of(strategy, P, CASES, mesh).items()}
        counted = run_ranks(count_on_rank, P, list(named.values()), mesh, backend="autoseq_counted")
        wrong = []
        for i, (name, (strategy, layout, case)) in enumerate(named.items()):
            expected = [STRATEGIES[strategy].cost(site_of(case, mesh), P, layout, rank) for rank in range(P)]
            if [of_rank[i] for of_rank in counted] != expected:
                wrong.append(f"{name}: {[of_rank[i] for of_rank in counted]} is not {expected}")
        assert named and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("strategy", LEVELS)
def test_costs_are_the_formulas_and_masks_make_them_less(strategy: str) -> None:
    for (name, case), mesh, layout in product(CASES.items(), [(2, 2), (4, 2)], layouts_of(strategy)):
        P = mesh[0] * mesh[1]
        if serves(strategy, case, P, mesh):
            for rank in range(P):
                asked = (site_of(case, mesh), P, layout, rank)
                cost, full = STRATEGIES[strategy].cost(*asked), STRATEGIES[strategy].full_cost(*asked)
                assert name not in FULL or cost == full, name
                assert cost.forward_bytes <= full.forward_bytes and cost.backward_bytes <= full.backward_bytes, name


def test_every_strategy_of_two_levels_is_tested_here() -> None:
    site = Site(batch=1, q_len=16, k_len=16, heads=4, kv_heads=4, head_dim=8, value_dim=8, element_bytes=4, mesh=(2, 2))
    on_a_mesh = [name for name, strategy in STRATEGIES.items() if strategy.cannot_serve(site, 4) is None]
    assert [name for name in on_a_mesh if STRATEGIES[name].cannot_serve(replace(site, mesh=()), 4) is not None] == LEVELS
    assert not set(LEVELS) & set(SPLIT)


@pytest.mark.parametrize("strategy", LEVELS)
@pytest.mark.parametrize("mesh", [(), (1, 4), (4, 1)], ids=str)
def test_without_two_levels_they_refuse_and_say_how_to_give_them(strategy: str, mesh: tuple[int, ...]) -> None:
    reason = STRATEGIES[strategy].cannot_serve(site_of(Case(16, 16), mesh), 4)
    assert reason is not None and "give option mesh a DeviceMesh of two dimensions, or set ranks_per_node" in reason


B, s, t, H, K, D, V, e, a, N, R = (getattr(symbols, name) for name in ["B", "s", "t", "H", "K", "D", "V", "e", "a", "N", "R"])
q, kappa = B * s * H * D * e, B * t * K * D * e  # bytes of a local Q, and of a local K or V
EVEN = {V: D, t: s, OWN_HEADS: H / R, OWN_KV_HEADS: K / R, SENT_KV_HEADS: (R - 1) * K / R}

FORMULAS = {
    "hybrid: an all-to-all among R, and a ring of N with the keys of a node for an R-th of the heads": (
        "hybrid",
        EVEN,
        dict(forward_bytes=(2 * q + 2 * kappa) * (R - 1) / R + 2 * kappa * (N - 1)),
    ),
    "double ring: what a ring sends": (
        "double_ring",
        {V: D},
        dict(forward_bytes=2 * kappa * (N * R - 1), backward_bytes=2 * kappa * (N * R - 2 + (N * R - 1) * a / e)),
    ),
}


@pytest.mark.parametrize(("name", "even", "published"), FORMULAS.values(), ids=FORMULAS)
def test_formulas_are_the_published_ones(name: str, even: dict[sympy.Symbol, sympy.Expr], published: dict[str, sympy.Expr]) -> None:
    formulas = STRATEGIES[name].formulas()
    for field, expected in published.items():
        assert sympy.simplify((formulas[field] - expected).subs(list(even.items()))) == 0, field


def order_of_messages(rank: int, P: int, strategy: str, case: Case, mesh: tuple[int, int]) -> list[str]:
    """What a forward posts, works on and waits for, in the order in which it happens; messages by the dim they travel along."""
    axes, posts, added = axes_of(mesh), circle.post, Forward.add
    events: list[str] = []

    def post(op: str, group: SequenceGroup, when: str, messages: Any) -> Any:
        dim = ("across", "inside")[axes.index(group.name)]
        pending = posts(op, group, when, messages)
        if not pending.works:
            return pending
        events.append(f"post {dim}")
        return SimpleNamespace(wait=lambda: (events.append(f"wait {dim}"), pending.wait()))

    def add(self: Forward, *args: Any) -> None:
        events.append("work")
        added(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(circle, "post", post)
        patch.setattr(Forward, "add", add)
        attend_on_rank(rank, P, strategy, "zigzag", case, axes)
    return events


def test_a_double_ring_has_the_next_node_under_way_while_it_goes_round_this_one() -> None:
    """Keys cross nodes N-1 times a rank, one message each, posted before and waited for after the circle inside the node."""
    inside = ["post inside", "work", "wait inside", "work"]
    for events in run_ranks(order_of_messages, 4, "double_ring", Case(16, 16, mask="none"), (2, 2)):
        assert events[:10] == ["post across", *inside, "wait across", *inside]
