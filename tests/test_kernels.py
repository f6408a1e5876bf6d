"""One block of attention: the fast kernels and the reference agree with dense float64 attention, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import flash_attn_stand_in  # noqa: F401 (registers its operators)
from aten_stand_ins import AtenOnCuda, FlashAttn
from autoseq.runtime import aten_kernels, flash_attn_kernel, kernel_call, kernels
from autoseq.runtime.aten_kernels import CPU, CUDNN, EFFICIENT, FLASH
from autoseq.runtime.flash_attn_kernel import FLASH_ATTN
from autoseq.runtime.kernel_call import BlockCall, Kernel
from autoseq.runtime.kernels import attend, attend_backward, choose, why_not
from autoseq.runtime.plain import accumulate_dtype
from autoseq.runtime.reference_kernel import REFERENCE
from dense_attention import relative_error
from key_blocks import SCALE, over_blocks

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


def dense(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, allowed: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """out, lse, dq, dk, dv in float64."""
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    ratio = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    scores = q @ keys.mT * SCALE + (0 if bias is None else bias.double())
    scores = scores.masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    out = weights @ values
    grad_scores = weights * (grad @ values.mT - (grad * out).sum(-1, keepdim=True)) * SCALE
    dk, dv = ((x.unflatten(1, (-1, ratio)).sum(2)) for x in (grad_scores.mT @ q, weights.mT @ grad))
    return [out, scores.logsumexp(-1), grad_scores @ keys, dk, dv]


def check_block(tensors: list[Tensor], attn_bias: Tensor | None, is_causal: bool, allowed: Tensor) -> None:
    q, k, v, grad = tensors
    out, lse = attend(q, k, v, attn_bias, is_causal, SCALE)
    grads = attend_backward(grad, q, k, v, out.to(q.dtype), lse, attn_bias, is_causal, SCALE)
    added = attn_bias is not None and attn_bias.is_floating_point()
    expected = dense(q, k, v, grad, allowed, attn_bias if added else None)
    seen = expected[1] > -torch.inf
    assert torch.equal(lse > -torch.inf, seen), "lse is -inf exactly in the rows without keys"
    assert lse.dtype == accumulate_dtype(q.dtype)
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
        monkeypatch.setattr(kernels, "KERNELS", (REFERENCE,))


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
    for attn_bias in (None,) if mask == "no mask" else (allowed, torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)):
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


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_error_does_not_grow_with_the_number_of_blocks(dtype: torch.dtype, is_causal: bool) -> None:
    """A kernel rounds each block's share to its inputs' dtype once; the sums over blocks are in float32.

    The shares' roundings are independent, so they add up as the shares do: the fifth is chance. A merge is one rounding more
    a block in float32; and ATen's CPU kernel for halves takes an exponential that is good to 2^-20, twice in a block's sum.
    """
    tensors = draw((256, 256, 4, 2, 32, 32), dtype)
    allowed = torch.ones(256, 256, dtype=torch.bool)
    expected = dense(*tensors, allowed.tril() if is_causal else allowed)
    errors = {
        count: [float(relative_error(x, y)) for x, y in zip(over_blocks(tensors, count, is_causal), expected, strict=True)]
        for count in (1, 2, 4, 8)
    }
    for count, found in errors.items():
        allowance = count * 6e-8 if dtype == torch.float32 else 2 * 2.0**-20
        for name, error, of_one in zip(("out", "lse", "dq", "dk", "dv"), found, errors[1], strict=True):
            assert error <= 1.2 * of_one + allowance, (name, count, errors)


# What only a GPU runs ------------------------------------------------------------------------------------------------

ON_CUDA = [FLASH_ATTN, FLASH, CUDNN, EFFICIENT]
ALL_THERE = tuple(replace(kernel, missing=lambda: "") for kernel in kernels.KERNELS)


def names(call: BlockCall, missing: tuple[str, ...] = ()) -> list[str]:
    """The kernels that can serve a call, in order."""
    return [kernel.name for kernel in ALL_THERE if kernel.name not in missing and not why_not(kernel, call)]


BF16 = BlockCall("cuda", (9, 0), torch.bfloat16, 512, 512, 128, 128, "none")
CHOICES: dict[str, tuple[BlockCall, list[str]]] = {
    "halves on CUDA": (BF16, ["flash_attn", "flash", "cudnn", "efficient", "reference"]),
    "float16 is a half too": (replace(BF16, dtype=torch.float16), ["flash_attn", "flash", "cudnn", "efficient", "reference"]),
    "a mask": (replace(BF16, bias="mask"), ["efficient", "reference"]),
    "a bias": (replace(BF16, bias="float"), ["efficient", "reference"]),
    "a bias in float32": (replace(BF16, dtype=torch.float32, bias="float"), ["efficient", "reference"]),
    "float32": (replace(BF16, dtype=torch.float32), ["efficient", "reference"]),
    "float64": (replace(BF16, dtype=torch.float64), ["reference"]),
    "a wide head": (replace(BF16, key_dim=192), ["flash_attn", "flash", "efficient", "reference"]),
    "a wider head": (replace(BF16, value_dim=257), ["efficient", "reference"]),
    "a head that is padded past 128": (replace(BF16, key_dim=129, value_dim=1), ["flash_attn", "flash", "efficient", "reference"]),
    "a wide head on a consumer's GPU": (replace(BF16, key_dim=200, capability=(8, 9)), ["flash_attn", "efficient", "reference"]),
    "a single key": (replace(BF16, keys=1), ["flash_attn", "flash", "efficient", "reference"]),
    "an old GPU": (replace(BF16, dtype=torch.float16, capability=(7, 5)), ["efficient", "reference"]),
    "bfloat16 on an old GPU": (replace(BF16, capability=(7, 5)), ["reference"]),
    "a very old GPU": (replace(BF16, dtype=torch.float32, capability=(6, 1)), ["reference"]),
    "CPU": (replace(BF16, device="cpu", capability=(0, 0)), ["cpu", "reference"]),
    "a bias on CPU": (replace(BF16, device="cpu", capability=(0, 0), bias="float"), ["cpu", "reference"]),
    "float64 on CPU": (replace(BF16, device="cpu", capability=(0, 0), dtype=torch.float64), ["cpu", "reference"]),
    "an unknown device": (replace(BF16, device="meta", capability=(0, 0)), ["reference"]),
}


@pytest.mark.parametrize(("call", "expected"), CHOICES.values(), ids=CHOICES)
def test_choice(call: BlockCall, expected: list[str]) -> None:
    """Which kernels serve a call, the first of them first."""
    assert names(call) == expected


def test_kernels_that_are_not_there_say_why() -> None:
    """On this machine or any other: what is chosen is there, and what is missing says what to do."""
    for kernel in ON_CUDA:
        assert torch.cuda.is_available() or len(kernel.missing()) > 10, kernel.name
    assert torch.cuda.is_available() or choose(BF16) is REFERENCE
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert all(kernel.missing() for kernel in (FLASH, CUDNN, EFFICIENT))
        assert choose(replace(BF16, dtype=torch.float32)) is REFERENCE


def test_what_is_made_of_a_mask_goes_with_it() -> None:
    q, k, v, _ = draw(SHAPES["square"], torch.float32)
    before = len(kernel_call._MADE_OF)
    mask = torch.ones(32, 32, dtype=torch.bool).tril(-1)
    once, again = (attend(q, k, v, mask, False, SCALE) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
    assert len(kernel_call._MADE_OF) == before + 1
    del mask
    assert len(kernel_call._MADE_OF) == before
    attend(q, k, v, torch.zeros(32, 32), False, SCALE)
    assert len(kernel_call._MADE_OF) == before, "numbers are of one block"


def test_cpu_tensors_get_the_flash_kernel() -> None:
    q, _, v, _ = draw(SHAPES["square"], torch.bfloat16)
    assert choose(BlockCall.of(q, q, v, None)) is CPU
    assert choose(BlockCall.of(*(x.to("meta") for x in (q, q, v)), None)) is REFERENCE


@pytest.fixture(params=ON_CUDA, ids=lambda kernel: kernel.name)
def cuda_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """One of the kernels for CUDA, on stand-ins of its operators, for tensors that claim to be there."""
    kernel = replace(request.param, missing=lambda: "")
    monkeypatch.setattr(kernel_call, "device_of", lambda _: ("cuda", (9, 0)))
    monkeypatch.setattr(aten_kernels, "_aten", AtenOnCuda())
    monkeypatch.setattr(flash_attn_kernel, "_operators", lambda: (FlashAttn, ""))
    monkeypatch.setattr(kernels, "KERNELS", (kernel,))
    return kernel


def every_block(dtype: torch.dtype, device: str = "cpu") -> Iterator[tuple[str, list[Tensor], Tensor | None, bool, Tensor]]:
    """Its name, tensors, mask or bias, causality, and what is allowed, for every shape and mask there is."""
    for name, shape in SHAPES.items():
        tensors, size = [x.to(device) for x in draw(shape, dtype)], shape[:2]
        for mask, make in MASKS.items():
            allowed = make(*size).to(device)
            yield f"{name}, {mask}", tensors, None if mask == "no mask" else allowed, False, allowed
        allowed, everything = MASKS["random"](*size).to(device), torch.ones(size, dtype=torch.bool, device=device)
        bias = 4 * torch.randn(size, generator=torch.Generator().manual_seed(2)).to(device)
        yield f"{name}, a bias", tensors, bias, False, everything
        yield f"{name}, a bias and a mask", tensors, bias.masked_fill(~allowed, -torch.inf), False, allowed
        if size[0] == size[1]:
            yield f"{name}, causal", tensors, None, True, everything.tril()


# How many of them a kernel serves, in float32 and in halves: of 63, 50 have a mask or a bias, and one shape has a single key, which is
# too few for cuDNN.
SERVED = {"flash_attn": (0, 13), "flash": (0, 13), "cudnn": (0, 11), "efficient": (63, 63), "reference": (63, 63)}

ON_GPU_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])


@ON_GPU_DTYPES
def test_what_cuda_kernels_are_handed(cuda_kernel: Kernel, dtype: torch.dtype) -> None:
    """Layouts, alignment, padding, head counts and rows without keys, with operators that check what the kernels take for granted."""
    served = []
    for name, tensors, attn_bias, is_causal, allowed in every_block(dtype):
        if not cuda_kernel.cannot_serve(BlockCall.of(*tensors[:3], attn_bias)):
            check_block(tensors, attn_bias, is_causal, allowed)
            served.append(name)
    assert len(served) == SERVED[cuda_kernel.name][dtype != torch.float32]


@pytest.mark.usefixtures("cuda_kernel")
def test_views_into_a_message_are_aligned() -> None:
    """Keys and values are views into a packed message, which start anywhere in it."""
    q, k, v, grad = draw((9, 11, 4, 2, 8, 8), torch.float16)
    flat = torch.cat([torch.zeros(3, dtype=torch.float16), k.reshape(-1), v.reshape(-1)])
    views = [flat[3 + i * k.numel() :][: k.numel()].view(k.shape) for i in range(2)]
    check_block([q, *views, grad], None, False, torch.ones(9, 11, dtype=torch.bool))


@pytest.mark.parametrize("lse_dims", [3, 4])
def test_cudnn_is_given_its_own_kind_of_lse(lse_dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_call, "device_of", lambda _: ("cuda", (9, 0)))
    monkeypatch.setattr(aten_kernels, "_aten", AtenOnCuda(lse_dims))
    monkeypatch.setattr(kernels, "KERNELS", (replace(CUDNN, missing=lambda: ""),))
    aten_kernels._cudnn_lse_dims.cache_clear()
    check_block(draw(SHAPES["square"], torch.float16), None, False, torch.ones(32, 32, dtype=torch.bool))
    aten_kernels._cudnn_lse_dims.cache_clear()


@pytest.mark.parametrize("kernel", ["flash", "cudnn", "efficient"])
def test_operators_accept_the_arguments(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real operators, on tensors without data: their schemas, and the shapes that they give."""
    monkeypatch.setattr(kernel_call, "device_of", lambda _: ("cuda", (9, 0)))
    monkeypatch.setattr(kernels, "KERNELS", tuple(each for each in ALL_THERE if each.name == kernel))
    q, k, v, grad = (x.to("meta") for x in draw((17, 23, 6, 2, 12, 8), torch.bfloat16))
    bias = torch.ones(17, 23, dtype=torch.bool, device="meta") if kernel == "efficient" else None
    out, lse = attend(q, k, v, bias, False, SCALE)
    grads = attend_backward(grad, q, k, v, out, lse, bias, False, SCALE)
    assert out.shape == grad.shape and lse.shape == (2, 6, 17) and lse.dtype == torch.float32
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]


@pytest.mark.gpu
@ON_GPU_DTYPES
@pytest.mark.parametrize("kernel", [*ON_CUDA, REFERENCE], ids=lambda kernel: kernel.name)
def test_kernels_on_gpu(kernel: Kernel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that is there, against float64; each serves as many blocks as it is known to."""
    if kernel.missing():
        pytest.skip(kernel.missing())
    blocks = list(every_block(dtype, "cuda"))
    blocks = [block for block in blocks if not why_not(kernel, BlockCall.of(*block[1][:3], block[2]))]
    # Before Ampere the kernels serve less.
    assert len(blocks) == SERVED[kernel.name][dtype != torch.float32] or torch.cuda.get_device_capability() < (8, 0)
    monkeypatch.setattr(kernels, "KERNELS", (kernel,))
    for _, *block in blocks:
        check_block(*block)
