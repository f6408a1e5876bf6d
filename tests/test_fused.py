"""Packing, merging and accumulating in one pass: Triton's forms give what the plain forms give, run by Triton's interpreter.

On a machine with a GPU the same tests run compiled: they are marked `gpu` too.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from autoseq.runtime import fused, packing, plain
from autoseq.runtime.layout import Layout
from key_blocks import over_blocks

# Rows, head dims and strides that do not fill a tile, and that do.
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
MODULES = ("autoseq.runtime.triton_merge", "autoseq.runtime.triton_packing")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton")


class Forms:
    """The Triton forms, and the device to run them on."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.merging, self.packing = (importlib.import_module(name) for name in MODULES)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator).to(self.device, dtype)


@contextlib.contextmanager
def modules_anew(*, interpret: bool) -> Iterator[None]:
    """Triton decides when a kernel is defined whether it is interpreted, so the modules are imported anew, and again afterwards."""
    _forget_modules()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", str(int(interpret)))
        # Triton 3.9 warns until one of the two is chosen; either way of rounding a*b + c is within the tolerances here.
        environment.setenv("TRITON_DEFAULT_FP_FUSION", "1")
        yield
    _forget_modules()


def _forget_modules() -> None:
    for name in MODULES:
        package, _, module = name.rpartition(".")
        sys.modules.pop(name, None)
        vars(sys.modules[package]).pop(module, None)


@pytest.fixture(params=[pytest.param("cpu", marks=needs_triton), pytest.param("cuda", marks=[needs_triton, pytest.mark.gpu])])
def forms(request: pytest.FixtureRequest) -> Iterator[Forms]:
    # What the interpreter computes with warns of infinities, which are meant.
    with modules_anew(interpret=request.param == "cpu"), np.errstate(all="ignore"):
        yield Forms(request.param)


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


# Merge and accumulate -------------------------------------------------------------------------------------------------

LSES = [-torch.inf, -1e30, -200.0, -1.0, 0.0, 1.5, 200.0, 1e30]


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(forms: Forms, dtype: torch.dtype) -> None:
    """Every pair of magnitudes, rows of a longer tensor, heads of transposed storage; a row is a pair of lses."""
    pairs = torch.tensor(list(itertools.product(LSES, LSES)), device=forms.device).T.contiguous()
    before, block = (x.expand(2, 3, -1).contiguous() for x in pairs)
    rows = before.shape[-1]
    out = forms.randn(2, 3, rows + 9, 20)[:, :, 4 : 4 + rows]
    lse = before.new_zeros(2, 3, rows + 9)[:, :, 4 : 4 + rows].copy_(before)
    block_out = forms.randn(2, rows, 3, 20, dtype=dtype).transpose(1, 2)
    expected = (out.clone(), lse.clone())
    plain.merge(*expected, block_out, block)
    forms.merging.merge(out, lse, block_out, block)
    # One rounding of a weight or of a log, in units of float32.
    torch.testing.assert_close(out, expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, expected[1], rtol=1e-6, atol=1e-6)


def test_merge_in_float64(forms: Forms) -> None:
    out, lse, block_out, block_lse = (forms.randn(1, 2, 5, *dims, dtype=torch.float64) for dims in ((3,), (), (3,), ()))
    expected = (out.clone(), lse.clone())
    plain.merge(*expected, block_out, block_lse)
    forms.merging.merge(out, lse, block_out, block_lse)
    torch.testing.assert_close((out, lse), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate(forms: Forms, dtype: torch.dtype) -> None:
    """Slices of dq, dk and dv, which differ in heads, rows and head dim: bit for bit the plain sums."""
    sizes = [(2, 6, 33, 24), (2, 2, 70, 24), (2, 2, 70, 5)]
    wholes = [forms.randn(B, H, n + 7, D) for B, H, n, D in sizes]
    shares = [forms.randn(B, n, H, D, dtype=dtype).transpose(1, 2) for B, H, n, D in sizes]
    expected = [whole.clone() for whole in wholes]
    plain.accumulate([x[:, :, 2:-5] for x in expected], shares)
    forms.merging.accumulate([x[:, :, 2:-5] for x in wholes], shares)
    for x, y in zip(wholes, expected, strict=True):
        assert torch.equal(bits(x), bits(y))


def test_nothing_to_do(forms: Forms) -> None:
    """No rows, no keys, no heads: nothing is launched and nothing fails."""
    empty = forms.randn(2, 0, 4, 8)
    forms.merging.merge(empty, empty[..., 0], empty, empty[..., 0])
    forms.merging.accumulate([empty, empty], [empty, empty])
    total, share = forms.randn(1, 1, 3, 8), forms.randn(1, 1, 3, 8)
    expected = total + share
    forms.merging.accumulate([empty, total], [empty, share])
    assert torch.equal(total, expected)
    assert forms.packing.split_heads([empty], [0, 0], [0, 0]).numel() == 0
    assert forms.packing.join_rows(empty.flatten(), [2, 0, 2, 8], 2, "zigzag")[0].shape == (2, 0, 4, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_through_the_fused_forms(forms: Forms, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they serve, they are what attention over blocks calls, forward and backward."""
    q, k, v, grad = (forms.randn(2, H, 24, 8, dtype=dtype) for H in (4, 2, 2, 4))
    expected = over_blocks([q, k, v, grad], 3, True)
    monkeypatch.setattr(fused, "why_plain", lambda _: "")
    monkeypatch.setattr(plain, "merge", None)
    monkeypatch.setattr(plain, "accumulate", None)
    for x, y in zip(over_blocks([q, k, v, grad], 3, True), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)  # roundings of weights and logs; what the kernels give is the same


# Packing --------------------------------------------------------------------------------------------------------------

# Heads [start, end) of each rank, for each tensor.
HEADS: dict[str, list[list[tuple[int, int]]]] = {
    "even": [[(0, 2), (2, 4)], [(0, 1), (1, 2)]],
    "uneven, one rank has none": [[(0, 2), (2, 3), (3, 3)]],
    "KV heads on several ranks": [[(0, 2), (2, 4), (4, 6)], [(0, 1), (0, 2), (1, 2)]],
    "a head for all": [[(0, 1)] * 4, [(0, 1), (1, 2), (2, 3), (3, 4)], [(0, 1)] * 4],
    "one rank": [[(0, 3)]],
}


def of_heads(forms: Forms, ranges: list[list[tuple[int, int]]], dtype: torch.dtype) -> tuple[list[Tensor], list[int], list[int]]:
    """Tensors of several head dims and layouts, and their heads' bounds as the operators take them."""
    xs = [forms.randn(2, per_rank[-1][1], 5, 8 + 4 * i, dtype=dtype) for i, per_rank in enumerate(ranges)]
    xs[0] = xs[0].transpose(1, 2).contiguous().transpose(1, 2)
    bounds = [pair for per_rank in zip(*ranges, strict=True) for pair in per_rank]
    return xs, [start for start, _ in bounds], [end for _, end in bounds]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranges", HEADS.values(), ids=HEADS)
def test_heads(forms: Forms, ranges: list[list[tuple[int, int]]], dtype: torch.dtype) -> None:
    xs, starts, ends = of_heads(forms, ranges, dtype)
    flat = packing.split_heads(xs, starts, ends)
    assert torch.equal(bits(forms.packing.split_heads(xs, starts, ends)), bits(flat))
    sizes = [size for x in xs for size in x.shape]
    # Small integers: their sums are exact in every dtype, however the interpreter rounds (it truncates to bfloat16).
    pieces = (forms.randn(flat.numel()) * 4).round().to(dtype)
    expected = packing.join_heads(pieces, sizes, starts, ends)
    for x, y in zip(forms.packing.join_heads(pieces, sizes, starts, ends), expected, strict=True):
        assert x.is_contiguous() and torch.equal(bits(x), bits(y))


@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_heads_are_summed_in_float32(forms: Forms, dtype: torch.dtype) -> None:
    """In bfloat16 256 + 1 is 256, and so would be 256 + 1 + 1."""
    pieces = torch.tensor([256.0, 1.0, 1.0], dtype=dtype, device=forms.device)
    for join_heads in (packing.join_heads, forms.packing.join_heads):
        assert join_heads(pieces, [1, 1, 1, 1], [0, 0, 0], [1, 1, 1])[0].item() == 258


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("P", [1, 2, 3])
def test_rows(forms: Forms, P: int, layout: Layout, dtype: torch.dtype) -> None:
    shapes = [(2, 3, 6, 20), (2, 1, 6, 20), (2, 1, 6, 7)]
    ys = [forms.randn(B, P * s, h, D, dtype=dtype).transpose(1, 2) for B, h, s, D in shapes]
    flat = packing.split_rows(ys, P, layout)
    assert torch.equal(bits(forms.packing.split_rows(ys, P, layout)), bits(flat))
    sizes = [size for shape in shapes for size in shape]
    for x, y in zip(forms.packing.join_rows(flat, sizes, P, layout), ys, strict=True):
        assert x.is_contiguous() and torch.equal(bits(x), bits(y.contiguous()))


# Compiled -------------------------------------------------------------------------------------------------------------

STRIDES = ("i64", "i32", "i32", "i32")
COUNTS = ("i32", "i32")
TILE = {"ROWS": 32, "COLUMNS": 128}


def signature(names: str, *, tuples: dict[str, tuple[Any, ...]], **pointers: str) -> dict[str, Any]:
    """The types of a kernel's arguments: sizes are 32 bits wide unless they are said to be something else."""
    return {name: tuples.get(name, pointers.get(name, "constexpr" if name.isupper() else "i32")) for name in names.split()}


LAUNCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "merging._merge_kernel": (
        signature(
            "out lse block_out block_lse heads rows dim row_tiles out_at lse_at block_out_at block_lse_at ROWS COLUMNS",
            tuples={"out_at": STRIDES, "lse_at": STRIDES[:3], "block_out_at": STRIDES, "block_lse_at": STRIDES[:3]},
            out="*fp32", lse="*fp32", block_out="*bf16", block_lse="*fp32",
        ),
        TILE,
    ),
    "merging._add_kernel": (
        signature(
            "totals shares heads rows dims row_tiles ends totals_at shares_at ROWS COLUMNS",
            tuples={
                **dict.fromkeys(("heads", "rows", "dims", "row_tiles", "ends"), ("i32",) * 3),
                **dict.fromkeys(("totals_at", "shares_at"), (STRIDES,) * 3),
                "totals": ("*fp32",) * 3, "shares": ("*bf16",) * 3,
            },
        ),
        {"ROWS": (32, 32, 64), "COLUMNS": (128, 128, 64)},
    ),
    "packing._split_heads_kernel": (
        signature(
            "x flat starts counts bases batch rows dim row_tiles x_at P ROWS COLUMNS",
            tuples={**dict.fromkeys(("starts", "counts", "bases"), COUNTS), "x_at": STRIDES}, x="*bf16", flat="*bf16",
        ),
        {"P": 2, **TILE},
    ),
    "packing._join_heads_kernel": (
        signature(
            "flat x starts counts bases heads rows dim row_tiles P ROWS COLUMNS SUM",
            tuples=dict.fromkeys(("starts", "counts", "bases"), COUNTS), x="*bf16", flat="*bf16",
        ),
        {"P": 2, **TILE, "SUM": "fp32"},
    ),
    "packing._rows_kernel": (
        signature(
            "x flat base rank_size heads rows local_rows dim row_tiles x_at P ZIGZAG PACK ROWS COLUMNS",
            tuples={"x_at": STRIDES}, x="*bf16", flat="*bf16",
        ),
        {"P": 2, "ZIGZAG": True, "PACK": True, **TILE},
    ),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels_compile_for_gpus(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to machine code, which needs no GPU: what the interpreter accepts the compiler may not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types, constants = LAUNCHES[name]
    with modules_anew(interpret=False):
        triton, backends = (importlib.import_module(name) for name in ("triton", "triton.backends.compiler"))
        module, kernel = name.split(".")
        constants = {key: triton.language.float32 if value == "fp32" else value for key, value in constants.items()}
        source = triton.compiler.ASTSource(getattr(getattr(Forms("cuda"), module), kernel), types, constants)
        compiled = triton.compile(source, target=backends.GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 1000


def test_cpu_takes_the_plain_forms() -> None:
    assert "GPU" in fused.why_plain(torch.zeros(1))
    assert fused.missing() == "" or "pip install triton" in fused.missing()


def test_benchmark_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "fused_kernels.py"))["main"]()
    assert "Nothing to measure: torch finds no CUDA device" in capsys.readouterr().out
