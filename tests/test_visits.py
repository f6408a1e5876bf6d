"""Ranks that visit each other: every pair is worked on once, by whoever is planned, and queries that go round give one device's numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch

from attention_checks import assembled, oracle
from attention_job import Run, attend_all_on_rank, call_keywords, largest_held, shard, site_of
from autoseq.runtime import balanced, halo, visiting_queries, visits
from autoseq.runtime.attention_call import attention_function
from autoseq.runtime.attention_op import AttentionOp
from autoseq.runtime.layout import Layout
from autoseq.runtime.mask import Mask
from autoseq.runtime.needs import NeedTerms, needs_of
from autoseq.runtime.ring import Ring
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Cost
from autoseq.runtime.visiting_queries import VisitingQueries, visiting_queries_attention
from autoseq.runtime.visits import KEYS, QUERIES, Manner, Visits
from dense_attention import MASKS, SCORES, Case, check_close
from dense_needs import as_set, dense_needs, rows_of
from ranks import run_ranks
from traffic_job import count_on_rank
from visit_job import attend_twice

LAYOUTS: list[Layout] = ["contiguous", "zigzag"]
MANNERS = {"halo": halo._MANNER, "balanced": balanced._MANNER, "visiting queries": visiting_queries._MANNER}


class ByQueries(Ring):
    """All queries go round, whatever is cheaper."""

    name = "by_queries"
    attention = staticmethod(
        attention_function(__name__, lambda q, k, v, terms: terms.call(visiting_queries_attention, q, k, v))
    )


def by_queries(rank: int, P: int, job: Any, runs: Any) -> Any:
    """A job in which the strategy of that name is there."""
    with mock.patch.dict(STRATEGIES, by_queries=ByQueries()):
        return job(rank, P, runs)


PLAIN = Case(23, 23, batch=2, heads=4, kv_heads=2, value_dim=5, seed=3)
LENGTHS = [(23, 23), (9, 22), (22, 7)]
MASKED = {f"{mask}, {q} and {k}": replace(PLAIN, mask=mask, q_len=q, k_len=k) for mask, (q, k) in product(MASKS, LENGTHS)}
SCORED = {
    score: replace(PLAIN, q_len=14, k_len=14, mask="segments", score=score, has_sinks=True, dropout_p=0.2)
    for score in SCORES
    if score != "a dense float mask"
}
EMPTY = {
    f"{kind}, {mask}, sinks {sinks}": replace(PLAIN, mask=mask, empty_rows=kind, has_sinks=sinks)
    for kind, mask, sinks in product(["uniform", "nan", "uniform_fill"], ["key padding", "only the future"], [False, True])
}


@pytest.mark.parametrize("P", [2, 3, 5])
def test_queries_that_go_round_give_one_devices_numbers(P: int) -> None:
    """With sinks and rows without keys, which their owners see to, and with gradients of captures, which come of all ranks."""
    cases = MASKED | SCORED | EMPTY if P == 3 else dict(list(MASKED.items())[::4] + list(SCORED.items())[::3])
    runs: dict[str, Run] = {f"{name}, {layout}": ("by_queries", layout, case) for name, case in cases.items() for layout in LAYOUTS}
    per_rank = run_ranks(by_queries, P, attend_all_on_rank, runs)
    for i, (name, (_, layout, case)) in enumerate(runs.items()):
        try:
            check_close(assembled([of_rank[i] for of_rank in per_rank], layout, case), oracle(case), 1e-10)
        except AssertionError as failure:
            raise AssertionError(name) from failure


@pytest.mark.parametrize("P", [2, 4])
def test_what_they_send_is_their_cost(P: int) -> None:
    cases = [replace(case, batch=1, dtype=torch.bfloat16) for name, case in MASKED.items() if not case.mask_case().captures]
    cases += [Case(8, 64, mask="none", kv_heads=4), Case(16, 16, mask="only the future", empty_rows="uniform")]
    runs = [("by_queries", layout, case) for case in cases for layout in LAYOUTS]
    counted: list[list[Cost]] = run_ranks(by_queries, P, count_on_rank, runs, backend="autoseq_counted")
    for i, (_, layout, case) in enumerate(runs):
        assert [of_rank[i] for of_rank in counted] == [VisitingQueries().cost(site_of(case), P, layout, rank) for rank in range(P)], case


def test_they_give_the_same_bits_every_time() -> None:
    runs = [("by_queries", "zigzag", replace(case, dtype=torch.float32)) for case in list(MASKED.values())[:3]]
    assert all(all(of_rank) for of_rank in run_ranks(by_queries, 4, attend_twice, runs))


@pytest.mark.parametrize("strategy", ["halo", "balanced"])
def test_what_is_held_does_not_grow_with_ranks(strategy: str) -> None:
    """Beside what is kept: what leaves for the next round, what came in this one and comes in the next, results of two
    rounds. A halo of 4 rows has a neighbour's gradients and its own."""
    heads, kv_heads, width, rows = 4, 2, 8, 16
    keys, queries = rows * kv_heads * 2 * width, rows * heads * width
    there = max(keys * 2, queries * 3 * 2 + rows * heads * 4)  # in bfloat16, but for the lse
    found = max(keys, queries + rows * heads) * 4
    for P in (2, 4, 8):
        case = Case(rows * P, rows * P, mask="causal", heads=heads, kv_heads=kv_heads, dtype=torch.bfloat16)
        held = run_ranks(largest_held, P, strategy, replace(case, mask="window") if strategy == "halo" else case, "contiguous")
        assert max(held) <= (2 * 4 * keys // rows * 4 if strategy == "halo" else 3 * there + 4 * found)


def test_few_queries_are_fewer_bytes_than_many_keys() -> None:
    few = site_of(Case(64, 4096, mask="none", dtype=torch.bfloat16))
    queries, keys = VisitingQueries().cost(few, 4, "contiguous", 0), Ring().cost(few, 4, "contiguous", 0)
    assert queries.step_bytes * 20 < keys.step_bytes
    grouped = site_of(Case(4096, 4096, mask="none", kv_heads=1, dtype=torch.bfloat16))
    assert VisitingQueries().cost(grouped, 4, "contiguous", 0).step_bytes > Ring().cost(grouped, 4, "contiguous", 0).step_bytes


def planned(case: Case, P: int, layout: Layout, manner: Manner) -> Visits:
    own, rows = case.mask_case(), rows_of(case, P, layout)
    mask = Mask(own.max_ahead, own.max_behind, own.predicate)
    needs = needs_of(NeedTerms(mask, own.captures, case.batch, range(case.heads), False), rows, P)
    return manner.visits(needs, rows, mask, fills=False)


@pytest.mark.parametrize("manner", MANNERS)
def test_every_pair_that_the_mask_allows_is_worked_on_once(manner: str) -> None:
    """By the asker with all keys it may see, or by the holder with all queries that may see its own; and in a round of its own."""
    for mask, (q_len, k_len), P, layout in product(MASKS, [(13, 13), (6, 15)], [2, 3, 5], LAYOUTS):
        case = Case(q_len, k_len, mask=mask, batch=2)
        plan, needs, seeing = planned(case, P, layout, MANNERS[manner]), *seen_both_ways(case, P, layout)
        for asker, holder in product(range(P), range(P)):
            keys, queries = (as_set(plan.rows(*visit)) for visit in ((KEYS, asker, holder), (QUERIES, holder, asker)))
            assert not (keys and queries) and (asker != holder or not (keys or queries))
            if asker != holder and needs[asker][holder]:
                assert needs[asker][holder] <= keys or seeing[holder][asker] <= queries, (mask, asker, holder)
        for host in range(P):
            comers = plan.guests(host)
            assert sorted(comers) == sorted({(kind, g) for kind in visits.KINDS for g in range(P) if plan.rows(kind, host, g)})
            assert {(host - guest) % P for _, guest in comers} <= set(plan.rounds)


def seen_both_ways(case: Case, P: int, layout: Layout) -> tuple[list[list[set[int]]], list[list[set[int]]]]:
    """[asker][holder]: the keys that are seen; [holder][asker]: the queries that see them."""
    allowed = case.mask_case().dense.expand(case.batch, case.heads, case.q_len, case.k_len).any(0).any(0)
    rows = rows_of(case, P, layout)
    queries = [{start + i: local + i for local, start, n in rows.queries(p) for i in range(n)} for p in range(P)]
    keys = [[start + i for _, start, n in rows.keys(p) for i in range(n)] for p in range(P)]
    seeing = [[{local for q, local in queries[a].items() if bool(allowed[q, keys[h]].any())} for a in range(P)] for h in range(P)]
    return dense_needs(case, rows, P), seeing


def check_op(rank: int, P: int, name: str) -> None:
    op: AttentionOp = {"halo": halo.halo_attention, "balanced": balanced.balanced_attention, "queries": visiting_queries_attention}[name]
    terms = dict(score="two captures that learn", has_sinks=True, dropout_p=0.2, dtype=torch.float32)
    case = Case(13, 13, mask="window", batch=2, kv_heads=2, **terms)
    q, k, v = (shard(x, rank, P, "contiguous", padding="edge").requires_grad_() for x in case.tensors()[:3])
    keywords = call_keywords(case, "contiguous")
    where = (0, 2, keywords.pop("layout"), [], False, [keywords.pop("group")])
    # Not the check that compares values traced and not: where a rank gets less than others, a part of what is kept is never written.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    tensors = (q, k, v, case.captures(), case.sinks(), case.dropout_seed())
    torch.library.opcheck(op.forward, (*tensors, *keywords.values(), *where), test_utils=checks)


@pytest.mark.parametrize("name", ["halo", "balanced", "queries"])
def test_the_ops_are_what_they_say(name: str) -> None:
    """torch's own checks on two ranks: schema, fakes (with them the size of what is kept) and autograd."""
    run_ranks(check_op, 2, name)
