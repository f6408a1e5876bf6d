"""The operators of `gather_kv`: attention to gathered keys, and the exchange of just those rows that somebody needs.

Gathered keys are one flat buffer: participant after participant, the rows of its keys that this one has, K and V packed. Without a
mask these are all rows, and functional collectives move them. With one, who needs what depends on the rank, and a compiler that saw
into that would make other graphs of it on every rank, order them differently, and have the ranks wait for each other's messages: so
`send_rows` and `send_gradients` are opaque, have buffers of one size on all ranks, and return what is still on its way, as functional
collectives do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autoseq.runtime.attention_op import attended, differentiated
from autoseq.runtime.blockwise import Backward, Forward
from autoseq.runtime.groups import group_of, process_group
from autoseq.runtime.mask import Mask
from autoseq.runtime.messages import Described
from autoseq.runtime.needs import Needs
from autoseq.runtime.op_call import ASKED, SETTINGS, Asked, Call, Settings
from autoseq.runtime.packed import Packed, elements
from autoseq.runtime.plain import accumulate_dtype
from autoseq.runtime.runs import Runs

# `after` is the gradient that the gather of a backward waits for. AOTAutograd would otherwise take it for the same as the forward's, or
# move it there, and keep the gathered keys until the backward.

# Keys and values of this participant, and the rows and heads of its queries.
_OWN = f"Tensor k, Tensor v, SymInt s, SymInt heads, {SETTINGS}"


def takes_all(mask: Mask) -> bool:
    """Whether everybody gets all rows, padding included: then nothing depends on the rank. The lengths may be symbolic."""
    return mask.max_ahead is None and mask.max_behind is None and not mask.predicate


def somebody_sends(needs: Needs) -> bool:
    """Whether any participant needs keys of another: all of them know."""
    return any(rows for asker, of_one in enumerate(needs) for holder, rows in enumerate(of_one) if asker != holder)


@torch.library.custom_op("autoseq::pack_rows", mutates_args=())
def pack_rows(after: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    """K and V in one flat buffer."""
    return torch.cat([k.reshape(-1), v.reshape(-1)])


@torch.library.custom_op("autoseq::send_rows", mutates_args=(), schema=f"(Tensor? after, {_OWN}) -> Tensor")
def send_rows(after: Tensor | None, k: Tensor, v: Tensor, s: int, heads: int, *flat: Any) -> Tensor:
    """Send the rows of k and v that others need. What comes of theirs is at the beginning of the result; wait before it is read."""
    call = _call(k, v, s, heads, flat)
    leaving, arriving = [of_one[call.me] for of_one in call.needs], call.needs[call.me]
    return _post("gather_kv's keys", call, leaving, arriving, k.dtype, lambda message: pack_keys(message, call, leaving))


@torch.library.custom_op("autoseq::send_gradients", mutates_args=(), schema=f"(Tensor grads, {_OWN}) -> Tensor")
def send_gradients(grads: Tensor, k: Tensor, v: Tensor, s: int, heads: int, *flat: Any) -> Tensor:
    """Send the gradients of gathered rows home. Those of this participant's rows are at the beginning of the result, by asker."""
    call = _call(k, v, s, heads, flat)
    leaving, arriving = call.needs[call.me], [of_one[call.me] for of_one in call.needs]
    return _post("gather_kv's gradients", call, leaving, arriving, grads.dtype, lambda message: pack_gradients(message, grads))


@torch.library.custom_op("autoseq::sum_gradients", mutates_args=(), schema=f"(Tensor came, {_OWN}) -> (Tensor, Tensor)")
def sum_gradients(came: Tensor, k: Tensor, v: Tensor, s: int, heads: int, *flat: Any) -> tuple[Tensor, Tensor]:
    """dk and dv from what `send_gradients` brought, added up in the order of the participants."""
    call = _call(k, v, s, heads, flat)
    total = Packed.empty((call.k, call.v), ((0, call.rows.t),), came.dtype, zero=True)
    for part in _split(call, came, [of_one[call.me] for of_one in call.needs]):
        total.add(part)
    dk, dv = total.tensors
    # An op's results must not share memory.
    return dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True)


@torch.library.custom_op(
    "autoseq::gathered_attention", mutates_args=(), schema=f"(Tensor keys, Tensor q, Tensor k, Tensor v, {SETTINGS}) -> (Tensor, Tensor)"
)
def gathered_attention(keys: Tensor, q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    """out and lse of attention to gathered keys; k and v are this participant's own."""

    def forward(call: Call, work: Forward) -> None:
        for participant, part in enumerate(_parts(call, keys.detach())):
            part_k, part_v = part.tensors
            work.add(part_k, part_v, part.chunks(call.keys_of(participant)))

    out, lse, _ = attended(Call.of(q, k, v, Settings(*flat)), forward)
    return out, lse


@torch.library.custom_op(
    "autoseq::gathered_attention_backward",
    mutates_args=(),
    schema=f"({ASKED}, {SETTINGS}) -> (Tensor, Tensor, Tensor[])",
)
def gathered_attention_backward(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """dq, the gradients of the gathered keys (`kept` of `Asked`), in the accumulating dtype, and those of captures and sinks."""
    asked, settings = Asked.of(args)
    keys = asked.kept

    def backward(call: Call, work: Backward) -> Tensor:
        grads = keys.new_empty(keys.shape, dtype=work.dq.dtype)
        pairs = list(zip(_parts(call, keys.detach()), _parts(call, grads), strict=True))
        grads[: sum(part.message().numel() for part, _ in pairs)].zero_()
        for participant, (part, grad) in enumerate(pairs):
            (part_k, part_v), (dk, dv) = part.tensors, grad.tensors
            work.add(part_k, part_v, part.chunks(call.keys_of(participant)), dk, dv)
        return grads

    return differentiated(Call.of(asked.q, asked.k, asked.v, settings), settings, asked, backward)


@pack_rows.register_fake
def _(after: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    return k.new_empty(k.numel() + v.numel())


@send_rows.register_fake
def _(after: Tensor | None, k: Tensor, v: Tensor, s: int, heads: int, *flat: Any) -> Tensor:
    return k.new_empty(_participants(Settings(*flat)) * (k.numel() + v.numel()))


@send_gradients.register_fake
def _(grads: Tensor, *_: Any) -> Tensor:
    return grads.new_empty(grads.shape)


@sum_gradients.register_fake
def _(came: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


@gathered_attention.register_fake
def _(keys: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


@gathered_attention_backward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    asked, settings = Asked.of(args)
    q, keys = asked.q, asked.kept
    grads = keys.new_empty(keys.shape, dtype=accumulate_dtype(keys.dtype))
    return q.new_empty(q.shape), grads, [x.new_empty(x.shape) for x in asked.among(settings)]


def _participants(settings: Settings) -> int:
    return prod(group_of(name).size for name in settings.groups)


def _call(k: Tensor, v: Tensor, s: int, heads: int, flat: Sequence[Any]) -> Call:
    """Where only the size of q matters."""
    return Call.of(k.new_empty((k.shape[0], heads, s, 0)), k, v, Settings(*flat))


def _parts(call: Call, gathered: Tensor) -> list[Packed]:
    """What of each participant's keys, or of their gradients, is in a gathered buffer."""
    everything = ((0, call.rows.t),)
    rows = [everything] * call.participants if takes_all(call.problem.mask) or call.participants == 1 else call.needs[call.me]
    return _split(call, gathered, rows)


def _split(call: Call, flat: Tensor, rows: Sequence[Runs]) -> list[Packed]:
    """Packed rows of keys and values that lie one after the other."""
    return Packed.split(flat, [((call.k, call.v), each) for each in rows])


def pack_keys(message: Tensor, call: Call, rows: Sequence[Runs]) -> Tensor:
    """Fill a message with rows of this participant's keys and values, for each asker in turn."""
    own = Packed.whole((call.k, call.v))
    for part in _split(call, message, rows):
        part.put(own)
    return message


def pack_gradients(message: Tensor, grads: Tensor) -> Tensor:
    """Fill a message with what has been found, which lies in its order. A compiler may give the place of `grads` away while it travels."""
    return message.copy_(grads[: message.numel()])


def _post(
    what: str, call: Call, leaving: Sequence[Runs], arriving: Sequence[Runs], dtype: torch.dtype, pack: Callable[[Tensor], Tensor]
) -> Tensor:
    """Room for all rows of all participants, as many as any of them may need. What comes from them in turn, of what each has packed into
    a message, fills its beginning, some time before it has been waited for.
    """
    room = call.k.new_empty(call.participants * (call.k.numel() + call.v.numel()), dtype=dtype)
    given, sizes = ([elements((call.k, call.v), rows) for rows in each] for each in (leaving, arriving))
    target = room[: sum(sizes)]
    if not somebody_sends(call.needs) or call.k.shape[1] == 0:
        pack(target)
        return room
    message = pack(room.new_empty(sum(given)))
    with Described(what, call.group):
        group = process_group(call.group.name)
        work = dist.all_to_all_single(target, message, sizes, given, group=group, async_op=True)
    # Where `wait_tensor` finds it, as it does the work of a functional collective.
    torch._C._distributed_c10d._register_work(room, work)  # pyright: ignore[reportAttributeAccessIssue] (missing in torch's stubs)
    return room
