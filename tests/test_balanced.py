"""What helpers do besides giving the right numbers: who works for whom and how much, when messages are posted, what is sent in all."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from attention_checks import check_all
from attention_job import site_of
from autoseq.runtime import balanced, visits
from autoseq.runtime.balanced import Balanced
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site
from autoseq.runtime.visits import KEYS, KINDS, QUERIES, Visits
from dense_attention import Case
from ranks import run_ranks
from tracing_job import check_dynamic_lengths
from training_job import check_same_numbers
from visit_job import attend_twice, kinds, record_on_rank

SITE = Site(batch=1, q_len=64, k_len=64, heads=4, kv_heads=4, head_dim=128, value_dim=128, element_bytes=4, max_ahead=0)


def visits_of(P: int, site: Site = SITE) -> Visits:
    return balanced._MANNER.of_site(replace(site, q_len=8 * P, k_len=8 * P), P, "contiguous")


def workers(P: int) -> list[list[int]]:
    """[i][j]: who works on the queries of rank i and the keys of rank j <= i."""
    plan = visits_of(P)

    def worker(asker: int, holder: int) -> int:
        (found,) = [asker] * bool(plan.rows(KEYS, asker, holder) or asker == holder) + [holder] * bool(plan.rows(QUERIES, holder, asker))
        return found

    return [[worker(asker, holder) for holder in range(asker + 1)] for asker in range(P)]


def test_the_table_of_who_works_is_that_of_the_module() -> None:
    table = str(balanced.__doc__).split("0  1  2  3  4")[1].split("With k")[0]
    written = [[int(number) for number in line.split()] for line in table.strip().splitlines()]
    assert written == [[i, *row] for i, row in enumerate(workers(5))]


@pytest.mark.parametrize("P", range(2, 10))
def test_every_rank_works_as_much_as_the_others_and_in_every_round(P: int) -> None:
    plan = visits_of(P)
    blocks = [len(plan.guests(rank)) for rank in range(P)]
    assert sum(blocks) == P * (P - 1) // 2 and max(blocks) - min(blocks) <= 1
    assert plan.rounds == tuple(range(1, P // 2 + 1)), "one's own block and P//2 rounds"
    for n in plan.rounds:
        hosts = [rank for rank in range(P) if any(plan.rows(kind, rank, (rank - n) % P) for kind in KINDS)]
        assert hosts == list(range(P)) if 2 * n < P else hosts == list(range(P // 2, P))


@pytest.mark.parametrize("P", [2, 4, 8, 16])
def test_it_sends_about_half_of_what_a_ring_does(P: int) -> None:
    """In float32 with as many key heads as query heads q and out are as large as K and V, and lse is one number beside 2·128."""
    site = replace(SITE, q_len=16 * P, k_len=16 * P)
    sent = sum(Balanced().cost(site, P, "contiguous", rank).forward_bytes for rank in range(P))
    ring = P * STRATEGIES["ring"].full_cost(site, P, "contiguous").forward_bytes
    helped = sum(bool(rows) for of_host in visits_of(P).queries for rows in of_host)
    assert sent == ring / 2 + helped * 4 * 16 * 4  # and the lse of each pair that is helped


def test_nothing_is_sent_again_that_a_rank_had_room_to_keep() -> None:
    """As much as its own K and V: the last keys, or of the last queries two ranks', in float32 and with as many key heads."""
    plan, elements = visits_of(8), (4 * 256, 4 * 128)
    kept = [plan.kept(host, elements, 8 * elements[KEYS]) for host in range(8)]
    assert kept[0] == ((QUERIES, 6), (QUERIES, 5)) and kept[2] == ((QUERIES, 7),)
    assert kept[3] == ((KEYS, 0),) and kept[7] == ((KEYS, 3),)
    grouped = plan.kept(0, (1 * 256, 4 * 128), 8 * 256)
    assert grouped == (), "queries that are larger than the keys are not kept"


# Sinks and a gradient of slopes are the owner's and everybody's; early rows of the first batch element see no key at all.
HELPED = {
    "sinks and slopes": dict(score="ALiBi with slopes that learn", has_sinks=True, dropout_p=0.2),
    "rows without keys": dict(mask="key padding", batch=2),
    "sinks, rows without keys": dict(mask="key padding", batch=2, has_sinks=True),
    "rows without keys, sinks for the mean": dict(mask="key padding", empty_rows="uniform", batch=2, has_sinks=True),
    "documents": dict(mask="segments", batch=2),
    "queries larger than keys": dict(heads=8, kv_heads=1),
    "padding on several ranks": dict(q_len=9, k_len=9),
}


@pytest.mark.parametrize("P", [5, 8])
def test_more_ranks_with_several_helpers_each(P: int) -> None:
    plain = Case(43, 43, heads=4, kv_heads=2, value_dim=5)
    check_all(P, {name: ("balanced", "contiguous", replace(plain, **terms)) for name, terms in HELPED.items()})


def test_each_round_is_posted_before_the_work_of_the_one_before_it() -> None:
    """And what a helper finds goes home under its next work."""
    runs = [("balanced", "contiguous", Case(40, 40, dtype=torch.float32))]
    recorded = [" ".join(kinds(of_rank[0])) for of_rank in run_ranks(record_on_rank, 5, runs)]
    # The first rank works for two others, the last one for itself, on the keys of two.
    forward = "post work post wait work post wait work post wait wait"
    assert recorded[0] == f"{forward} {forward}", "its first guest of the backward sends more than was kept"
    assert recorded[4] == f"{forward} post post wait work post wait work post wait work wait", "the keys of its first are still there"


def test_helpers_give_the_same_bits_every_time() -> None:
    cases = [Case(64, 64, kv_heads=2, dtype=torch.float32), Case(61, 61, mask="segments", dtype=torch.float32, has_sinks=True)]
    assert all(all(of_rank) for of_rank in run_ranks(attend_twice, 5, [("balanced", "contiguous", case) for case in cases]))


@pytest.mark.parametrize("P", [2, 5])
def test_formulas_are_exact_where_all_shards_are_full(P: int) -> None:
    for case in (Case(8 * P, 8 * P), Case(8 * P, 8 * P, heads=8, kv_heads=1, value_dim=5, dtype=torch.bfloat16)):
        for rank in range(P):
            asked = (site_of(case), P, "contiguous", rank)
            assert Balanced().cost(*asked) == Balanced().full_cost(*asked)
    symbols = set().union(*(formula.free_symbols for formula in visits.formulas().values()))
    assert symbols <= set(Balanced().sizes(SITE, P, "contiguous", 0))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no mask": (dict(max_ahead=None), "early ranks have less to do; this mask is not causal"),
    "the near future": (dict(max_ahead=3), "this mask is not causal"),
    "cross-attention": (dict(q_len=32), "helpers are for self-attention; here 32 queries see 64 keys"),
    "rows that may average all keys": (dict(empty_rows="uniform", predicate="Ne(c0(b, k), 0)"), "which no helper can tell"),
    "a mask in disguise": (dict(score="f_add(s, c0(b, 0, q, k))"), "partial softmaxes of such a row do not add up"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_reasons(change: dict[str, Any], reason: str) -> None:
    assert Balanced().cannot_serve(SITE, 4) is None
    assert Balanced().cannot_serve(replace(SITE, empty_rows="uniform"), 4) is None, "a causal mask leaves every row a key"
    assert re.search(reason, str(Balanced().cannot_serve(replace(SITE, **change), 4)))


def test_zigzag_rows_are_refused() -> None:
    assert Balanced().cannot_lay_out("contiguous") is None
    assert "every rank has as much causal work as the others" in str(Balanced().cannot_lay_out("zigzag"))


def test_helpers_of_symbolic_lengths_are_compiled_once() -> None:
    terms = dict(score="ALiBi with slopes that learn", has_sinks=True, dropout_p=0.2)
    first = Case(22, 22, mask="segments", batch=2, heads=6, kv_heads=2, value_dim=5, **terms)
    cases = [first, replace(first, q_len=33, k_len=33)]
    check_dynamic_lengths("balanced", "contiguous", 3, cases)


def test_a_causal_model_trains_with_helpers() -> None:
    options = {"strategy": "balanced", "layout": "contiguous"}
    check_same_numbers({"model": "plain", "batch": {"batch_size": 2, "length": 37}, "options": options}, 3)
