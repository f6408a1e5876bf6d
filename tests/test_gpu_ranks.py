"""NCCL ranks on GPUs: every strategy's numbers, and that communication runs beside computation.

Two ranks share a GPU where there is only one, if its NCCL allows that.
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from attention_checks import SHAPES, assembled, oracle
from attention_job import SPLIT, attend_on_rank, layouts_of, runs_of
from autoseq.runtime.layout import Layout
from dense_attention import MASKS, Case, relative_error
from ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

P = 2
SMALL = SHAPES | {mask: Case(23, 23, mask=mask, batch=2, heads=4, kv_heads=2, seed=3) for mask in MASKS}
LARGE = Case(16384, 16384, heads=16, kv_heads=16, head_dim=128, value_dim=128, dtype=torch.bfloat16)


def on_gpu(rank: int) -> str:
    """This rank's device, with NCCL for it in the world group."""
    os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    device = f"cuda:{rank % torch.cuda.device_count()}"
    torch.cuda.set_device(device)
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group("nccl", store=dist.PrefixStore("nccl", store), rank=rank, world_size=P, timeout=timedelta(seconds=60))
    dist.barrier(device_ids=[torch.cuda.current_device()])
    return device


def attend_all(rank: int, P: int, runs: dict) -> list[tuple[torch.Tensor, ...]]:
    device = on_gpu(rank)
    return [tuple(x.cpu() for x in attend_on_rank(rank, P, *run, device=device)) for run in runs.values()]


@pytest.mark.parametrize("strategy", SPLIT)
def test_numbers_on_gpu(strategy: str) -> None:
    """float64 by the reference kernel; bfloat16 by the fast ones, within the rounding of what goes in and out, 2^-9 each."""
    cases = SMALL | {f"{name}, bfloat16": replace(case, dtype=torch.bfloat16) for name, case in SMALL.items()}
    runs = runs_of(strategy, P, cases)
    per_rank = run_ranks(attend_all, P, runs, timeout_s=300)
    for i, (name, (_, layout, case)) in enumerate(runs.items()):
        results = assembled([of_rank[i] for of_rank in per_rank], layout, case)
        for x, y in zip(results, oracle(case), strict=True):
            assert relative_error(x, y) <= (1e-10 if case.dtype == torch.float64 else 2e-2), name


def beside(rank: int, P: int, strategy: str, layout: Layout, case: Case) -> float:
    """Microseconds in which both a message and a computation run on this rank's GPU."""
    device = on_gpu(rank)
    attend_on_rank(rank, P, strategy, layout, case, device=device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        attend_on_rank(rank, P, strategy, layout, case, device=device)
        torch.cuda.synchronize()
    kernels = [(e.name, e.time_range.start, e.time_range.end) for e in trace.events() or () if e.device_type == DeviceType.CUDA]
    messages = [(start, end) for name, start, end in kernels if "nccl" in name.lower()]
    work = [(start, end) for name, start, end in kernels if "flash" in name.lower() or "fmha" in name.lower()]
    return sum(max(0.0, min(a_end, b_end) - max(a, b)) for a, a_end in messages for b, b_end in work)


@pytest.mark.parametrize("strategy", SPLIT)
def test_messages_run_beside_attention(strategy: str) -> None:
    """At sizes where both take milliseconds, they share time. A halo is for windows."""
    case = replace(LARGE, mask="window" if strategy == "halo" else "causal")
    for microseconds in run_ranks(beside, P, strategy, layouts_of(strategy)[-1], case, timeout_s=300):
        assert microseconds > 0
