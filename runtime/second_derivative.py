"""The second derivative of an attention that is run eagerly: when a backward is itself recorded, it is computed by plain operators.

A strategy's own backward cannot be differentiated again. `twice_differentiable` stands behind it: in an ordinary backward it hands the
gradient on. In one that is recorded (`create_graph=True`) the gradients of q, k, v, captures and sinks come from the attention written
out, with the scores of this rank's rows and all keys as one tensor, and every operator and collective of it has a derivative.

    out = strategy(q, k, v)      →      out = twice(strategy(q, k, v), q, k, v)

It keeps q, k and v, as most strategies do anyhow; those that exchange heads (Ulysses, the hybrids) keep them besides. A traced program has
none of it.
Sends in such a backward the keys and values of all ranks to each rank, and their gradients home, besides what the strategy sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from autoseq.runtime.collectives import all_gather_varying
from autoseq.runtime.errors import UnsupportedError
from autoseq.runtime.groups import group_of
from autoseq.runtime.hashing import dropout_weights
from autoseq.runtime.op_call import Call, Settings
from autoseq.runtime.plain import accumulate_dtype, plain_scores, softmax, weighted_values
from autoseq.runtime.score import Score
from autoseq.runtime.tiles import Problem, Tiling

if TYPE_CHECKING:
    from autoseq.runtime.attention_call import Terms


def twice_differentiable(out: Tensor, q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """`out`, the attention that `terms` describe, with a second derivative. While a program is traced it is `out` itself."""
    if type(q) not in (Tensor, torch.nn.Parameter) or not out.requires_grad:
        return out
    captures, sinks, seed = terms.tensors
    return _Twice.apply(out, replace(terms, tensors=([], None, None)), q, k, v, *captures, sinks, seed)


class _Twice(Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, terms: Terms, *tensors: Tensor | None) -> Tensor:
        ctx.terms = terms
        ctx.save_for_backward(*tensors)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return grad, None, *[None] * len(tensors)
        q, k, v, *captures, sinks, seed = tensors
        out = written_out(q, k, v, replace(ctx.terms, tensors=(captures, sinks, seed)))
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        found = torch.autograd.grad(out, [tensors[i] for i in wanted], grad, create_graph=True, allow_unused=True)
        grads = dict(zip(wanted, found, strict=True))
        return None, None, *[grads.get(i) for i in range(len(tensors))]


def written_out(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> Tensor:
    """The attention of this rank's rows by plain operators; padding rows are 0. Raises UnsupportedError for rows that see no key."""
    settings = Settings(*terms.flat([terms.group]))
    call = Call.of(q, k, v, settings)
    problem = replace(settings.problem(), captures=settings.captures, sinks=settings.sinks)
    t = call.rows.t
    chunks = [(i * t + local, start, rows) for i in range(call.participants) for local, start, rows in call.keys_of(i)]
    keys, values = (_of_all_ranks(x, terms.group) for x in (k, v))
    scores, dropped = _scores(q, keys, Tiling(q, k.shape[1], call.queries, chunks, problem), chunks, problem)
    weights = _weights(scores, problem)
    if problem.fills_empty_rows:
        _check_rows(scores, call)
    return weighted_values(weights if dropped is None else weights * dropped, values).to(q.dtype)


def _of_all_ranks(x: Tensor, group: str) -> Tensor:
    """The shards of all ranks, one behind the other along dim 2."""
    t = x.shape[2]
    return all_gather_varying(x, dim=2, outer=1, length=t * group_of(group).size, local=t, layout="contiguous", group=group)


def _scores(q: Tensor, k: Tensor, tiling: Tiling, chunks: Sequence[Any], problem: Problem) -> tuple[Tensor, Tensor | None]:
    """The scores of all rows and keys, -inf where masked, and what dropout multiplies the weights with."""
    dtype, shape = accumulate_dtype(q.dtype), (*q.shape[:3], k.shape[2])
    scores = q.new_full(shape, -torch.inf, dtype=dtype)
    dropped = q.new_ones(shape, dtype=dtype) if problem.dropout_p > 0 else None
    for tile in tiling.tiles(chunks, plain=True):
        at = (*tile.rows, tile.keys[2])
        score = Score(problem.score, problem.captures)(plain_scores(q[tile.rows], k[tile.keys], problem.scale), tile.points)
        scores[at] = score if tile.allowed is None else torch.where(tile.allowed, score, -torch.inf)
        if dropped is not None:
            dropped[at] = dropout_weights(problem.seed, tile.points, problem.dropout_p, dtype)
    return scores, dropped


def _weights(scores: Tensor, problem: Problem) -> Tensor:
    if problem.sinks is None:
        return softmax(scores)[0]
    sinks = problem.sinks[problem.first_head : problem.first_head + scores.shape[1]].to(scores.dtype)
    column = sinks[:, None, None].expand(scores.shape[0], -1, scores.shape[2], 1)
    return softmax(torch.cat([scores, column], -1))[0][..., :-1]


def _check_rows(scores: Tensor, call: Call) -> None:
    for local, _, rows in call.queries:
        if bool((scores[:, :, local : local + rows] == -torch.inf).all(-1).any()):
            raise UnsupportedError(
                "An attention has rows that see no key, and its second derivative was asked for (create_graph=True), which is not kept "
                "exact there. Let every row see a key, such as its own."
            )
