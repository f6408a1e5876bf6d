"""What each strategy really sends equals its formula, byte for byte and message for message, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import sympy

from attention_job import SPLIT, layouts_of, runs_of, serves, site_of
from autoseq.runtime import strategy as symbols
from autoseq.runtime.stages import STAGES
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site
from autoseq.runtime.ulysses import OWN_HEADS, OWN_KV_HEADS, SENT_KV_HEADS
from ranks import run_ranks
from traffic_job import CASES, FULL, count_on_rank


@pytest.mark.parametrize("P", [1, 2, 4])
@pytest.mark.parametrize("strategy", SPLIT)
def test_counted_equals_cost(strategy: str, P: int) -> None:
    """To the byte and to the message, also where the mask rules rows out."""
    named = runs_of(strategy, P, CASES)
    counted = run_ranks(count_on_rank, P, list(named.values()), backend="autoseq_counted")
    for i, (name, (_, layout, case)) in enumerate(named.items()):
        expected = [STRATEGIES[strategy].cost(site_of(case), P, layout, rank) for rank in range(P)]
        assert [of_rank[i] for of_rank in counted] == expected, name


@pytest.mark.parametrize("strategy", SPLIT)
def test_costs_are_the_formulas_and_masks_make_them_less(strategy: str) -> None:
    for (name, case), P, layout in product(CASES.items(), [2, 4], layouts_of(strategy)):
        site = site_of(case)
        if serves(strategy, case, P):
            asked = [(site, P, layout, rank) for rank in range(P)]
            for cost, full in [(STRATEGIES[strategy].cost(*each), STRATEGIES[strategy].full_cost(*each)) for each in asked]:
                assert name not in FULL or cost == full, name
                assert cost.forward_bytes <= full.forward_bytes and cost.backward_bytes <= full.backward_bytes, name


B, s, t, H, K, D, V, P, e, a = (getattr(symbols, name) for name in ["B", "s", "t", "H", "K", "D", "V", "P", "e", "a"])
q, kappa = B * s * H * D * e, B * t * K * D * e  # bytes of a local Q, and of a local K or V
EVEN = {V: D, t: s, OWN_HEADS: H / P}
SELF = {V: D, STAGES: 1}

FORMULAS = {
    "ulysses, K >= P": (
        "ulysses",
        EVEN | {OWN_KV_HEADS: K / P, SENT_KV_HEADS: (P - 1) * K / P},
        dict(forward_bytes=(2 * q + 2 * kappa) * (P - 1) / P, backward_bytes=(2 * q + 2 * kappa) * (P - 1) / P),
    ),
    "ulysses, K < P: one KV head a rank": (
        "ulysses",
        EVEN | {OWN_KV_HEADS: 1, SENT_KV_HEADS: P - 1},
        dict(forward_bytes=(2 * q + 2 * kappa * P / K) * (P - 1) / P, backward_bytes=(2 * q + 2 * kappa * P / K) * (P - 1) / P),
    ),
    "ring": (
        "ring",
        SELF,
        dict(
            forward_bytes=2 * kappa * (P - 1),
            backward_bytes=2 * kappa * (P - 2 + (P - 1) * a / e),
            forward_messages=P - 1,
        ),
    ),
    "gather_kv": (
        "gather_kv",
        SELF,
        dict(forward_bytes=2 * kappa * (P - 1), backward_bytes=2 * kappa * (P - 1) * (1 + a / e), backward_messages=2),
    ),
}


@pytest.mark.parametrize(("name", "even", "published"), FORMULAS.values(), ids=FORMULAS)
def test_formulas_are_the_published_ones(name: str, even: dict[sympy.Symbol, sympy.Expr], published: dict[str, sympy.Expr]) -> None:
    """With even heads and equal lengths they reduce to what the papers state; q and kappa are bytes of a local Q and K."""
    formulas = STRATEGIES[name].formulas()
    for field, expected in published.items():
        difference = formulas[field] - expected
        assert sympy.simplify(difference.subs(list(even.items()))) == 0, field


GQA = Site(batch=1, q_len=4096, k_len=4096, heads=32, kv_heads=8, head_dim=128, value_dim=128, element_bytes=2)
CHEAPER = {
    "ring sends less forward while P < H/K + 1": (GQA, 4, "ring"),
    "ulysses sends less forward beyond": (GQA, 8, "ulysses"),
    "multi-query attention favours the ring": (replace(GQA, kv_heads=1), 32, "ring"),
    "plain multi-head attention favours ulysses": (replace(GQA, kv_heads=32), 4, "ulysses"),
}


@pytest.mark.parametrize(("site", "P", "winner"), CHEAPER.values(), ids=CHEAPER)
def test_which_sends_fewer_bytes_forward(site: Site, P: int, winner: str) -> None:
    sent = {name: STRATEGIES[name].cost(site, P, "contiguous").forward_bytes for name in ("ring", "ulysses")}
    assert min(sent, key=lambda name: sent[name]) == winner
