"""Turns a strategy's forward and backward into a custom op that AOTAutograd and Inductor carry as one node.

Point-to-point messages and data-dependent tiles do not trace, so that work lives inside `torch.library` ops. All of them have
one schema, and with it one fake, one autograd formula and one treatment of padding:

- query rows past q_len are finite: the first of a chunk attends as row q_len-1 would, the others copy it;
- their incoming gradient counts as zero, and keys past k_len are never looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autoseq.runtime.blockwise import Chunk, Problem
from autoseq.runtime.groups import SequenceGroup, group_of
from autoseq.runtime.kernels import accumulate_dtype
from autoseq.runtime.layout import Layout, chunk_ranges
from autoseq.runtime.mask import Mask

_SETTINGS = (
    "Tensor[] captures, Tensor? sinks, Tensor? seed, float scale, str score, str predicate, SymInt? max_ahead, SymInt? max_behind, "
    "str empty_rows, float dropout_p, SymInt q_len, SymInt k_len, SymInt first_head, SymInt heads_per_kv, str layout, str group"
)
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor)"
)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an attention op: local q [B,H,s,D], k [B,K,t,D], v [B,K,t,Dv], and what to compute with them."""

    q: Tensor
    k: Tensor
    v: Tensor
    problem: Problem
    q_len: int
    k_len: int
    layout: Layout
    group: SequenceGroup
    queries: list[Chunk] = field(init=False)  # this rank's valid rows

    def __post_init__(self) -> None:
        object.__setattr__(self, "queries", [chunk for chunk in self._query_ranges() if chunk[2] > 0])

    @property
    def padded_queries(self) -> list[Chunk]:
        """This rank's valid rows, and the first padding row of each chunk in the place of the last valid position."""
        return self.queries + [(local, self.q_len - 1, 1) for local, _ in self.paddings]

    @property
    def paddings(self) -> list[tuple[int, int]]:
        """This rank's runs of padding rows: (local start, local end)."""
        ranges = self._query_ranges()
        ends = [local for local, _, _ in ranges[1:]] + [self.q.shape[2]]
        runs = [(local + valid, end) for (local, _, valid), end in zip(ranges, ends, strict=True)]
        return [(start, end) for start, end in runs if start < end]

    def keys_of(self, rank: int) -> list[Chunk]:
        """The valid keys that `rank` holds."""
        ranges = chunk_ranges(rank, self.group.size, self.k.shape[2], self.k_len, self.layout)
        return [chunk for chunk in ranges if chunk[2] > 0]

    def _query_ranges(self) -> list[Chunk]:
        return chunk_ranges(self.group.rank, self.group.size, self.q.shape[2], self.q_len, self.layout)


Forward = Callable[[Call], tuple[Tensor, Tensor]]
"""out [B,H,s,Dv] and lse [B,H,s] over all keys, in the accumulating dtype, for `call.padded_queries`."""

Backward = Callable[[Call, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""dq, dk, dv in the accumulating dtype from (call, grad_out, out, lse), for `call.queries`."""


def attention_op(name: str, forward: Forward, backward: Backward) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register `autoseq::<name>` and `autoseq::<name>_backward`. Returns the op: (out in q's dtype, lse)."""

    def run(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        call = _call(q, k, v, *settings)
        out, lse = forward(call)
        for start, end in call.paddings:
            out[:, :, start:end] = out[:, :, start : start + 1]
        return out.to(q.dtype), lse

    def run_backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *settings: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = backward(_call(q, k, v, *settings), grad_out.detach(), out.detach(), lse.detach())
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    op = torch.library.custom_op(f"autoseq::{name}", run, mutates_args=(), schema=_FORWARD)
    backward_op = torch.library.custom_op(f"autoseq::{name}_backward", run_backward, mutates_args=(), schema=_BACKWARD)
    op.register_fake(_fake)
    backward_op.register_fake(_fake_backward)

    def differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, *captures = ctx.saved_tensors
        grads = backward_op(grad_out, q, k, v, out, lse, captures, ctx.sinks, ctx.seed, *ctx.settings)
        return *grads, [None] * len(captures), *[None] * (2 + len(ctx.settings))

    op.register_autograd(differentiate, setup_context=_save)
    return op


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, captures, sinks, seed, *settings = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, *captures)
    ctx.sinks, ctx.seed, ctx.settings = sinks, seed, settings


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: list[Tensor],
    sinks: Tensor | None,
    seed: Tensor | None,
    scale: float,
    score: str,
    predicate: str,
    max_ahead: int | None,
    max_behind: int | None,
    empty_rows: str,
    dropout_p: float,
    q_len: int,
    k_len: int,
    first_head: int,
    heads_per_kv: int,
    layout: Layout,
    group: str,
) -> Call:
    mask = Mask(max_ahead=max_ahead, max_behind=max_behind, predicate=predicate)
    problem = Problem(mask, list(captures), scale, score, first_head, heads_per_kv)
    return Call(q.detach(), k.detach(), v.detach(), problem, q_len, k_len, layout, group_of(group))


def _fake(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
