"""The one signature by which compiled programs call a strategy, and what all strategies do before their own work.

A strategy says only how it moves q, k and v and which op computes on them; `attention_function` makes its `attention` of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoseq.runtime.attention_op import AttentionOp
from autoseq.runtime.errors import UnsupportedError
from autoseq.runtime.groups import group_of
from autoseq.runtime.layout import Layout
from autoseq.runtime.second_derivative import twice_differentiable
from autoseq.runtime.tiles import EmptyRows


@dataclass(frozen=True, slots=True)
class Terms:
    """What an attention op takes besides q, k and v: one and the same on every rank."""

    tensors: tuple[list[Tensor], Tensor | None, Tensor | None]  # captures, sinks, seed
    settings: tuple[Any, ...]  # from scale to k_len, in the order of the ops' schema
    heads_per_kv: int
    layout: Layout
    group: str
    axes: tuple[str, ...]  # the groups of this rank along the dimensions of the mesh, if it has several

    def call(
        self,
        op: AttentionOp,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        groups: Sequence[str] | None = None,
        places: Sequence[int] = (),
        first_head: int = 0,
    ) -> Tensor:
        """The op on rows of this rank and the heads from `first_head` on; see `Settings` for groups and places."""
        return op.forward(q, k, v, *self.flat([self.group] if groups is None else groups, places=places, first_head=first_head))[0]

    def call_on_all_rows(self, op: AttentionOp, q: Tensor, k: Tensor, v: Tensor, first_head: int = 0) -> Tensor:
        """The op on all rows in global order (padding last) and the heads from `first_head` on: one chunk, and no group to ask."""
        return op.forward(q, k, v, *self.flat([], layout="contiguous", first_head=first_head))[0]

    @property
    def two_axes(self) -> tuple[str, str] | None:
        """This rank's groups across nodes and inside its node; None on one rank. Raises UnsupportedError where there are none."""
        if len(self.axes) == 2:
            return self.axes[0], self.axes[1]
        if group_of(self.group).size > 1:
            raise UnsupportedError(f"Attention on two levels needs the groups along both dims of a mesh; it got {self.axes}.")
        return None

    def flat(
        self,
        groups: Sequence[str],
        *,
        layout: Layout | None = None,
        places: Sequence[int] = (),
        first_head: int = 0,
        gathered: bool = False,
    ) -> tuple[Any, ...]:
        """The settings of an op, in the order of its schema."""
        where = (layout or self.layout, list(places), gathered, list(groups))
        return (*self.tensors, *self.settings, first_head, self.heads_per_kv, *where)


Compute = Callable[[Tensor, Tensor, Tensor, Terms], Tensor]


def attention_function(module: str, compute: Compute, name: str = "attention") -> Callable[..., Tensor]:
    """`<module>.<name>`, a function that programs call."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        captures: list[Tensor],
        sinks: Tensor | None = None,
        seed: Tensor | None = None,
        *,
        scale: float,
        score: str,
        predicate: str,
        max_ahead: int | None,
        max_behind: int | None,
        empty_rows: EmptyRows,
        dropout_p: float,
        q_len: int,
        k_len: int,
        layout: Layout,
        group: str,
        axes: Sequence[str] = (),
    ) -> Tensor:
        """Attention of this rank's q [B,H,s,D] to all ranks' k [B,K,t,D], v [B,K,t,Dv], H a multiple of K: out [B,H,s,Dv].

        `score` and `predicate` are formulas (`runtime/formula.py`) that look up `captures`, which are whole on every rank. A float
        capture and `sinks` [H] get a gradient if they need one: this rank's share, over its rows or its heads.
        What it sends is the strategy's. Raises UnsupportedError for what is not kept exact, MessageError when a peer is lost.
        """
        q, k, v = checked_inputs(q, k, v)
        settings = (scale, score, predicate, max_ahead, max_behind, empty_rows, dropout_p, q_len, k_len)
        terms = Terms((captures, sinks, seed), settings, q.shape[1] // k.shape[1], layout, group, tuple(axes))
        return twice_differentiable(compute(q, k, v, terms), q, k, v, terms)

    # Where the function is found again by name, in the code of a graph.
    attention.__module__, attention.__name__, attention.__qualname__ = module, name, name
    return attention


def checked_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the dtype that torch's SDPA computes in: under autocast it casts them.

    Raises UnsupportedError for what no strategy keeps exact.
    """
    if q.shape[1] % k.shape[1] != 0:
        raise UnsupportedError(
            f"Attention has {q.shape[1]} query heads and {k.shape[1]} key/value heads; "
            "the first must be a multiple of the second."
        )
    q, k, v = (_autocast(x) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise UnsupportedError(f"Attention has query, key and value of different dtypes: {q.dtype}, {k.dtype}, {v.dtype}.")
    return q, k, v


def _autocast(x: Tensor) -> Tensor:
    device = x.device.type
    supported = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if supported and x.dtype != torch.float64 else x
