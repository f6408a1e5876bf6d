"""What a benchmark sets side by side: autoseq's strategies, what a user would pick instead, one device, and the parts of the floor.

Each is made on a rank as a `Contender`: what it holds before the clock starts, and a function of q, k and v that the clock measures
forward and backward. The strategies are those of the registry that can serve the work; which they are is found out, not listed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from autoseq.runtime.groups import group_from_mesh
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from peers import PEERS, Absent
from rank_processes import Seat
from work import Work, rows_of

Kind = Literal["autoseq", "peer", "one device", "compute"]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Contender:
    """q, k, v and the gradient of out as this rank holds them, and the attention; `leaves` is empty on a rank without work."""

    name: str
    kind: Kind
    attention: Attention
    leaves: tuple[Tensor, ...]
    grad: Tensor
    layout: Layout | None = None  # of the rows, if this rank holds a part of them
    heads_first: bool = True
    scale: float = 1.0  # of the measured time, where the shares of the ranks cannot be equal

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward: out, dq, dk, dv."""
        if not self.leaves:
            return ()
        out = self.attention(*self.leaves)
        return out.detach(), *torch.autograd.grad(out, self.leaves, self.grad)


def contenders(work: Work, seat: Seat, names: tuple[str, ...]) -> Iterator[Contender | tuple[str, str]]:
    """All of them, or (name, why not). `names` restricts strategies and peers; empty means all there are."""
    yield _one_device(work, seat)
    yield from _shares(work, seat)
    for name, strategy in STRATEGIES.items():
        if name != "local" and (not names or name in names):
            reason = strategy.cannot_serve(work.site(seat.mesh), seat.world_size)
            yield (name, reason) if reason else served_by(name, work, seat, layout_for(name, work))
    for name, make in PEERS.items():
        if not names or name in names:
            try:
                yield _on_rows(name, "peer", make(work, dist.group.WORLD), work, seat, "contiguous", heads_first=False)
            except Absent as absent:
                yield name, str(absent)


def _one_device(work: Work, seat: Seat) -> Contender:
    *qkv, grad = work.tensors()
    leaves = tuple(x.requires_grad_() for x in qkv) if seat.rank == 0 else ()
    return Contender("one device", "one device", work.sdpa, leaves, grad)


def _shares(work: Work, seat: Seat) -> Iterator[Contender]:
    """A P-th of the work with everything at hand, by two kernels: what computing alone would take, all ranks at once."""
    q, k, v, grad = work.tensors()
    H, P, ratio = work.heads, seat.world_size, work.heads // work.kv_heads
    heads = -(-H // P)
    grouped = ratio if heads % ratio == 0 else 1
    kv = [x.repeat_interleave(ratio // grouped, 1)[:, : heads // grouped] for x in (k, v)]
    leaves = tuple(x.contiguous().requires_grad_() for x in (q[:, :heads], *kv))
    for name, attention in (("compute, SDPA", work.sdpa), ("compute, local", strategy_call("local", work, "", "contiguous"))):
        yield Contender(name, "compute", attention, leaves, grad[:, :heads].contiguous(), scale=H / P / heads)


def served_by(name: str, work: Work, seat: Seat, layout: Layout) -> Contender:
    """A strategy on this rank's rows in that layout."""
    attention = strategy_call(name, work, group_from_mesh(None).name, layout, _axes(seat))
    return _on_rows(name, "autoseq", attention, work, seat, layout)


def layout_for(name: str, work: Work) -> Layout:
    """The one that divides the work of a strategy evenly."""
    strategy = STRATEGIES[name]
    zigzag = work.mask == "causal" and strategy.balanced_by_zigzag and strategy.cannot_lay_out("zigzag") is None
    return "zigzag" if zigzag else "contiguous"


def _axes(seat: Seat) -> tuple[str, ...]:
    """The groups of this rank along nodes and within its node, where there are several of both."""
    if not seat.mesh:
        return ()
    mesh = init_device_mesh("cpu", seat.mesh, mesh_dim_names=("nodes", "ranks"))
    return tuple(mesh.get_group(name).group_name for name in ("nodes", "ranks"))


def strategy_call(name: str, work: Work, group: str, layout: Layout, axes: tuple[str, ...] = ()) -> Attention:
    """A strategy as compiled programs call it."""
    call = STRATEGIES[name].attention
    mesh = {"axes": axes} if "axes" in inspect.signature(call).parameters else {}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(
            q, k, v, [], None, None, scale=work.head_dim**-0.5, score="", predicate="", max_ahead=work.max_ahead,
            max_behind=work.max_behind, empty_rows="zero", dropout_p=0.0, q_len=work.seq_len, k_len=work.seq_len, layout=layout,
            group=group, **mesh,
        )  # fmt: skip

    return attention


def _on_rows(
    name: str, kind: Kind, attention: Attention, work: Work, seat: Seat, layout: Layout, *, heads_first: bool = True
) -> Contender:
    rows = [rows_of(x, seat.rank, seat.world_size, layout) for x in work.tensors()]
    q, k, v, grad = (x.contiguous() if heads_first else x.transpose(1, 2).contiguous() for x in rows)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    return Contender(name, kind, attention, leaves, grad, layout, heads_first)
