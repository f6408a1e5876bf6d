"""What a rank does in the attention tests: shard a case by hand, call a strategy, return its shards. And who serves which case."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from autoseq.runtime.groups import group_from_mesh
from autoseq.runtime.layout import Layout, local_length, rank_positions
from autoseq.runtime.packed import Packed
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site
from dense_attention import Case


def site_of(case: Case, mesh: tuple[int, ...] = ()) -> Site:
    """A case as the planner sees it."""
    known = {name: value for name, value in case.settings().items() if name in Site.__dataclass_fields__}
    return Site(
        batch=case.batch,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        value_dim=case.value_dim,
        element_bytes=case.dtype.itemsize,
        learned=case.score_case().learned,
        has_sinks=case.has_sinks,
        mesh=mesh,
        **known,
    )


WINDOW = site_of(Case(16, 16, mask="window"))
SPLIT = [name for name, strategy in STRATEGIES.items() if strategy.cannot_serve(WINDOW, 2) is None]
"""The strategies that split a sequence over a plain group; any of them serves a causal window."""

LEVELS = ["hybrid", "hybrid_gather", "hybrid_outer", "hybrid_gather_outer", "double_ring"]
"""Those that split it over a mesh of two dims."""


def layouts_of(strategy: str) -> list[Layout]:
    """The layouts that a strategy takes."""
    return [layout for layout in get_args(Layout) if STRATEGIES[strategy].cannot_lay_out(layout) is None]


def serves(strategy: str, case: Case, P: int, mesh: tuple[int, ...] = ()) -> bool:
    """Whether a strategy may compute a case."""
    return STRATEGIES[strategy].cannot_serve(site_of(case, mesh), P) is None


Run = tuple[str, Layout, Case]
"""A strategy, a layout and a case."""


def runs_of(strategy: str, P: int, cases: Mapping[str, Case], mesh: tuple[int, ...] = ()) -> dict[str, Run]:
    """The cases that a strategy serves, in each layout that it takes, by a name for each run."""
    return {
        f"{name}, {layout}": (strategy, layout, case)
        for name, case in cases.items()
        for layout in layouts_of(strategy)
        if serves(strategy, case, P, mesh)
    }


def axes_of(mesh: tuple[int, ...]) -> tuple[str, ...]:
    """This rank's groups along the dims of a mesh of all ranks, if it has dims."""
    return group_from_mesh(init_device_mesh("cpu", mesh)).axes if mesh else ()


def attend_all_on_rank(rank: int, P: int, runs: dict[str, Run], mesh: tuple[int, ...] = ()) -> list[tuple[Tensor, ...]]:
    """`attend_on_rank` for many runs in one job, which costs as much to start as a dozen of them."""
    results, axes = [], axes_of(mesh)
    for name, run in runs.items():
        try:
            results.append(attend_on_rank(rank, P, *run, axes=axes))
        except Exception as error:
            raise RuntimeError(f"in the run {name!r}") from error
    return results


def attend_on_rank(
    rank: int, P: int, strategy: str, layout: Layout, case: Case, axes: tuple[str, ...] = (), device: str = "cpu"
) -> tuple[Tensor, ...]:
    """This rank's padded shards of out, dq, dk, dv, then its shares of the further gradients."""
    q, k, v, grad = (x.to(device) for x in case.tensors())
    q, grad = (shard(x, rank, P, layout, padding="edge") for x in (q, grad))
    grad = _without_padding(grad, rank, P, layout, case.q_len)
    # Nothing may ever read a padding key: NaN would show in every row that does.
    k, v = (shard(x, rank, P, layout, padding="nan") for x in (k, v))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    captures, sinks, seed = [_on(device, x) for x in case.captures()], _on(device, case.sinks()), _on(device, case.dropout_seed())
    out = STRATEGIES[strategy].attention(*leaves, captures, sinks, seed, **call_keywords(case, layout), axes=axes)
    leaves += [x for x in (*captures, sinks) if x is not None and x.requires_grad]
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def largest_held(rank: int, P: int, strategy: str, case: Case, layout: Layout = "zigzag") -> int:
    """The most bytes of packed keys, values and gradients that are there at once."""
    held, most = 0, 0
    make = Packed.empty

    def empty(*args: Any, **settings: Any) -> Packed:
        nonlocal held, most
        packed = make(*args, **settings)
        size = packed.message().untyped_storage().nbytes()
        held += size
        most = max(most, held)
        weakref.finalize(packed.message().untyped_storage(), release, size)
        return packed

    def release(size: int) -> None:
        nonlocal held
        held -= size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packed, "empty", empty)
        attend_on_rank(rank, P, strategy, layout, case)
    return most


def _on(device: str, x: Tensor | None) -> Tensor | None:
    """A leaf like x on a device."""
    return x if x is None or device == "cpu" else x.detach().to(device).requires_grad_(x.requires_grad)


def call_keywords(case: Case, layout: Layout) -> dict[str, Any]:
    """The keywords of a strategy's call."""
    return dict(layout=layout, group=group_from_mesh(None).name, **case.settings())


def shard(x: Tensor, rank: int, P: int, layout: Layout, *, padding: str) -> Tensor:
    """Rows (dim 2) of a rank; padding repeats the last row, or is NaN."""
    n = x.shape[2]
    positions = rank_positions(rank, P, local_length(n, P, layout), layout, x.device)
    rows = x[:, :, positions.clamp(max=n - 1)]
    return rows if padding == "edge" else rows.masked_fill((positions >= n)[:, None], torch.nan)


def _without_padding(grad: Tensor, rank: int, P: int, layout: Layout, n: int) -> Tensor:
    positions = rank_positions(rank, P, grad.shape[2], layout, grad.device)
    return grad.masked_fill((positions >= n)[:, None], 0)


def assemble(shards: list[Tensor], n: int, layout: Layout) -> Tensor:
    """Full length from the ranks' padded shards."""
    P, s = len(shards), shards[0].shape[2]
    positions = torch.cat([rank_positions(rank, P, s, layout, "cpu") for rank in range(P)])
    full = torch.empty_like(torch.cat(shards, 2))
    full[:, :, positions] = torch.cat(shards, 2)
    return full[:, :, :n]


def padding_rows(shards: list[Tensor], n: int, layout: Layout) -> Tensor:
    """All padding rows of all shards, flat."""
    P, s = len(shards), shards[0].shape[2]
    return torch.cat([x[:, :, rank_positions(r, P, s, layout, "cpu") >= n].reshape(-1) for r, x in enumerate(shards)])
