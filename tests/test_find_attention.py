"""Every form of scaled_dot_product_attention becomes one `attention`, or is left whole with its reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoseq.passes.find_attention import find_attention, is_attention
from graphs import count, run, trace

attend = F.scaled_dot_product_attention
SDPA = torch.ops.aten.scaled_dot_product_attention.default
Q, KV = (2, 4, 6, 8), (2, 2, 6, 8)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def repeated(x: Tensor, times: int = 2) -> Tensor:
    """As transformers repeats KV heads."""
    B, K, S, D = x.shape
    return x[:, :, None].expand(B, K, times, S, D).reshape(B, K * times, S, D)


def tiled(x: Tensor) -> Tensor:
    B, K, S, D = x.shape
    return x[:, None].expand(B, 2, K, S, D).reshape(B, 2 * K, S, D)


def by_index(x: Tensor) -> tuple[Tensor, Tensor]:
    heads = torch.arange(4) // 2
    return x[:, heads], x.index_select(1, heads)


def einops_repeat(x: Tensor) -> tuple[Tensor, Tensor]:
    B, K, S, D = x.shape
    wide = x.transpose(1, 2)[:, :, :, None].expand(B, S, K, 2, D).reshape(B, S, 2 * K, D).transpose(1, 2)
    return wide, wide


def merged(x: Tensor) -> Tensor:
    """As a projection gives it: heads and features in one dim until they are viewed apart."""
    B, K, S, D = x.shape
    return x.transpose(1, 2).reshape(B, S, K * D).sin().view(B, S, K, D).transpose(1, 2)


FOUND = [
    pytest.param(lambda q, k: attend(q, q, q), 4, {"max_ahead": None, "predicate": ""}, id="plain"),
    pytest.param(lambda q, k: attend(q, q, q, is_causal=True), 4, {"max_ahead": 0}, id="causal"),
    pytest.param(lambda q, k: attend(q, q, q, scale=0.5), 4, {"scale": 0.5}, id="a scale"),
    pytest.param(lambda q, k: attend(q, q, q), 4, {"scale": 8**-0.5, "q_len": 6, "k_len": 6}, id="the default scale"),
    pytest.param(lambda q, k: attend(q, q[:, :, :4], q[:, :, :4]), 4, {"q_len": 6, "k_len": 4}, id="fewer keys than queries"),
    pytest.param(lambda q, k: attend(q, q[:, :, :4], q[:, :, :4], is_causal=True), 4, {"max_ahead": 0}, id="causal, from the first key"),
    pytest.param(lambda q, k: attend(q[0], q[0], q[0]), 1, {"max_ahead": None}, id="3-D is one head"),
    pytest.param(lambda q, k: attend(q[0], q[0], q[0], q[0] @ q[0].mT > 0), 1, {"predicate": "Ne(c0(b, q, k), 0)"}, id="3-D with a mask"),
    pytest.param(lambda q, k: attend(q, k, k, enable_gqa=True), 2, {}, id="grouped heads"),
    pytest.param(lambda q, k: attend(q, repeated(k), repeated(k)), 2, {}, id="repeated by expand and reshape"),
    pytest.param(lambda q, k: attend(q, repeated(k).contiguous(), repeated(k)), 2, {}, id="repeated and copied"),
    pytest.param(lambda q, k: attend(q, k.repeat_interleave(2, 1), k.repeat_interleave(2, 1)), 2, {}, id="repeat_interleave"),
    pytest.param(lambda q, k: attend(q, *by_index(k)), 2, {}, id="repeated by indexing"),
    pytest.param(lambda q, k: attend(q, *einops_repeat(k)), 2, {}, id="repeated before the heads are moved"),
    pytest.param(lambda q, k: attend(q, repeated(k.cos()), repeated(merged(k))), 2, {}, id="values viewed from a projection"),
    pytest.param(lambda q, k: attend(q[:1], repeated(k[:1]), repeated(k[:1])), 2, {}, id="repeated in a batch of one"),
    pytest.param(lambda q, k: attend(q, k[:, :1].expand(Q), k[:, :1].expand(Q)), 1, {}, id="one head for all"),
    pytest.param(lambda q, k: attend(q, repeated(k[:, :, 1:5]), repeated(k[:, :, 1:5])), 2, {"k_len": 4}, id="repeated after a cut"),
    pytest.param(lambda q, k: attend(q, repeated(k)[:, :, 1:5], repeated(k)[:, :, 1:5]), 4, {"k_len": 4}, id="repeated before a cut"),
    pytest.param(lambda q, k: attend(q, repeated(k), q), 4, {}, id="must not un-repeat: only the keys are repeated"),
    pytest.param(lambda q, k: attend(q, tiled(k), tiled(k)), 4, {}, id="must not un-repeat: heads in another order"),
    pytest.param(lambda q, k: attend(q, k.repeat(1, 2, 1, 1), k.repeat(1, 2, 1, 1)), 4, {}, id="must not un-repeat: repeat is a tiling"),
    pytest.param(lambda q, k: attend(q, k.repeat_interleave(2, 2)[:, [0, 0, 1, 1]], q.repeat_interleave(2, 2)), 4, {"k_len": 12},
                 id="must not un-repeat: repeat_interleave of rows"),
    pytest.param(lambda q, k: attend(q, k[:, :1], k[:, :1]), 1, {}, id="one head of keys is broadcast"),
    pytest.param(lambda q, k: attend(q, q, q[:, :1]), 4, {}, id="one head of values is broadcast"),
    pytest.param(lambda q, k: attend(q[:, :1], q, q), 4, {}, id="one head of queries is broadcast"),
    pytest.param(lambda q, k: attend(q[:1], q, q), 4, {}, id="one query for the whole batch"),
    pytest.param(lambda q, k: attend(q, k[:1, :1], k[:, :1]), 1, {}, id="one batch of keys beside all of values"),
    pytest.param(lambda q, k: attend(q, k[:1], k[:1], enable_gqa=True), 2, {}, id="one batch of groups"),
    pytest.param(lambda q, k: attend(q[0], q[0, :1], q[0, :1]), 1, {}, id="3-D, one memory for the whole batch"),
    pytest.param(lambda q, k: attend(q, q, q, (q @ q.mT)[:, :1] > 0), 4, {"predicate": "Ne(c0(b, 0, q, k), 0)"}, id="a mask for all heads"),
    pytest.param(lambda q, k: attend(q, q, q, q[0, 0] @ q[0, 0].mT > 0), 4, {"predicate": "Ne(c0(q, k), 0)"}, id="a mask of two dims"),
    pytest.param(lambda q, k: attend(q, q, q, q @ q.mT), 4, {"predicate": "", "score": "f_add(s, c0(b, h, q, k))"}, id="a float bias"),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "kv_heads", "keywords"), FOUND)
def test_find_attention(fn: Callable[..., Any], kv_heads: int, keywords: dict[str, Any]) -> None:
    traced = trace(fn, floats(*Q), floats(*KV))
    before = run(traced.normal, traced.inputs)
    assert find_attention(traced.normal) == (1, [])
    traced.normal.graph.eliminate_dead_code()
    (site,) = [node for node in traced.normal.graph.nodes if is_attention(node)]
    assert site.args[1].meta["val"].shape[1] == kv_heads and site.args[2].meta["val"].shape[1] == kv_heads
    assert {key: site.kwargs[key] for key in keywords} == keywords
    (after,) = run(traced.normal, traced.inputs)
    torch.testing.assert_close(after, before[0])  # another kernel: sums in another order


LEFT_WHOLE = [
    pytest.param(lambda q, b: attend(q[None], q[None], q[None]), "3 or 4 are read", id="five dims"),
    pytest.param(lambda q, b: attend(q[0], q, q), "3 or 4 are read", id="ranks that differ"),
    pytest.param(lambda q, b: attend(q, q[:, :2], q, enable_gqa=True), "different numbers of heads", id="groups of keys and of values"),
]


@pytest.mark.parametrize(("fn", "reason"), LEFT_WHOLE)
def test_an_attention_that_is_left_whole(fn: Callable[..., Any], reason: str) -> None:
    traced = trace(fn, floats(*Q), floats(6, 6).requires_grad_())
    found, (left,) = find_attention(traced.normal)
    assert found == 0 and count(traced.normal, SDPA) == 1
    assert reason in left.reason and "test_find_attention.py:" in left.source


def lengthened(x: Tensor) -> Tensor:
    """Repeated along the sequence, in spite of the same expand and a similar reshape."""
    B, K, S, D = x.shape
    return x[:, :, None].expand(B, K, 2, S, D).reshape(B, K, 2 * S, D)


UNUSUAL = [
    pytest.param(lambda q, k: attend(q, lengthened(k), lengthened(k), q.new_ones(6, 12).tril(6) > 0, enable_gqa=True),
                 id="longer, not more heads"),
]  # fmt: skip


@pytest.mark.parametrize("fn", UNUSUAL)
def test_find_attention_keeps_the_values_or_lets_be(fn: Callable[..., Any]) -> None:
    traced = trace(fn, floats(*Q), floats(*KV))
    before = run(traced.normal, traced.inputs)
    find_attention(traced.normal)
    traced.normal.recompile()
    torch.testing.assert_close(run(traced.normal, traced.inputs), before)
