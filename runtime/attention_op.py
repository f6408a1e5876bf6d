"""Turns a strategy's forward and backward into a custom op that AOTAutograd and Inductor carry as one node.

Point-to-point messages and data-dependent tiles do not trace, so that work lives inside `torch.library` ops. Those made here
have one schema, and with it one fake and one autograd formula; these and those of `gathered` have one treatment of padding:

- query rows past q_len are finite: the first of a chunk attends as row q_len-1 would, the others copy it, with 0 in place of NaN;
- their incoming gradient counts as zero, and keys past k_len are never looked at.

Besides out and lse an op may keep what it has received for its backward, so that it is not sent again (`Kept`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from autoseq.runtime.blocks import Chunk
from autoseq.runtime.blockwise import Backward, Forward
from autoseq.runtime.groups import SequenceGroup, group_of
from autoseq.runtime.holdings import Holdings
from autoseq.runtime.layout import Layout
from autoseq.runtime.mask import Mask
from autoseq.runtime.needs import Needs, Rows, Terms, needs_of
from autoseq.runtime.plain import accumulate_dtype
from autoseq.runtime.tiles import EmptyRows, Problem

SETTINGS = (
    "Tensor[] captures, Tensor? sinks, Tensor? seed, float scale, str score, str predicate, SymInt? max_ahead, SymInt? max_behind, "
    "str empty_rows, float dropout_p, SymInt q_len, SymInt k_len, SymInt first_head, SymInt heads_per_kv, str layout, int[] places, "
    "bool gathered, str[] groups"
)
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {SETTINGS}) -> (Tensor, Tensor, Tensor)"
# A custom op cannot leave a result out, so the gradients that not every call asks for come in a list: of the captures numbered in
# `learned`, then of the sinks.
_BACKWARD = (
    "(int[] learned, bool learns_sinks, Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor kept, "
    f"{SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor[])"
)


class Settings(NamedTuple):
    """What an op takes besides q, k and v, in the order of its schema.

    `groups` are the participants' groups, the outer one first (none: one participant), `places` the ranks whose shards each of
    them holds (empty: its own), and `gathered` says that k and v hold the rows of all participants, one after the other.
    """

    captures: list[Tensor]
    sinks: Tensor | None
    seed: Tensor | None
    scale: float
    score: str
    predicate: str
    max_ahead: int | None
    max_behind: int | None
    empty_rows: EmptyRows
    dropout_p: float
    q_len: int
    k_len: int
    first_head: int
    heads_per_kv: int
    layout: Layout
    places: list[int]
    gathered: bool
    groups: list[str]

    def problem(self) -> Problem:
        captures = [capture.detach() for capture in self.captures]
        sinks = None if self.sinks is None else self.sinks.detach()
        return Problem(
            Mask(self.max_ahead, self.max_behind, self.predicate), captures, self.scale, self.score, sinks, self.seed, self.dropout_p,
            self.empty_rows, self.first_head, self.heads_per_kv,
        )  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of an attention op: local q [B,H,s,D], k [B,K,t,D], v [B,K,t,Dv], and what to compute with them."""

    q: Tensor
    k: Tensor
    v: Tensor
    problem: Problem
    rows: Rows
    groups: tuple[SequenceGroup, ...]
    gathered: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, settings: Settings) -> Call:
        groups = tuple(group_of(name) for name in settings.groups)
        participants = prod(group.size for group in groups)
        held = Holdings.of(participants, settings.layout, tuple(settings.places))
        t = k.shape[2] // participants if settings.gathered else k.shape[2]
        rows = Rows(held, held, q.shape[2], t, settings.q_len, settings.k_len)
        return cls(q.detach(), k.detach(), v.detach(), settings.problem(), rows, groups, settings.gathered)

    @property
    def group(self) -> SequenceGroup:
        """The only group of participants."""
        (group,) = self.groups
        return group

    @property
    def participants(self) -> int:
        return prod(group.size for group in self.groups)

    @cached_property
    def me(self) -> int:
        """This rank among the participants."""
        me = 0
        for group in self.groups:
            me = me * group.size + group.rank
        return me

    @cached_property
    def queries(self) -> list[Chunk]:
        """This rank's valid rows."""
        return self.rows.queries(self.me)

    @cached_property
    def paddings(self) -> list[tuple[int, int]]:
        """This rank's runs of padding rows: (local start, local end)."""
        spans = self.rows.q_holdings.spans(self.me, self.rows.s, self.rows.q_len)
        return [(local + valid, local + padded) for local, _, valid, padded in spans if valid < padded]

    @property
    def padded_queries(self) -> list[Chunk]:
        """This rank's valid rows, and the first padding row of each chunk in the place of the last valid position."""
        return self.queries + [(local, self.rows.q_len - 1, 1) for local, _ in self.paddings]

    def keys_of(self, participant: int) -> list[Chunk]:
        """The valid keys that a participant holds, as they lie in its rows; in gathered ones, as they lie there."""
        first = participant * self.rows.t if self.gathered else 0
        return [(first + local, start, rows) for local, start, rows in self.rows.keys(participant)]

    @cached_property
    def all_keys(self) -> list[Chunk]:
        """The valid keys of every participant."""
        return [chunk for participant in range(self.participants) for chunk in self.keys_of(participant)]

    @cached_property
    def terms(self) -> Terms:
        """What decides who needs what."""
        problem = self.problem
        heads = range(problem.first_head, problem.first_head + self.q.shape[1])
        fills = problem.empty_rows != "zero" and problem.sinks is None
        return Terms(problem.mask, problem.captures, self.q.shape[0], heads, fills, problem.score)

    @cached_property
    def needs(self) -> Needs:
        """Which keys each participant needs of each other."""
        return needs_of(self.terms, self.rows, self.participants)


ForwardKeys = Callable[[Call, Forward], Tensor | None]
"""Brings the keys and values of all ranks to `Forward.add`. Returns what the backward is to be given, flat, if anything."""

BackwardKeys = Callable[[Call, Backward, Tensor], tuple[Tensor, Tensor]]
"""Brings them to `Backward.add`, and the gradients home: dk, dv of this rank's keys, in the accumulating dtype."""

Kept = Callable[[Tensor, Tensor, Settings], int]
"""How many elements of k's dtype the forward keeps for the backward: the same at every call with these sizes."""


@dataclass(frozen=True, slots=True)
class AttentionOp:
    """Two registered ops. `forward` is differentiable and returns (out in q's dtype, lse, kept); `backward` is its gradient."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]


def nothing(k: Tensor, v: Tensor, settings: Settings) -> int:
    """The op keeps nothing."""
    return 0


def as_many_as_own(k: Tensor, v: Tensor, settings: Settings) -> int:
    """The op keeps keys and values of others, or queries: no more than a participant has of keys and values itself."""
    return k.numel() + v.numel() if group_of(settings.groups[0]).size > 1 else 0


def attention_op(name: str, forward: ForwardKeys, backward: BackwardKeys, kept: Kept = nothing) -> AttentionOp:
    """Register `autoseq::<name>` and `autoseq::<name>_backward`."""

    def run(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
        settings = Settings(*flat)
        out, lse, left = attended(Call.of(q, k, v, settings), forward)
        return out, lse, _filled_up(left, k.new_empty(0), kept(k, v, settings))

    def run_backward(
        learned: list[int],
        learns_sinks: bool,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        left: Tensor,
        *flat: Any,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        settings = Settings(*flat)
        call = Call.of(q, k, v, settings)
        dq, (dk, dv), shares = differentiated(
            call, settings, learned, learns_sinks, (grad_out, out, lse), lambda call, work: backward(call, work, left.detach())
        )
        return dq, dk.to(k.dtype), dv.to(v.dtype), shares

    op = torch.library.custom_op(f"autoseq::{name}", run, mutates_args=(), schema=_FORWARD)
    backward_op = torch.library.custom_op(f"autoseq::{name}_backward", run_backward, mutates_args=(), schema=_BACKWARD)

    @op.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
        out = q.new_empty((*q.shape[:3], v.shape[3]))
        return out, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype)), k.new_empty(kept(k, v, Settings(*flat)))

    backward_op.register_fake(_fake_backward)

    def differentiate(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Any, ...]:
        wanted, learns_sinks = ctx.needs_input_grad[3:5]
        learned = [i for i, needed in enumerate(wanted) if needed]
        q, k, v, out, lse, left, *rest = ctx.saved_tensors
        captures, sinks, seed = rest[: len(wanted)], *_restored(rest[len(wanted) :], ctx.present)
        tensors = (grad_out, q, k, v, out, lse, left, captures, sinks, seed)
        dq, dk, dv, shares = backward_op(learned, learns_sinks, *tensors, *ctx.settings)
        by_capture = dict(zip(learned, shares, strict=False))
        dsinks = shares[-1] if learns_sinks else None
        # torch takes an empty list for one of tensors, and wants as many gradients.
        no_gradients = [[] if setting == [] else None for setting in ctx.settings]
        return dq, dk, dv, [by_capture.get(i) for i in range(len(wanted))], dsinks, None, *no_gradients

    op.register_autograd(differentiate, setup_context=_save)
    return AttentionOp(op, backward_op)


def attended(call: Call, forward: ForwardKeys) -> tuple[Tensor, Tensor, Tensor | None]:
    """out in q's dtype, lse, and what the forward leaves."""
    with _without_autocast(call.q):
        work = Forward(call.q, call.k.shape[1], call.v.shape[3], call.padded_queries, call.all_keys, call.problem)
        left = forward(call, work)
        out, lse = work.result()
    for start, end in call.paddings:
        # A rank of nothing but padding has asked for no keys, and what comes of none may be NaN.
        out[:, :, start:end] = out[:, :, start : start + 1].nan_to_num(0.0)
    return out.to(call.q.dtype), lse, left


T = TypeVar("T")


def differentiated(
    call: Call,
    settings: Settings,
    learned: list[int],
    learns_sinks: bool,
    rows: tuple[Tensor, Tensor, Tensor],
    backward: Callable[[Call, Backward], T],
) -> tuple[Tensor, T, list[Tensor]]:
    """dq, what the backward returns, and the gradients of captures and sinks; `rows` are grad_out, out and lse."""
    grad_out, out, lse = (x.detach() for x in rows)
    with _without_autocast(call.q):
        work = Backward(grad_out, call.q, out, lse, call.k.shape[1], call.queries, call.all_keys, call.problem, learned)
        brought = backward(call, work)
    captures, sinks = settings.captures, settings.sinks
    shares = [grad.to(captures[i].dtype) for i, grad in zip(learned, work.learned(), strict=True)]
    if learns_sinks and sinks is not None:
        shares.append(work.dsinks().to(sinks.dtype))
    return work.dq.to(call.q.dtype), brought, shares


def _filled_up(left: Tensor | None, empty: Tensor, elements: int) -> Tensor:
    """What is kept, in a buffer of its own of the size that was announced."""
    if left is None:
        return empty.new_empty(elements)
    if left.numel() == elements:
        return left
    buffer = left.new_empty(elements)
    buffer[: left.numel()] = left
    return buffer


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast has had its say on q, k and v; inside, it would round the scores that are computed in float32."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _restored(present: list[Tensor], are_present: list[bool]) -> list[Tensor | None]:
    """Optional tensors from those that were there."""
    tensors = iter(present)
    return [next(tensors) if there else None for there in are_present]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, captures, sinks, seed, *settings = inputs
    ctx.save_for_backward(q, k, v, *output, *captures, *(x for x in (sinks, seed) if x is not None))
    ctx.present, ctx.settings = [sinks is not None, seed is not None], settings


def _fake_backward(
    learned: list[int],
    learns_sinks: bool,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    left: Tensor,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    captures, sinks = flat[:2]
    shared = [captures[i] for i in learned] + ([sinks] if learns_sinks else [])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), [x.new_empty(x.shape) for x in shared]
