"""Turns a strategy's forward and backward into a custom op that AOTAutograd and Inductor carry as one node.

Point-to-point messages and data-dependent tiles do not trace, so that work lives inside `torch.library` ops. All of them have
one schema, and with it one fake, one autograd formula and one treatment of padding:

- query rows past q_len are finite: the first of a chunk attends as row q_len-1 would, the others copy it;
- their incoming gradient counts as zero, and keys past k_len are never looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autoseq.runtime.blocks import Chunk
from autoseq.runtime.blockwise import Backward, Forward
from autoseq.runtime.groups import SequenceGroup, group_of
from autoseq.runtime.layout import Layout, chunk_ranges
from autoseq.runtime.mask import Mask
from autoseq.runtime.plain import accumulate_dtype
from autoseq.runtime.tiles import EmptyRows, Problem

_SETTINGS = (
    "Tensor[] captures, Tensor? sinks, Tensor? seed, float scale, str score, str predicate, SymInt? max_ahead, SymInt? max_behind, "
    "str empty_rows, float dropout_p, SymInt q_len, SymInt k_len, SymInt first_head, SymInt heads_per_kv, str layout, str group"
)
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)"
# A custom op cannot leave a result out, so the gradients that not every call asks for come in a list: of the captures numbered in
# `learned`, then of the sinks.
_BACKWARD = (
    "(int[] learned, bool learns_sinks, Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor[])"
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

    @property
    def all_keys(self) -> list[Chunk]:
        """The valid keys of every rank."""
        return [chunk for rank in range(self.group.size) for chunk in self.keys_of(rank)]

    def _query_ranges(self) -> list[Chunk]:
        return chunk_ranges(self.group.rank, self.group.size, self.q.shape[2], self.q_len, self.layout)


ForwardKeys = Callable[[Call, Forward], None]
"""Brings the keys and values of all ranks to `Forward.add`."""

BackwardKeys = Callable[[Call, Backward], tuple[Tensor, Tensor]]
"""Brings them to `Backward.add`, and the gradients home: dk, dv of this rank's keys, in the accumulating dtype."""


def attention_op(name: str, forward: ForwardKeys, backward: BackwardKeys) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register `autoseq::<name>` and `autoseq::<name>_backward`. Returns the op: (out in q's dtype, lse)."""

    def run(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        call = _call(q, k, v, *settings)
        with _without_autocast(q):
            work = Forward(call.q, k.shape[1], v.shape[3], call.padded_queries, call.all_keys, call.problem)
            forward(call, work)
            out, lse = work.result()
        for start, end in call.paddings:
            out[:, :, start:end] = out[:, :, start : start + 1]
        return out.to(q.dtype), lse

    def run_backward(
        learned: list[int], learns_sinks: bool, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *settings: Any
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        call = _call(q, k, v, *settings)
        rows = (call.q, out.detach(), lse.detach())
        with _without_autocast(q):
            work = Backward(grad_out.detach(), *rows, k.shape[1], call.queries, call.all_keys, call.problem, learned)
            dk, dv = backward(call, work)
        captures, sinks = settings[:2]
        shares = [grad.to(captures[i].dtype) for i, grad in zip(learned, work.learned(), strict=True)]
        if learns_sinks:
            shares.append(work.dsinks().to(sinks.dtype))
        return work.dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), shares

    op = torch.library.custom_op(f"autoseq::{name}", run, mutates_args=(), schema=_FORWARD)
    backward_op = torch.library.custom_op(f"autoseq::{name}_backward", run_backward, mutates_args=(), schema=_BACKWARD)
    op.register_fake(_fake)
    backward_op.register_fake(_fake_backward)

    def differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        _, _, _, wanted, learns_sinks, *_ = ctx.needs_input_grad
        learned = [i for i, needed in enumerate(wanted) if needed]
        q, k, v, out, lse, *rest = ctx.saved_tensors
        captures, sinks, seed = rest[: len(wanted)], *_restored(rest[len(wanted) :], ctx.present)
        tensors = (grad_out, q, k, v, out, lse, captures, sinks, seed)
        dq, dk, dv, shares = backward_op(learned, learns_sinks, *tensors, *ctx.settings)
        by_capture = dict(zip(learned, shares, strict=False))
        dsinks = shares[-1] if learns_sinks else None
        return dq, dk, dv, [by_capture.get(i) for i in range(len(wanted))], dsinks, None, *[None] * len(ctx.settings)

    op.register_autograd(differentiate, setup_context=_save)
    return op


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast has had its say on q, k and v; inside, it would round the scores that are computed in float32."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _restored(present: list[Tensor], are_present: list[bool]) -> list[Tensor | None]:
    """Optional tensors from those that were there."""
    tensors = iter(present)
    return [next(tensors) if there else None for there in are_present]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, captures, sinks, seed, *settings = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, *captures, *(x for x in (sinks, seed) if x is not None))
    ctx.present, ctx.settings = [sinks is not None, seed is not None], settings


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
    empty_rows: EmptyRows,
    dropout_p: float,
    q_len: int,
    k_len: int,
    first_head: int,
    heads_per_kv: int,
    layout: Layout,
    group: str,
) -> Call:
    captures, sinks = [capture.detach() for capture in captures], None if sinks is None else sinks.detach()
    problem = Problem(
        Mask(max_ahead, max_behind, predicate), captures, scale, score, sinks, seed, dropout_p, empty_rows, first_head, heads_per_kv
    )
    return Call(q.detach(), k.detach(), v.detach(), problem, q_len, k_len, layout, group_of(group))


def _fake(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


def _fake_backward(
    learned: list[int], learns_sinks: bool, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    captures, sinks = settings[:2]
    shared = [captures[i] for i in learned] + ([sinks] if learns_sinks else [])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), [x.new_empty(x.shape) for x in shared]
