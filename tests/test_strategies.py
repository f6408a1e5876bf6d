"""Every strategy gives one device's attention, forward and backward, on real gloo ranks."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_checks import SHAPES, TERMS, assembled, check_all, oracle
from attention_job import SPLIT, attend_on_rank, call_keywords, layouts_of, runs_of, serves
from autoseq.runtime.errors import MessageError, UnsupportedError
from autoseq.runtime.layout import Layout, chunk_ranges, local_length
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site
from dense_attention import MASKS, SCORES, Case, kinds_beside, relative_error
from ranks import run_ranks

LAYOUTS: list[Layout] = ["contiguous", "zigzag"]


@pytest.mark.parametrize("P", [2, 4])
@pytest.mark.parametrize("strategy", SPLIT)
def test_any_shape(strategy: str, P: int) -> None:
    windows = {f"{name}, in a window": replace(case, mask="window") for name, case in SHAPES.items()}
    check_all(P, runs_of(strategy, P, SHAPES | windows))


@pytest.mark.parametrize("strategy", SPLIT)
def test_any_mask(strategy: str) -> None:
    """Three ranks, uneven heads and rows, so that each mask meets padding and offsets; and queries and keys of other lengths."""
    own = {mask: Case(23, 23, mask=mask, batch=2, heads=4, kv_heads=2, seed=3) for mask in MASKS}
    across = {
        f"{mask}, {q_len} queries to {k_len} keys": Case(q_len, k_len, mask=mask, batch=2, heads=4, kv_heads=2, seed=4)
        for mask in ("none", "causal aligned at the end", "segments", "key padding", "window on both sides")
        for q_len, k_len in [(9, 22), (22, 9)]
    }
    check_all(3, runs_of(strategy, 3, own | across))


@pytest.mark.parametrize("strategy", ["local", *SPLIT])
def test_one_rank(strategy: str) -> None:
    """P = 1 is every strategy's trivial case; zigzag pads an odd length even then."""
    masks = {mask: Case(13, 13, mask=mask, batch=2, heads=4, kv_heads=2, value_dim=5) for mask in ("key padding", "window")}
    check_all(1, runs_of(strategy, 1, masks))


SCORED = {score: Case(14, 14, mask="segments", score=score, batch=2, heads=4, kv_heads=2, value_dim=5, seed=5) for score in SCORES}
IN_A_WINDOW = {f"{score}, in a window": replace(case, mask="window") for score, case in SCORED.items()}
ACROSS = {
    f"{score}, across": Case(9, 14, mask="causal aligned at the end", score=score, heads=5, kv_heads=5, seed=6) for score in SCORES
}


@pytest.mark.parametrize("strategy", SPLIT)
def test_any_score(strategy: str) -> None:
    """The captures' gradients are sums of what the ranks find; across, a rank's rows are other positions of queries than of keys."""
    check_all(3, runs_of(strategy, 3, SCORED | IN_A_WINDOW | ACROSS))


@pytest.mark.parametrize("P", [1, 2, 3])
@pytest.mark.parametrize("strategy", SPLIT)
def test_sinks_dropout_and_empty_rows(strategy: str, P: int) -> None:
    """The numbers do not depend on how many ranks there are, nor on which of them computes what."""
    plain = Case(11, 11, batch=2, heads=4, kv_heads=2, value_dim=5, seed=7)
    cases = {f"{mask}, {name}": replace(plain, **dict(mask=mask) | terms) for name, terms in TERMS.items() for mask in ("causal", "window")}
    check_all(P, runs_of(strategy, P, cases))


LONG = Case(150, 150, batch=2, heads=4, kv_heads=2, head_dim=32, value_dim=32, dtype=torch.float32)
PRECISE = {
    f"{score}, {mask}": replace(LONG, batch=1, score=score, mask=mask, has_sinks=True, empty_rows=rows)
    for score in ("softcap", "ALiBi with slopes that learn", "relative bias from a table that learns")
    for mask, rows in [("causal", "uniform"), ("window", "zero")]
}


@pytest.mark.parametrize("strategy", SPLIT)
def test_lower_precision(strategy: str) -> None:
    """bfloat16 rounds what goes in and out, 2^-9 each; a slope's gradient multiplies that by distances of up to 150."""
    check_all(4, runs_of(strategy, 4, {mask: replace(LONG, mask=mask) for mask in ("segments", "window")}))
    check_all(2, runs_of(strategy, 2, PRECISE))
    check_all(2, runs_of(strategy, 2, {name: replace(case, dtype=torch.bfloat16) for name, case in PRECISE.items()}), tolerance=3e-2)


@pytest.mark.parametrize("strategy", SPLIT)
def test_bfloat16_error_does_not_grow_with_ranks(strategy: str) -> None:
    """Accumulators are float32: splitting over more ranks rounds no more often than one device does."""
    causal = Case(256, 256, heads=8, kv_heads=1, head_dim=32, value_dim=32, dtype=torch.bfloat16)
    case = causal if serves(strategy, causal, 2) else replace(causal, mask="window")
    layout = layouts_of(strategy)[-1]
    errors = {}
    for P in (1, 2, 4, 8):
        per_rank = run_ranks(attend_on_rank, P, strategy, layout, case)
        errors[P] = [relative_error(x, y) for x, y in zip(assembled(per_rank, layout, case), oracle(case), strict=True)]
    for P in (2, 4, 8):
        for name, one, many in zip(("out", "dq", "dk", "dv"), errors[1], errors[P], strict=True):
            # One bfloat16 rounding, 2^-9 at most, is allowed on top: partial results are rounded once by the kernel.
            assert many <= one + 2**-9, f"{name} on {P} ranks: {many:.1e}, on one {one:.1e}"
    assert max(errors[8]) <= 1.2 * max(errors[2])


def test_autocast_rounds_the_inputs_and_no_more() -> None:
    """The same bits as attention to the rounded inputs: scores and weights stay float32, forward and backward."""
    case = Case(20, 20, score="softcap", dtype=torch.float32)
    *qkv, grad = case.tensors()
    keywords = call_keywords(case, "contiguous") | dict(group="")
    results = []
    for inside in (True, False):
        leaves = [(x if inside else x.bfloat16()).detach().requires_grad_() for x in qkv]
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            out = STRATEGIES["local"].attention(*leaves, [], **keywords)
            grads = torch.autograd.grad(out, leaves, grad.bfloat16())
        results.append((out.detach(), *(x.bfloat16() for x in grads)))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@st.composite
def attention_cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 4))
    q_len = draw(st.integers(1, 40))
    score = draw(st.sampled_from(sorted(SCORES)))
    return Case(
        q_len,
        draw(st.sampled_from([q_len, q_len, draw(st.integers(1, 40))])),
        mask=draw(st.sampled_from(sorted(MASKS))),
        score=score,
        has_sinks=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0, 0, 0.3])),
        empty_rows=draw(st.sampled_from(kinds_beside(score))),
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 9)),
        value_dim=draw(st.integers(1, 9)),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 4), st.lists(attention_cases(), min_size=4, max_size=4))
def test_random_configurations(P: int, cases: list[Case]) -> None:
    """Each case by every strategy that serves it."""
    named = {str(case): case for case in cases}
    check_all(P, {f"{strategy}: {name}": run for strategy in SPLIT for name, run in runs_of(strategy, P, named).items()})


def test_the_table_has_a_rank_without_valid_rows() -> None:
    """Guards the table: a change of the layout must not take the case away silently."""
    for layout in LAYOUTS:
        idle = []
        for case in SHAPES.values():
            s = local_length(case.q_len, 4, layout)
            idle += [rank for rank in range(4) if not any(rows for *_, rows in chunk_ranges(rank, 4, s, case.q_len, layout))]
        assert idle, layout


def ring_with_an_absent_peer(rank: int, P: int) -> str:
    group = dist.new_group(timeout=timedelta(seconds=1))
    if rank == 1:
        return ""
    case = Case(8, 8)
    q, k, v, _ = case.tensors()
    keywords = call_keywords(case, "contiguous") | dict(group=group.group_name)
    with pytest.raises(MessageError) as caught:
        STRATEGIES["ring"].attention(q[:, :, :4], k[:, :, :4], v[:, :, :4], [], **keywords)
    return str(caught.value)


def test_an_absent_peer_is_an_error_not_a_hang() -> None:
    message = run_ranks(ring_with_an_absent_peer, 2)[0]
    assert "ring_attention on group" in message
    assert "hop 0 of 2, rank 0 of 2, to rank 1" in message
    assert "raise the timeout of init_process_group" in message


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_infinite_and_finite_masks_together_are_refused(strategy: str) -> None:
    case = Case(4, 4, score="a dense bias", empty_rows="uniform")
    x, *_ = case.tensors()
    bias = torch.zeros(1, 4, 4, 4).index_fill(3, torch.tensor([1]), -torch.inf)
    with pytest.raises(UnsupportedError, match=r"of shape \(1, 4, 4, 4\), holds -inf.*least finite number instead.*use one of them"):
        STRATEGIES[strategy].attention(x, x, x, [bias], **call_keywords(case, "contiguous") | dict(group=""))


DENSE = "f_add(s, c0(b, 0, q, k))"
INFINITE = "f_where(Ne(c0(q, k), 0), s, const(-1, 0))"
LARGE = "f_add(s, f_mul(to_float32(c0(b, k)), const(-10000, 1)))"
SITE = Site(batch=1, q_len=64, k_len=64, heads=8, kv_heads=2, head_dim=16, value_dim=16, element_bytes=2, max_ahead=0, max_behind=9)
REASONS = {
    "any strategy serves a window": (SITE, 4, SPLIT, None),
    "few heads are no obstacle": (replace(SITE, heads=1, kv_heads=1), 4, SPLIT, None),
    "local serves one rank": (SITE, 1, ["local"], None),
    "local needs the whole sequence": (SITE, 4, ["local"], "whole sequence on one rank, but it is split over 4"),
    "dropout, sinks and rows without keys are": (replace(SITE, dropout_p=0.1, has_sinks=True, empty_rows="uniform"), 4, SPLIT, None),
    "a score that depends on distance": (replace(SITE, score="f_add(s, f_mul(c0(h), to_float32(k - q)))"), 4, SPLIT, None),
    "a table of distances": (replace(SITE, score="f_add(s, c0(c1(k - q + 5000), h))"), 4, SPLIT, None),
    "a dense float mask on whole rows": (replace(SITE, score=DENSE), 4, ["ulysses"], None),
    "a dense float mask on parts of rows": (replace(SITE, score=DENSE), 4, ["ring", "gather_kv"], "partial softmaxes of such a row"),
    "a dense bias that learns": (replace(SITE, score=DENSE, learned=(0,)), 4, SPLIT, None),
    "a large constant": (replace(SITE, score=LARGE), 4, ["ring", "gather_kv"], "partial softmaxes of such a row do not add up"),
    "an infinite one adds up": (replace(SITE, score=INFINITE), 4, SPLIT, None),
    "but not beside the least finite number": (replace(SITE, score=INFINITE, empty_rows="uniform"), 1, ["local"], "neither decides alone"),
    "a large factor of integers": (replace(SITE, score="f_add(s, to_float32(-10000*(1 - c0(b, k))))"), 4, ["ring"], "partial softmaxes"),
    "heads must be grouped evenly": (replace(SITE, kv_heads=3), 2, SPLIT, "8 query heads are not a multiple of 3 key/value heads"),
}


@pytest.mark.parametrize(("site", "P", "names", "reason"), REASONS.values(), ids=REASONS)
def test_reasons(site: Site, P: int, names: list[str], reason: str | None) -> None:
    for name in names:
        refusal = STRATEGIES[name].cannot_serve(site, P)
        assert refusal is None if reason is None else refusal is not None
        if reason is not None:
            assert re.search(reason, str(refusal))


def test_the_registry_is_ordered_and_named() -> None:
    assert next(iter(STRATEGIES)) == "local"
    assert all(strategy.name == name for name, strategy in STRATEGIES.items())
