"""The fused forms of packing, merging and adding beside the plain ones, on a GPU: time of each, and the share of memory bandwidth.

    python benchmarks/fused_kernels.py --rows 8192 32768

Both forms are run in turn, and the table gives the median of their times and the median of the ratios of pairs. Before anything is
timed the two must agree. Without a GPU there is nothing to compare, and the script says so.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from autoseq.runtime import fused, packing, plain

Form = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Work:
    """One call: its two forms, its arguments, and how many bytes it must at least read and write."""

    name: str
    fused: Form
    plain: Form
    arguments: tuple[Any, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Result:
    """Medians: seconds of each form, of the ratio plain / fused over pairs, and the fused form's bytes a second."""

    work: str
    rows: int
    dtype: str
    fused_s: float
    plain_s: float
    ratio: float
    fused_bytes_per_s: float


def works(rows: int, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, ranks: int) -> Iterator[Work]:
    """What one layer of one rank does with `rows` local rows."""

    def rand(num_heads: int, dtype: torch.dtype = dtype, num_rows: int = rows) -> Tensor:
        return torch.randn(1, num_heads, num_rows, dim, device="cuda", dtype=dtype)

    out, block_out = rand(heads, torch.float32), rand(heads)
    lse, block_lse = (torch.randn(1, heads, rows, device="cuda") for _ in range(2))
    yield Work("merge", fused.merge, plain.merge, (out, lse, block_out, block_lse), _size(out, out, block_out, lse, lse, block_lse))

    totals = [rand(count, torch.float32) for count in (heads, kv_heads, kv_heads)]
    shares = [total.to(dtype) for total in totals]
    yield Work("accumulate", fused.accumulate, plain.accumulate, (totals, shares), _size(*totals, *totals, *shares))

    qkv = [rand(count).transpose(1, 2).contiguous().transpose(1, 2) for count in (heads, kv_heads, kv_heads)]
    owned = [(p * x.shape[1], x.shape[1]) for p in range(ranks) for x in qkv]
    starts = [begin // ranks for begin, _ in owned]
    ends = [max(begin // ranks + 1, (begin + count) // ranks) for begin, count in owned]
    flat = packing.split_heads(qkv, starts, ends)
    yield Work("split_heads", fused.split_heads, packing.split_heads, (qkv, starts, ends), 2 * _size(flat))
    sizes = [size for x in qkv for size in x.shape]
    yield Work("join_heads", fused.join_heads, packing.join_heads, (flat, sizes, starts, ends), _size(flat, *qkv))

    whole = [rand(max(1, count // ranks), num_rows=rows * ranks) for count in (heads, kv_heads, kv_heads)]
    sizes = [size for x in whole for size in (1, x.shape[1], rows, dim)]
    for layout in ("contiguous", "zigzag"):
        flat = packing.split_rows(whole, ranks, layout)
        yield Work(f"split_rows, {layout}", fused.split_rows, packing.split_rows, (whole, ranks, layout), 2 * _size(flat))
        yield Work(f"join_rows, {layout}", fused.join_rows, packing.join_rows, (flat, sizes, ranks, layout), 2 * _size(flat))


def measure(work: Work, rows: int, dtype: torch.dtype, repeats: int) -> Result:
    """Both forms in turn, so that what else the machine does hits both."""
    _check_agreement(work)
    pairs = [(_seconds(work.fused, work.arguments), _seconds(work.plain, work.arguments)) for _ in range(repeats)]
    fused_s, plain_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(unfused / one for one, unfused in pairs)
    return Result(work.name, rows, str(dtype).removeprefix("torch."), fused_s, plain_s, ratio, work.num_bytes / fused_s)


def _check_agreement(work: Work) -> None:
    ours, theirs = (_copied(work.arguments) for _ in range(2))
    result, expected = work.fused(*ours), work.plain(*theirs)
    changed = result is None
    for x, y in zip(_tensors(ours if changed else result), _tensors(theirs if changed else expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)(_copied(each) for each in value) if isinstance(value, (list, tuple)) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for each in value for x in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _seconds(form: Form, arguments: tuple[Any, ...]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    form(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def main(
    rows: Annotated[list[int], typer.Option(help="Local rows; give it several times.")] = [8192, 32768],  # noqa: B006 (typer's way)
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    ranks: int = 8,
    repeats: int = 50,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time every fused form beside its plain one."""
    if not torch.cuda.is_available() or fused.missing():
        reason = fused.missing() if torch.cuda.is_available() else "torch finds no CUDA device"
        typer.echo(f"Nothing to measure: {reason}. The plain forms are what runs here.")
        return
    results = [
        measure(work, count, dtype, repeats)
        for count in rows
        for dtype in (torch.bfloat16, torch.float32)
        for work in works(count, dtype, heads, kv_heads, dim, ranks)
    ]
    table = Table("work", "rows", "dtype", "fused", "plain", "plain / fused", "fused bandwidth")
    for r in results:
        table.add_row(r.work, str(r.rows), r.dtype, f"{r.fused_s * 1e6:,.0f} us", f"{r.plain_s * 1e6:,.0f} us", f"{r.ratio:.2f}",
                      f"{r.fused_bytes_per_s / 1e9:,.0f} GB/s")  # fmt: skip
    console = Console(width=140)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(r) for r in results], indent=1))


if __name__ == "__main__":
    typer.run(main)
