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
from typing import Any, TypeVar

import torch
from torch import Tensor

from autoseq.runtime.blockwise import Backward, Forward
from autoseq.runtime.groups import group_of
from autoseq.runtime.op_call import ASKED, SETTINGS, Asked, Call, Settings
from autoseq.runtime.plain import accumulate_dtype

_FORWARD = f"(Tensor q, Tensor k, Tensor v, {SETTINGS}) -> (Tensor, Tensor, Tensor)"
_BACKWARD = f"({ASKED}, {SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor[])"

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

    def run_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        asked, settings = Asked.of(args)
        call = Call.of(asked.q, asked.k, asked.v, settings)
        dq, (dk, dv), shares = differentiated(call, settings, asked, lambda call, work: backward(call, work, asked.kept.detach()))
        return dq, dk.to(call.k.dtype), dv.to(call.v.dtype), shares

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
        with torch.no_grad():  # second derivatives are `second_derivative`'s matter
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
    call: Call, settings: Settings, asked: Asked, backward: Callable[[Call, Backward], T]
) -> tuple[Tensor, T, list[Tensor]]:
    """dq, what the backward returns, and the gradients of captures and sinks."""
    grad_out, out, lse = (x.detach() for x in (asked.grad_out, asked.out, asked.lse))
    with _without_autocast(call.q):
        work = Backward(grad_out, call.q, out, lse, call.k.shape[1], call.queries, call.all_keys, call.problem, asked.learned)
        brought = backward(call, work)
    found = work.learned() + ([work.dsinks()] if asked.learns_sinks and settings.sinks is not None else [])
    return work.dq.to(call.q.dtype), brought, [grad.to(x.dtype) for grad, x in zip(found, asked.among(settings), strict=True)]


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


def _fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    asked, settings = Asked.of(args)
    dq, dk, dv = (x.new_empty(x.shape) for x in (asked.q, asked.k, asked.v))
    return dq, dk, dv, [x.new_empty(x.shape) for x in asked.among(settings)]
