"""Open flash-attn's registered operators: the attention that each computes, written with masks of positions.

    flash_attn::_flash_attn_forward(q, k, v, …, causal=True, window_size_left=128)[0]
        →  sdpa(q, k, v, attn_mask=(k <= q + (t - s)) & (k >= q + (t - s) - 128))               # q: [B, s, H, D], k: [B, t, K, D]
    flash_attn::_flash_attn_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, …)[0]
        →  sdpa of one batch, attn_mask=(document of q == document of k) & …                     # q: [total, H, D]

Part of `open_regions`, on Dynamo's graph. Operators are known by name, arguments by the names of their schema: versions differ in
the order. Legal because these are the operator's documented semantics: causal and window are aligned to the bottom right, a row
without a key gives 0. `torch.autograd.Function`s around an operator are opened too, since their backward is the attention's own.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from autoseq.passes.inline import example, inline, replace_items

_NAMESPACES = ("flash_attn", "flashattn", "flash_attn_3")
_NAMES = ("_flash_attn_forward", "_flash_attn_varlen_forward")
_READ = {
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right",
    "softcap", "alibi_slopes",
}  # fmt: skip
_WITHOUT_EFFECT = {  # on the values
    "max_seqlen_q", "max_seqlen_k", "return_softmax", "zero_tensors", "num_splits", "pack_gqa", "deterministic", "sm_margin",
    "rotary_interleaved",
}  # fmt: skip


def open_flash_attention(gm: fx.GraphModule) -> int:
    """Open every call of a flash-attn operator that can be, and the autograd functions around them; returns how many calls."""
    for node in list(gm.graph.nodes):
        if _wraps_flash_attention(gm, node):
            with gm.graph.inserting_before(node):
                _open_autograd_function(gm, node)
    calls = [node for node in gm.graph.nodes if _opens(node)]
    for node in calls:
        for user in [user for user in node.users if not user.users]:
            gm.graph.erase_node(user)  # read for the backward alone
        given = arguments(node)
        for name in ("window_size_left", "window_size_right"):
            given[name] = int(example(given[name]))  # a symbolic one is fixed, and guarded: which bounds there are depends on it
        if _origin(given.get("cu_seqlens_k")) is _origin(given.get("cu_seqlens_q")):
            given["cu_seqlens_k"] = given.get("cu_seqlens_q")
        node.target, node.args, node.kwargs = attend, (), {name: value for name, value in given.items() if name in _READ}
    return len(calls)


def _origin(lengths: Any) -> Any:
    """Behind the copies that a program makes because Dynamo does not let it give an autograd function one tensor twice."""
    while isinstance(lengths, fx.Node) and lengths.target in ("clone", "contiguous", torch.clone):
        lengths = lengths.args[0]
    return lengths


# Which calls ----------------------------------------------------------------------------------------------------------


def arguments(node: fx.Node) -> dict[str, Any]:
    """What a call gives for each argument of the operator's schema, by name."""
    schema = _schema(node.target)
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    return {**bound, **node.kwargs}


def _schema(target: Any) -> Any:
    return target.default._schema if isinstance(target, torch._ops.OpOverloadPacket) else target._schema


def _is_flash_attention(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return False
    # A packet of overloads has a name, but not always an overload called "default" (`torch.ops.aten.slice`).
    packet = node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target
    namespace, _, name = packet._qualified_op_name.partition("::")
    return namespace in _NAMESPACES and name in _NAMES


def _opens(node: fx.Node) -> bool:
    """Whether a call is one whose output and log-sum-exp alone are used, without arguments that are not read."""
    if not _is_flash_attention(node):
        return False
    given = arguments(node)
    unread = [value for name, value in given.items() if name not in _READ | _WITHOUT_EFFECT]
    items = _used_items(node)
    used = {0} if given.get("alibi_slopes") is not None else {0, 1}  # its log-sum-exp leaves out what is the same for a whole row
    return items <= used and all(value is None or value is False or value == 0 for value in unread)


def _used_items(node: fx.Node) -> set[int]:
    return {int(user.args[1]) for user in node.users if user.users}  # pyright: ignore[reportArgumentType]


def _wraps_flash_attention(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a custom autograd function is flash-attn's: its forward holds one call that opens, and saves the call's other results."""
    if not (isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() == "autograd_function_apply"):
        return False
    body = gm.get_submodule(str(node.args[0].target))  # type: ignore[union-attr]
    assert isinstance(body, fx.GraphModule)
    calls = [inner for inner in body.graph.nodes if _is_flash_attention(inner)]
    return len(calls) == 1 and _opens_once_inlined(node, body, calls[0])


def _opens_once_inlined(function: fx.Node, body: fx.GraphModule, call: fx.Node) -> bool:
    """As `_opens`, where what is only saved for the backward counts as not used."""
    output: Any = body.graph.output_node()
    results, saved = output.args[0]
    used = _used_items(function)
    output.args = ((tuple(x if i in used else None for i, x in enumerate(results)), ()),)
    try:
        return _opens(call)
    finally:
        output.args = ((results, saved),)


def _open_autograd_function(gm: fx.GraphModule, function: fx.Node) -> None:
    """The forward's body in place of the function: without its backward, its gradient mode and its detaches, which kept that apart."""
    body = gm.get_submodule(str(function.args[0].target))  # type: ignore[union-attr]
    assert isinstance(body, fx.GraphModule)
    before = set(gm.graph.nodes)
    results, _ = inline(gm, body, function.args[2:])
    replace_items(function, results)
    for node in [node for node in gm.graph.nodes if node not in before]:
        if node.target is torch._C._set_grad_enabled:
            gm.graph.erase_node(node)
        elif node.target == "detach":
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


# What they compute ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Positions:
    """Where queries and keys stand: a key meets a query of its own document, and `ahead` is how far it lies beyond the diagonal."""

    ahead: Tensor  # [s, t]
    same_document: Tensor | None  # [s, t]
    document: Tensor | None  # [s]


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: Any = None, causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, dropout_p: float = 0.0, softcap: Any = 0.0, alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp of q [B, s, H, D], k and v [B, t, K, D], or of [total, H, D] each where lengths are given."""
    packed = cu_seqlens_q is not None
    assert k.shape[:-1] == v.shape[:-1] and (packed or q.shape[0] == k.shape[0])  # as the operator checks; guarded at symbolic sizes
    query, key, value = ((x.unsqueeze(0) if packed else x).transpose(1, 2) for x in (q, k, v))
    where = _positions(query.shape[2], key.shape[2], q.device, cu_seqlens_q, cu_seqlens_k)
    mask = _mask(where, 0 if causal else window_size_right, window_size_left)
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = _scores(query, key, scale, softcap, alibi_slopes, where, mask)
    groups = _groups(query, key)
    if softcap or alibi_slopes is not None:
        weights = F.dropout(torch._safe_softmax(scores, -1), dropout_p).to(v.dtype)
        out = weights @ value.repeat_interleave(groups, 1)
    else:
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale, enable_gqa=groups > 1)
    lse = torch.logsumexp(scores, -1)
    lse = torch.where(lse == -math.inf, math.inf, lse).detach()  # the operator's backward knows no gradient of it
    out = out.transpose(1, 2)
    return (out.squeeze(0), lse.squeeze(0)) if packed else (out, lse)


def _groups(q: Tensor, k: Tensor) -> int:
    return int(q.shape[1]) // int(k.shape[1])


def _positions(s: Any, t: Any, device: torch.device, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> _Positions:
    i, j = torch.arange(s, device=device), torch.arange(t, device=device)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _Positions(j - (i[:, None] + (t - s)), None, None)
    document = torch.searchsorted(cu_seqlens_q.long(), i, right=True) - 1
    if cu_seqlens_k is cu_seqlens_q:
        return _Positions(j - i[:, None], document[:, None] == document, document)
    of_keys = torch.searchsorted(cu_seqlens_k.long(), j, right=True) - 1
    shift = F.pad(cu_seqlens_k - cu_seqlens_q, (0, 1))[document + 1]  # documents end together
    return _Positions(j - (i + shift)[:, None], document[:, None] == of_keys, document)


def _mask(where: _Positions, most_ahead: int, most_behind: int) -> Tensor | None:
    """The keys that count; a bound below 0 is none."""
    allowed = [] if where.same_document is None else [where.same_document]
    allowed += [where.ahead <= most_ahead] if most_ahead >= 0 else []
    allowed += [where.ahead >= -most_behind] if most_behind >= 0 else []
    mask = None
    for condition in allowed:
        mask = condition if mask is None else mask & condition
    return mask


def _scores(q: Tensor, k: Tensor, scale: Any, softcap: Any, slopes: Tensor | None, where: _Positions, mask: Tensor | None) -> Tensor:
    """The scores [B, H, s, t] that enter the softmax, in float32 at least."""
    k = k.repeat_interleave(_groups(q, k), 1)
    working = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(working) @ k.to(working).transpose(-2, -1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - _of_rows(slopes, where) * where.ahead.abs()
    return scores if mask is None else torch.where(mask, scores, -math.inf)


def _of_rows(slopes: Tensor, where: _Positions) -> Tensor:
    """One slope for each head (slopes: [H]) and batch or document ([B, H]), to stand before [s, t]."""
    if slopes.dim() == 1:
        return slopes[:, None, None]
    if where.document is None:
        return slopes[:, :, None, None]
    return F.pad(slopes, (0, 0, 0, 1))[where.document].transpose(0, 1).unsqueeze(-1)
