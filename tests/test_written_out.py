"""Attention written out with matmul and softmax: every spelling becomes one `attention` with the formula of its scores."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoseq.passes.find_attention import find_attention, is_attention
from autoseq.passes.normalize import drop_noops
from autoseq.passes.read_masks import read_masks
from autoseq.runtime.score_facts import needs_whole_rows
from graphs import run, trace

B, H, K, S, T, D = 2, 4, 2, 7, 7, 8
MIN = torch.finfo(torch.float32).min


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def iota(n: int = S) -> Tensor:
    return torch.arange(n)


def causal() -> Tensor:
    return iota() <= iota()[:, None]


def soft(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def repeated(x: Tensor) -> Tensor:
    return x[:, :, None].expand(B, K, H // K, S, D).reshape(B, H, S, D)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-2], x.shape[-1])


def huggingface(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.where(causal(), 0.0, MIN)
    weights = soft((torch.matmul(q, k.transpose(2, 3)) * 0.25 + mask).to(torch.float32)).to(q.dtype)
    return torch.matmul(torch.nn.functional.dropout(weights, 0.0), v)


def opt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores as [B·H, S, S], the mask added as [B, H, S, S]."""
    scores = torch.bmm(flat(q * 0.25), flat(k).transpose(1, 2)).view(B, H, S, T) + torch.where(causal(), 0.0, MIN)
    return torch.bmm(soft(scores.view(B * H, S, T)), flat(v)).view(B, H, S, D)


def bloom(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    alibi = (slopes[None, :, None] * iota()[None, None].expand(B, 1, T)).reshape(B * H, 1, T)
    scores = alibi.baddbmm(flat(q), flat(k).transpose(1, 2), beta=1.0, alpha=0.25).view(B, H, S, T)
    scores = scores.masked_fill(~causal(), MIN)
    return torch.bmm(soft(scores).view(B * H, S, T), flat(v)).view(B, H, S, D)


def gemma(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT * 0.25 / 50.0) * 50.0
    return soft(scores + torch.where(causal() & (iota() > iota()[:, None] - 3), 0.0, -torch.inf)) @ v


def sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    column = q.new_ones(H).cos().reshape(1, -1, 1, 1).expand(B, -1, S, -1)
    scores = torch.cat([q @ k.mT * 0.25 + torch.where(causal(), 0.0, MIN), column], -1)
    return soft(scores - scores.max(-1, keepdim=True).values)[..., :-1] @ v


def grouped_five_dims(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k[:, :K, None], v[:, :K, None]
    out = soft(q.unflatten(1, (K, H // K)) @ k.mT) @ v
    return out.flatten(1, 2)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return soft(q @ repeated(k[:, :K]).transpose(2, 3) / math.sqrt(D)) @ repeated(v[:, :K])


def einsums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = soft(torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.25)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def one_head_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bkd->bhqd", soft(torch.einsum("bhqd,bkd->bhqk", q, k[:, 0])), v[:, 0])


def masked(scores: Tensor, value: float) -> Tensor:
    return scores.masked_fill(~causal(), value)


def added(scores: Tensor, mask: Tensor) -> Tensor:
    return scores + mask


FOUND = [
    pytest.param(lambda q, k, v: soft(q @ k.mT) @ v, "all", {"scale": 1.0, "empty_rows": "zero"}, id="plain"),
    pytest.param(huggingface, "k <= q", {"scale": 0.25, "score": ""}, id="as transformers writes it"),
    pytest.param(opt, "k <= q", {"scale": 1.0}, id="heads folded into the batch"),
    pytest.param(bloom, "k <= q, score s + ", {"scale": 0.25}, id="baddbmm with ALiBi"),
    pytest.param(gemma, "(k <= q) & (k > q - 3), score tanh(s/50)*50", {"scale": 0.25}, id="softcap and a window"),
    pytest.param(sinks, "k <= q, sinks ", {"scale": 0.25}, id="learned sinks"),
    pytest.param(grouped, "all", {"scale": 1 / math.sqrt(D)}, id="grouped heads, repeated"),
    pytest.param(grouped_five_dims, "all", {"scale": 1.0}, id="grouped heads in five dims"),
    pytest.param(einsums, "all", {"scale": 0.25}, id="einsum"),
    pytest.param(one_head_einsum, "all", {}, id="einsum with one KV head"),
    pytest.param(lambda q, k, v: soft(q @ k[:, :1].mT) @ v[:, :1], "all", {}, id="one KV head, broadcast"),
    pytest.param(lambda q, k, v: soft(q[0, 0] @ k[0, 0].mT) @ v[0, 0], "all", {}, id="two dims"),
    pytest.param(lambda q, k, v: soft(q[0] @ k[0].mT) @ v[0], "all", {}, id="three dims"),
    pytest.param(lambda q, k, v: soft(masked(q @ k.mT, -1e9)) @ v, "k <= q", {}, id="masked_fill, -1e9"),
    pytest.param(lambda q, k, v: soft(masked(q @ k.mT, -torch.inf) * 0.5) @ v, "k <= q", {"scale": 0.5}, id="scaled at last"),
    pytest.param(lambda q, k, v: soft(q @ k.mT + (1 - causal().float()) * MIN) @ v, "k <= q", {"score": ""}, id="(1 - m) * min"),
    pytest.param(lambda q, k, v: soft(q @ k.mT - (~causal()).float() * 1e38) @ v, "k <= q", {"score": ""}, id="minus a mask"),
    pytest.param(lambda q, k, v: soft(torch.where(causal(), q @ k.mT, -torch.inf)) @ v, "k <= q", {}, id="where"),
    pytest.param(lambda q, k, v: soft(q @ k.mT + (k @ k.mT).detach()) @ v, "all, score s + detach(b, h, q, k)", {}, id="a detached term"),
    pytest.param(lambda q, k, v: soft(q[:, :, :3] @ k.mT) @ v, "all", {"q_len": 3, "k_len": 7}, id="fewer queries"),
    pytest.param(lambda q, k, v: soft(q[..., :4] @ k[..., :4].mT) @ v, "all", {}, id="keys narrower than values"),
]


@pytest.mark.parametrize(("fn", "text", "keywords"), FOUND)
def test_attention_written_out_is_found(fn: Callable[..., Any], text: str, keywords: dict[str, Any]) -> None:
    traced = trace(fn, floats(B, H, S, D), floats(B, H, T, D, seed=1), floats(B, H, T, D, seed=2))
    gm = traced.normal
    before = run(gm, traced.inputs)
    (site,) = read(gm)
    assert site.meta["attention"]["mask"].startswith(text)
    assert {key: site.kwargs[key] for key in keywords} == keywords
    torch.testing.assert_close(run(gm, traced.inputs), before)


PADDED = torch.ones(B, T, dtype=torch.bool).index_put((torch.tensor(0), torch.arange(3)), torch.tensor(False))
"""The first element of the batch is padded on the left, so its first causal rows see nothing at all."""

EMPTY = [
    pytest.param(lambda s, m: s.masked_fill(~m, -torch.inf), "nan_fill", id="replaced by -inf"),
    pytest.param(lambda s, m: s.masked_fill(~m, MIN), "uniform_fill", id="replaced by the least number"),
    pytest.param(lambda s, m: s + torch.where(m, 0.0, MIN), "uniform", id="the least number added"),
    pytest.param(lambda s, m: s + torch.where(m, 0.0, -torch.inf), "nan", id="-inf added"),
]


@pytest.mark.parametrize(("mask", "empty_rows"), EMPTY)
def test_rows_without_keys_keep_what_they_get(mask: Callable[[Tensor, Tensor], Tensor], empty_rows: str) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        return soft(mask(q @ k.mT, causal() & padding[:, None, None])) @ v

    inputs = (floats(B, H, S, D), floats(B, H, T, D, seed=1), floats(B, H, T, D, seed=2), PADDED)
    traced = trace(fn, *inputs)
    (site,) = read(traced.normal)
    assert (site.kwargs["empty_rows"], site.kwargs["score"]) == (empty_rows, "")
    assert site.meta["attention"]["mask"] == "(k <= q) & Ne(padding(b, k), 0)"
    torch.testing.assert_close(run(traced.normal, traced.inputs), [fn(*inputs)], equal_nan=True)


def read(gm: fx.GraphModule) -> list[fx.Node]:
    """The sites of a graph after reading; dead code is gone."""
    drop_noops(gm)
    find_attention(gm)
    read_masks(gm)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return [node for node in gm.graph.nodes if is_attention(node)]


def stopped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        probabilities = soft(q @ k.mT)
    return probabilities @ v


def partly_stopped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    with torch.no_grad():
        most = scores.clamp(max=0)
    return soft(scores - most) @ v


LET_BE = [
    pytest.param(stopped, "a gradient is stopped", id="probabilities without gradient"),
    pytest.param(partly_stopped, "a gradient is stopped", id="a part of the scores without gradient"),
    pytest.param(lambda q, k, v: soft(q @ k.mT) @ torch.stack([v, v]), "batch dims", id="values with a batch of their own"),
    pytest.param(lambda q, k, v: soft(q[0, 0] @ k[0, 0].mT) @ v, "batch dims", id="one map for a batch of values"),
    pytest.param(lambda q, k, v: soft(q @ k.mT + k @ q.mT) @ v, "several products", id="two products"),
    pytest.param(lambda q, k, v: (soft(q @ k.mT) @ v, soft(q @ k.mT).mean(1)), None, id="one of two returns its probabilities"),
    pytest.param(lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v, "not over the last", id="another dim"),
    pytest.param(lambda q, k, v: soft((q @ k.mT).cumsum(-1)) @ v, None, id="a running sum of scores"),
    pytest.param(lambda q, k, v: soft((q @ k.mT).roll(1, -1)) @ v, None, id="scores moved along"),
    pytest.param(lambda q, k, v: soft(q @ k.mT).cumsum(-1) @ v, None, id="a running sum of probabilities"),
    pytest.param(lambda q, k, v: (soft(q @ k.mT) / 2) @ v, "stands between its softmax", id="probabilities scaled"),
]


@pytest.mark.parametrize(("fn", "reason"), LET_BE)
def test_what_only_looks_like_attention_is_let_be(fn: Callable[..., Any], reason: str | None) -> None:
    traced = trace(fn, *(floats(B, H, S, D, seed=i).requires_grad_() for i in range(3)))
    before = run(traced.normal, traced.inputs)
    found, left = find_attention(traced.normal)
    if reason is not None:
        assert found == 0 and len(left) == 1
        assert reason in left[0].reason and "test_written_out.py:" in left[0].source
    traced.normal.recompile()
    if not found:
        torch.testing.assert_close(run(traced.normal, traced.inputs), before, rtol=0, atol=0)


NO_ATTENTION = [
    pytest.param(lambda x, w: soft(x @ w) * x[..., :1], id="a gate"),
    pytest.param(lambda x, w: torch.topk(soft(x @ w), 2).values, id="a router"),
    pytest.param(lambda x, w: torch.log(soft(x @ w)).sum(), id="a loss"),
    pytest.param(lambda x, w: soft(x) @ w, id="a softmax of no product"),
]


@pytest.mark.parametrize("fn", NO_ATTENTION)
def test_a_softmax_that_is_no_attention_is_not_mentioned(fn: Callable[..., Any]) -> None:
    assert find_attention(trace(fn, floats(B, S, D), floats(D, D)).normal) == (0, [])


GIVEN = [
    pytest.param(lambda s, m: s + m[:, None, None], "f_add(s, mask(c0(b, k)))", id="given as floats over keys"),
    pytest.param(lambda s, m: s + (1.0 - m[:, None, None]) * -1e4, None, id="computed from floats that are given"),
    pytest.param(lambda s, m: s + m.sum(-1).cos()[:, None, None, None], "f_add(s, c0(b))", id="alike for all keys"),
]


@pytest.mark.parametrize(("add", "score"), GIVEN)
def test_floats_over_keys_that_come_from_outside_may_be_a_mask(add: Callable[[Tensor, Tensor], Tensor], score: str | None) -> None:
    traced = trace(lambda q, k, v, m: soft(add(q @ k.mT, m)) @ v, *(floats(B, H, S, D, seed=i) for i in range(3)), floats(B, T))
    (site,) = read(traced.normal)
    assert score is None or site.kwargs["score"] == score
    assert needs_whole_rows(str(site.kwargs["score"])) == (score != "f_add(s, c0(b))")


def token_types(q: Tensor, k: Tensor, v: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    return soft(q @ k.mT + table[ids.clamp(0, 5)][:, None, None]) @ v


def bias_behind_a_fill(q: Tensor, k: Tensor, v: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    return soft((q @ k.mT).masked_fill(ids[:, None, None] < 0, -1e9) + 300 * table[:T]) @ v


def filled_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    bias = table[:T].expand(S, T).masked_fill(ids[:, None, None] < 0, MIN)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def halves(q: Tensor, k: Tensor, v: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    q, k, v = (x.bfloat16() for x in (q * 8, k, v))
    return (soft(q @ k.mT).type_as(v) @ v).float()


def score_in_its_own_mask(q: Tensor, k: Tensor, v: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    scores = q @ k.mT
    return soft(torch.where(scores > -1, scores, -1e9)) @ v


GRADIENTS = [token_types, bias_behind_a_fill, filled_bias, halves, score_in_its_own_mask]


@pytest.mark.parametrize("fn", GRADIENTS, ids=lambda fn: fn.__name__)
def test_values_and_gradients_are_the_programs(fn: Callable[..., Tensor]) -> None:
    ids = torch.randint(0, 6, (B, T), generator=torch.Generator().manual_seed(3))
    ids[0] = -1  # where it masks, the first element of the batch sees nothing

    def inputs() -> list[Tensor]:
        return [*(floats(B, H, S, D, seed=i).requires_grad_() for i in range(3)), floats(T).requires_grad_(), ids]

    ours, theirs = inputs(), inputs()
    torch._dynamo.reset()
    actual = torch.compile(fn, backend="autoseq", options={"inner": "eager"})(*ours)
    with sdpa_kernel(SDPBackend.MATH):
        expected = fn(*theirs)
    tolerance = 3e-2 if fn is halves else 1e-5  # bfloat16 has 8 bits, and the program rounds its scores to them
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    for result in (actual, expected):
        (result * floats(B, H, S, D, seed=4)).sum().backward()
    for mine, one in zip(ours[:4], theirs[:4], strict=True):
        if one.grad is not None:
            torch.testing.assert_close(mine.grad, one.grad, rtol=10 * tolerance, atol=10 * tolerance)
