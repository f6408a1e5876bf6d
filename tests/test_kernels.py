"""One block of attention: the fast kernels and the reference agree with dense float64 attention, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autoseq.runtime import kernels
from autoseq.runtime.kernels import attend, attend_backward
from dense_attention import relative_error

SCALE = 0.3

# q rows, key rows, heads, KV heads, key dim, value dim
SHAPES = {
    "square": (32, 32, 4, 4, 16, 16),
    "more keys than queries": (5, 40, 4, 4, 16, 16),
    "more queries than keys": (40, 5, 4, 4, 16, 16),
    "grouped heads": (17, 23, 6, 2, 8, 8),
    "multi-query": (17, 23, 6, 1, 8, 8),
    "wider values": (17, 23, 4, 2, 8, 12),
    "narrower values": (17, 23, 4, 2, 12, 8),
    "one row and one key": (1, 1, 2, 1, 4, 4),
    "head dim of one": (9, 9, 2, 1, 1, 1),
    "more rows than the reference holds at once": (600, 30, 1, 1, 4, 4),
}
# float64: order of summation only. float32: 6e-8 a rounding. Halves: one rounding of each result, 2^-9 and 2^-12, and of the
# probabilities inside.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]


def draw(shape: tuple[int, ...], dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    n, m, H, K, D, Dv = shape
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, H, n, D), (batch, K, m, D), (batch, K, m, Dv), (batch, H, n, Dv))
    return [torch.randn(each, generator=generator).to(dtype) for each in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, allowed: Tensor) -> list[Tensor]:
    """out, lse, dq, dk, dv in float64."""
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    ratio = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    scores = (q @ keys.mT * SCALE).masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    out = weights @ values
    grad_scores = weights * (grad @ values.mT - (grad * out).sum(-1, keepdim=True)) * SCALE
    dk, dv = ((x.unflatten(1, (-1, ratio)).sum(2)) for x in (grad_scores.mT @ q, weights.mT @ grad))
    return [out, scores.logsumexp(-1), grad_scores @ keys, dk, dv]


def check_block(tensors: list[Tensor], attn_bias: Tensor | None, is_causal: bool, allowed: Tensor) -> None:
    q, k, v, grad = tensors
    out, lse = attend(q, k, v, attn_bias, is_causal, SCALE)
    grads = attend_backward(grad, q, k, v, out.to(q.dtype), lse, attn_bias, is_causal, SCALE)
    expected = dense(q, k, v, grad, allowed)
    seen = expected[1] > -torch.inf
    assert torch.equal(lse > -torch.inf, seen), "lse is -inf exactly in the rows without keys"
    assert lse.dtype == kernels.accumulate_dtype(q.dtype)
    results = [out, lse.masked_fill(~seen, 0), *grads]
    expected[1] = expected[1].masked_fill(~seen, 0)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), results, expected, strict=True):
        assert x.shape == y.shape, name
        assert x.isfinite().all(), name
        assert relative_error(x, y) <= TOLERANCE[q.dtype], name


@pytest.fixture(params=["the device's kernel", "the reference"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs with the kernel that CPU tensors get, and with the plain one."""
    if request.param == "the reference":
        monkeypatch.setattr(kernels, "_kernel", lambda *_: "reference")


MASKS: dict[str, Callable[[int, int], Tensor]] = {
    "no mask": lambda n, m: torch.ones(n, m, dtype=torch.bool),
    "random": lambda n, m: torch.rand(n, m, generator=torch.Generator().manual_seed(1)) > 0.4,
    "first row masked": lambda n, m: (torch.arange(n) > 0)[:, None].expand(n, m),
    "every row masked": lambda n, m: torch.zeros(n, m, dtype=torch.bool),
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attend(shape: tuple[int, ...], mask: str, dtype: torch.dtype) -> None:
    allowed = MASKS[mask](shape[0], shape[1])
    attn_bias = None if mask == "no mask" else torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    check_block(draw(shape, dtype), attn_bias, False, allowed)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal(dtype: torch.dtype) -> None:
    check_block(draw((700, 700, 2, 1, 8, 4), dtype, batch=1), None, True, torch.ones(700, 700, dtype=torch.bool).tril())


@pytest.mark.usefixtures("kernel")
def test_strides_do_not_matter() -> None:
    """Slices of longer tensors, transposed heads and expanded gradients are what the strategies and autograd hand in."""
    allowed = torch.ones(9, 9, dtype=torch.bool)
    q, k, v, _ = draw((20, 20, 4, 2, 8, 8), torch.float64)
    transposed = torch.randn(2, 20, 4, 8, dtype=torch.float64).transpose(1, 2)
    grad = torch.ones((), dtype=torch.float64).expand(2, 4, 9, 8)
    for query in (q, transposed):
        check_block([query[:, :, 3:12], k[:, :, 5:14], v[:, :, 5:14], grad], None, False, allowed)


@pytest.mark.usefixtures("kernel")
def test_gradients_of_two_halves_add_up() -> None:
    """The backward takes the out and lse over all keys: that is what lets blocks live on different ranks."""
    q, k, v, grad = draw((16, 20, 4, 2, 8, 8), torch.float64)
    out, lse, *expected = dense(q, k, v, grad, torch.ones(16, 20, dtype=torch.bool))
    halves = [attend_backward(grad, q, k[:, :, s], v[:, :, s], out, lse, None, False, SCALE) for s in (slice(0, 7), slice(7, 20))]
    dq = halves[0][0] + halves[1][0]
    dk, dv = (torch.cat([half[i] for half in halves], 2) for i in (1, 2))
    for x, y in zip((dq, dk, dv), expected, strict=True):
        assert relative_error(x, y) <= TOLERANCE[torch.float64]


def test_cpu_tensors_get_the_flash_kernel() -> None:
    q, _, v, _ = draw(SHAPES["square"], torch.bfloat16)
    assert kernels._kernel(q, v, None) == "cpu"
    assert kernels._kernel(q.to("meta"), v.to("meta"), None) == "reference"


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_attend_on_gpu(dtype: torch.dtype, is_causal: bool) -> None:
    tensors = [x.cuda() for x in draw((64, 64, 4, 2, 20, 12), dtype)]
    allowed = torch.ones(64, 64, dtype=torch.bool, device="cuda")
    check_block(tensors, None, is_causal, allowed.tril() if is_causal else allowed)
