"""What a halo does besides giving the right numbers: which rows travel, when, what is kept, and that a model trains through it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch

from attention_job import Run, call_keywords, shard
from autoseq.runtime.halo import Halo, halo_attention
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site
from dense_attention import Case, MaskCase
from dense_needs import dense_needs, rows_of
from ranks import run_ranks
from tracing_job import check_dynamic_lengths
from training_job import check_same_numbers
from visit_job import all_sent, attend_twice, kinds, record_on_rank


@dataclass(frozen=True)
class Windowed(Case):
    """A case with a window of any size: how far behind and ahead a query sees."""

    window: tuple[int, int] = (0, 0)

    def mask_case(self) -> MaskCase:
        q, k = torch.arange(self.q_len)[:, None], torch.arange(self.k_len)
        behind, ahead = self.window
        return MaskCase(ahead, behind, "", [], (k - q <= ahead) & (q - k <= behind))


# Windows beside shards of 8 rows (of 4 in each of a zigzag rank's two chunks).
WINDOWS = {
    "within a shard": (3, 0),
    "a whole shard": (8, 0),
    "into the second neighbour": (9, 0),
    "over all neighbours": (31, 0),
    "on both sides": (2, 3),
    "far on both sides": (13, 10),
    "of the past alone": (12, -9),
    "of the future alone": (-2, 5),
    "of one's own key": (0, 0),
}
LENGTHS = [(32, 32), (29, 29), (6, 32), (32, 11)]
CASES = {
    f"{name}, {q_len} and {k_len} rows": Windowed(q_len, k_len, window=bounds, kv_heads=2, value_dim=5, dtype=torch.bfloat16)
    for (name, bounds), (q_len, k_len) in product(WINDOWS.items(), LENGTHS)
}


@pytest.mark.parametrize("P", [2, 3, 4, 8])
def test_exactly_the_rows_in_the_window_travel(P: int) -> None:
    """To each neighbour those that the dense mask lets it see; back from it as many gradients, in float32, and nothing else."""
    layouts: list[Layout] = ["contiguous", "zigzag"]
    named = {f"{name}, {layout}": ("halo", layout, case) for name, case in CASES.items() for layout in layouts if P < 8 or "32 and" in name}
    recorded = run_ranks(record_on_rank, P, list(named.values()))
    for i, (name, (_, layout, case)) in enumerate(named.items()):
        needs = dense_needs(case, rows_of(case, P, layout), P)
        elements = case.kv_heads * (case.head_dim + case.value_dim)
        for rank in range(P):
            others = [other for other in range(P) if other != rank]
            forward = {(other, len(needs[other][rank]) * elements, torch.bfloat16) for other in others if needs[other][rank]}
            backward = {(other, len(needs[rank][other]) * elements, torch.float32) for other in others if needs[rank][other]}
            sent = all_sent(recorded[rank][i])
            assert len(sent) == len(forward) + len(backward) and set(sent) == forward | backward, (name, rank)


def test_all_is_posted_before_the_own_block_and_each_halo_worked_on_when_it_is_there() -> None:
    """Backward: each halo's gradients are on their way while the next is worked on, and the own block is worked on under the last."""
    run = ("halo", "contiguous", Windowed(32, 32, window=(20, 0), dtype=torch.float32))
    recorded = [events for (events,) in run_ranks(record_on_rank, 4, [run])]
    # Rank 3 hears from three neighbours and is heard by none; rank 0 the other way round; the others are in between.
    forward = ["post"] * 3 + ["work"] + ["wait", "work"] * 3
    assert kinds(recorded[3]) == forward + ["work", "post"] + ["work", "post", "wait"] * 2 + ["work", "wait"]
    assert kinds(recorded[0])[:7] == ["post"] * 3 + ["work"] + ["wait"] * 3
    for each in map(kinds, recorded):
        posts = each.index("work")
        forward = each[: each.index("post", posts)]
        assert forward[:posts] == ["post"] * posts and forward.count("wait") == posts >= 2


def test_a_halo_gives_the_same_bits_every_time() -> None:
    cases = [replace(CASES[name], dtype=torch.float32) for name in ("far on both sides, 32 and 32 rows", "a whole shard, 29 and 29 rows")]
    assert all(all(of_rank) for of_rank in run_ranks(attend_twice, 4, [("halo", "contiguous", case) for case in cases]))


def kept_elements(rank: int, P: int, named: list[Run]) -> list[int]:
    sizes = []
    for _, layout, case in named:
        q, k, v = (shard(x, rank, P, layout, padding="edge") for x in case.tensors()[:3])
        keywords = call_keywords(case, layout)
        group = [keywords.pop("group")]
        terms = (*keywords.values(),)[1:]
        kept = halo_attention.forward(q, k, v, [], None, None, *terms, 0, case.heads // case.kv_heads, layout, [], False, group)[2]
        sizes.append(kept.numel() // (case.kv_heads * (case.head_dim + case.value_dim)))
    return sizes


def test_what_is_kept_is_the_halo_and_no_more() -> None:
    """The same size on every rank, as the program is the same: what a rank gets that has all its neighbours."""
    expected = {"within a shard": (3, 6), "into the second neighbour": (9, 18), "over all neighbours": (24, 24), "on both sides": (5, 10)}
    named: list[Run] = [("halo", layout, CASES[f"{name}, 32 and 32 rows"]) for name in expected for layout in ("contiguous", "zigzag")]
    for sizes in run_ranks(kept_elements, 4, named):
        assert sizes == [rows for both in expected.values() for rows in both]


SITE = Site(batch=1, q_len=64, k_len=64, heads=4, kv_heads=2, head_dim=8, value_dim=8, element_bytes=2, max_ahead=0, max_behind=9)


@pytest.mark.parametrize(("behind", "ahead"), [(3, 0), (16, 0), (17, 0), (5, 6), (63, 0)])
def test_a_rank_with_all_its_neighbours_sends_what_the_formula_says(behind: int, ahead: int) -> None:
    """B·min(w, S-S/P)·K·(D+Dv)·e, and as many float32 gradients."""
    site, elements = replace(SITE, max_behind=behind, max_ahead=ahead), 2 * (8 + 8)
    costs = [STRATEGIES["halo"].cost(site, 4, "contiguous", rank) for rank in range(4)]
    full = STRATEGIES["halo"].full_cost(site, 4, "contiguous")
    assert full.forward_bytes == min(behind + ahead, 48) * elements * 2 and full.backward_bytes == 2 * full.forward_bytes
    inner = costs[0] if behind > 16 else costs[1]  # its rows are seen by all that may see them
    assert (inner.forward_bytes, inner.forward_messages) == (full.forward_bytes, full.forward_messages)


REFUSED = {
    "causal": (dict(max_behind=None), "a halo is for masks with a window, and this one lets a query see any key behind it"),
    "the future": (dict(max_ahead=None), "any key ahead of it"),
    "a mask in disguise": (dict(score="f_add(s, c0(b, 0, q, k))"), "partial softmaxes of such a row do not add up"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_reasons(change: dict[str, Any], reason: str) -> None:
    assert Halo().cannot_serve(SITE, 4) is None
    assert re.search(reason, str(Halo().cannot_serve(replace(SITE, **change), 4)))


def test_halos_of_symbolic_lengths_are_compiled_once() -> None:
    """The size of what is kept is a formula of the lengths: a window inside of a shard, then one over all ranks."""
    terms = dict(score="ALiBi with slopes that learn", has_sinks=True, dropout_p=0.2)
    first = Windowed(40, 40, window=(9, 0), batch=2, heads=6, kv_heads=2, value_dim=5, **terms)
    cases = [replace(first, q_len=n, k_len=n) for n in (40, 33, 14)]
    check_dynamic_lengths("halo", "contiguous", 3, cases)


def test_a_model_with_windows_trains_through_halos() -> None:
    options = {"strategy": "halo", "layout": "contiguous"}
    check_same_numbers({"model": "mistral", "batch": {"batch_size": 1, "length": 37}, "options": options}, 3)


def test_the_cases_are_what_they_say() -> None:
    """Guards the table: windows that reach no, one, two and all neighbours."""
    reached = set()
    for case in CASES.values():
        needs = dense_needs(case, rows_of(case, 4, "contiguous"), 4)
        reached |= {sum(bool(rows) for holder, rows in enumerate(of) if holder != asker) for asker, of in enumerate(needs)}
    assert reached == {0, 1, 2, 3}
