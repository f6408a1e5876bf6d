"""Runs a local graph for all ranks at once, in one process: every value is a list with one entry a rank.

The oracle for sharding rules. The collectives are written here a second time, from the table in DESIGN.md and with its
gradients, and padding is hostile: finite, but of another value on every rank, so whatever counts it gives a wrong number.
"""

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.autograd import Function

from autoseq.runtime import collectives, moves, rows
from autoseq.runtime.groups import SequenceGroup
from autoseq.runtime.layout import rank_positions

GROUP = "lockstep"

Values = list[Any]


def run_lockstep(gm: fx.GraphModule, inputs: Sequence[Any], P: int) -> list[Values]:
    """The outputs of the local graph `gm` on P ranks that are all given `inputs` (their own copy each): one list per output."""
    env: dict[fx.Node, Values] = {}
    given = iter(inputs)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = next(given)
            env[node] = value if isinstance(value, list) else [value] * P
        elif node.op == "output":
            return [env[result] for result in node.args[0]]
        else:
            local = [fx.map_arg((node.args, node.kwargs), lambda n, rank=rank: env[n][rank]) for rank in range(P)]
            env[node] = _call(node.target, local, P)
    raise AssertionError("a graph without output")


def _call(target: Callable[..., Any], local: list[Any], P: int) -> Values:
    if target in _COLLECTIVES:
        keywords = {key: value for key, value in local[0][1].items() if key != "group"}
        return list(_COLLECTIVES[target]([args[0] for args, _ in local], P, **keywords))
    if target in (rows.zero_padding, rows.cross_entropy, rows.nll_loss):
        return _on_each_rank(target, local, P)
    return [target(*args, **kwargs) for args, kwargs in local]


def _on_each_rank(target: Callable[..., Any], local: list[Any], P: int) -> Values:
    """A function of runtime.rows: once to hear what each rank adds to a sum, once to give each rank the sum."""
    spoken: list[Tensor] = []

    def listen(x: Tensor, *, group: str) -> Tensor:
        spoken.append(x.detach())
        return x

    def answer(x: Tensor, *, group: str) -> Tensor:
        return x + (sum(spoken) - x.detach())

    results: Values = []
    for reduce in (listen, answer):
        results = []
        for rank, (args, kwargs) in enumerate(local):
            member = SequenceGroup(GROUP, P, rank)
            with mock.patch.object(rows, "group_of", lambda _, member=member: member), mock.patch.object(rows, "all_reduce", reduce):
                results.append(target(*args, **kwargs))
    return results


class _Collective(Function):
    """All ranks' values to all ranks' values, with the gradient of the table."""

    @staticmethod
    def forward(ctx: Any, forward: Callable[..., Any], backward: Callable[..., Any], *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.transposed = backward
        return tuple(forward(list(xs)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.transposed(list(grads))


def _cut(xs: Values, P: int, padding: float | None = None, **sharding: Any) -> Values:
    """Each rank's rows of its own copy; rows past the end are zero, or hostile."""
    return [_rows_of(x, rank, P, rank + 2 if padding is None else 0, **sharding) for rank, x in enumerate(xs)]


def _rows_of(x: Tensor, rank: int, P: int, times: int, *, dim: int, outer: int, length: int, local: int, layout: Any) -> Tensor:
    positions = rank_positions(rank, P, local, layout, x.device)
    opened = x.unflatten(dim, (outer, length, -1))
    taken = opened.index_select(dim + 1, positions.clamp(max=length - 1)).clone()
    past = (positions >= length)[:, None].expand(-1, taken.shape[dim + 2])
    past = past.reshape(*past.shape, *[1] * (x.dim() - 1 - dim))
    hostile = taken * times + times if x.is_floating_point() and times else torch.zeros_like(taken) if not times else taken
    return torch.where(past, hostile, taken).flatten(dim, dim + 2)


def _joined(xs: Values, P: int, *, dim: int, outer: int, length: int, local: int, layout: Any) -> Values:
    """The valid rows of all ranks in global order, a copy for each rank."""
    opened = torch.cat([x.unflatten(dim, (outer, local, -1)) for x in xs], dim + 1)
    order = torch.cat([rank_positions(rank, P, local, layout, "cpu") for rank in range(P)]).argsort()
    whole = opened.index_select(dim + 1, order[:length]).flatten(dim, dim + 2)
    return [whole.clone() for _ in xs]


def _summed(xs: Values) -> Values:
    return [torch.stack(xs).sum(0) for _ in xs]


def _take_shard(xs: Values, P: int, **sharding: Any) -> Any:
    return _Collective.apply(lambda v: _cut(v, P, **sharding), lambda g: _joined(g, P, **sharding), *xs)


def _all_gather(xs: Values, P: int, **sharding: Any) -> Any:
    return _Collective.apply(lambda v: _joined(v, P, **sharding), lambda g: _cut(g, P, 0, **sharding), *xs)


def _all_gather_varying(xs: Values, P: int, **sharding: Any) -> Any:
    return _Collective.apply(lambda v: _joined(v, P, **sharding), lambda g: _cut(_summed(g), P, 0, **sharding), *xs)


def _vary(xs: Values, P: int) -> Any:
    return _Collective.apply(lambda v: [x.clone() for x in v], _summed, *xs)


def _all_reduce(xs: Values, P: int) -> Any:
    return _Collective.apply(_summed, lambda g: g, *xs)


def _drop_last_rows(xs: Values, P: int, *, dim: int, outer: int, length: int, local: int, layout: Any) -> Values:
    """What is behind the new end is a copy of the last row that stays, and passes no gradient on."""
    whole = _joined([x.detach() for x in xs], P, dim=dim, outer=outer, length=length, local=local, layout=layout)[0]
    last = whole.unflatten(dim, (outer, length, -1)).narrow(dim + 1, length - 1, 1)
    dropped = []
    for rank, x in enumerate(xs):
        opened = x.unflatten(dim, (outer, local, -1))
        kept = rank_positions(rank, P, local, layout, "cpu") < length
        kept = kept.reshape(-1, *[1] * (opened.ndim - dim - 2))
        dropped.append(torch.where(kept, opened, last).flatten(dim, dim + 2))
    return dropped


def _few_rows(xs: Values, P: int, *, start: int, count: int, dim: int, outer: int, length: int, **sharding: Any) -> Values:
    wholes = _all_gather(xs, P, dim=dim, outer=outer, length=length, **sharding)
    return [x.unflatten(dim, (outer, length, -1)).narrow(dim + 1, start, count).flatten(dim, dim + 2) for x in wholes]


def _arranged(parts: list[Values], P: int, *, pieces: Any, shards: Any, fill: float, dim: int, length: int, **sharding: Any) -> Values:
    """Every part made whole, laid out and cut: what `arrange_rows` must come to, whichever way its rows go."""
    copies = [list(column) for column in zip(*parts, strict=True)]
    wholes = [
        xs if shard is None else _all_gather_varying(xs, P, **{**sharding, "dim": dim, "length": shard[0], "local": shard[1]})
        for xs, shard in zip(copies, shards, strict=True)
    ]
    shape = list(wholes[0][0].shape)
    shape[dim] = length
    results = [torch.full(shape, fill, dtype=x.dtype) for x in wholes[0]]
    for number, start, at, count in pieces:
        results = [r.slice_scatter(x.narrow(dim, start, count), dim, at, at + count) for r, x in zip(results, wholes[number], strict=True)]
    return _own(results, P, dim=dim, length=length, **sharding)


def _own(xs: Values, P: int, **sharding: Any) -> Any:
    """Each rank's rows of a value that stands for all ranks' alike: the gradient goes back to the rank's own copy alone."""
    return _Collective.apply(lambda v: _cut(v, P, **sharding), lambda g: [_spread(x, rank, P, **sharding) for rank, x in enumerate(g)], *xs)


def _spread(grad: Tensor, rank: int, P: int, **sharding: Any) -> Tensor:
    return _joined([grad if other == rank else torch.zeros_like(grad) for other in range(P)], P, **sharding)[0]


_COLLECTIVES: dict[Any, Callable[..., Any]] = {
    collectives.take_shard: _take_shard, collectives.all_gather: _all_gather, collectives.all_gather_varying: _all_gather_varying,
    collectives.vary: _vary, collectives.all_reduce: _all_reduce, rows.drop_last_rows: _drop_last_rows,
    rows.few_rows: _few_rows, moves.arrange_rows: _arranged,
}  # fmt: skip
