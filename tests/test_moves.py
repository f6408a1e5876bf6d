"""Rows that change their place: every arrangement equals the one made of whole tensors, bit for bit, and so do its gradients."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx

from autoseq.passes.rules.moves import moves_of
from autoseq.runtime.collectives import all_gather, own_rows, sharded_rows, take_shard
from autoseq.runtime.layout import local_length
from autoseq.runtime.moves import arrange_rows
from ranks import run_ranks

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Case:
    """Parts as (length, length of their space or None if whole), the pieces of the result, its length and its space's."""

    parts: list[tuple[int, int | None]]
    pieces: list[tuple[int, int, int, int]]
    length: int
    base: int
    layout: str


def drawn(seed: int) -> Case:
    """A concatenation, a slice, a shift with a gap, or a rotation; parts sharded or whole, spaces longer than what they hold."""
    r = random.Random(seed)
    parts = [(n := r.randint(1, 20), r.choice([None, n, n + r.randint(0, 5)])) for _ in range(r.randint(2, 3))]
    parts[0] = (parts[0][0], parts[0][1] or parts[0][0])
    n = parts[0][0]
    first = r.randint(0, n - 1)
    count = r.randint(1, n - first)
    ends = [sum(size for size, _ in parts[:i]) for i in range(len(parts) + 1)]
    length, pieces = r.choice([
        (ends[-1], [(i, 0, ends[i], size) for i, (size, _) in enumerate(parts)]),
        (count, [(0, first, 0, count)]),
        (count + 3, [(0, first, 2, count)]),
        (n, [(0, first, 0, n - first), (0, 0, n - first, first)]),
    ])  # fmt: skip
    return Case(parts, pieces, length, length + r.choice([0, 0, 4]), r.choice(["contiguous", "zigzag"]))


def whole_arrangement(parts: list[Tensor], case: Case, fill: float) -> Tensor:
    made = torch.full((2, case.length, 3), fill, dtype=parts[0].dtype)
    for number, start, at, count in case.pieces:
        made[:, at : at + count] = parts[number][:, start : start + count]
    return made


def compare(rank: int, world_size: int, seeds: list[int]) -> list[str]:
    """What differs, in words."""
    group = dist.group.WORLD.group_name
    wrong = []
    for seed in seeds:
        case = drawn(seed)
        torch.manual_seed(seed)
        wholes = [torch.randn(2, n, 3, dtype=torch.float64).requires_grad_() for n, _ in case.parts]
        expected = whole_arrangement(wholes, case, 0.5)
        shards = [None if base is None else (n, local_length(base, world_size, case.layout)) for n, base in case.parts]
        around: dict[str, Any] = {"dim": 1, "outer": 1, "layout": case.layout, "group": group}
        mine = [
            (w.detach() if shard is None else take_shard(w.detach(), length=shard[0], local=shard[1], **around)).clone().requires_grad_()
            for w, shard in zip(wholes, shards, strict=True)
        ]
        local = local_length(case.base, world_size, case.layout)
        moved = arrange_rows(mine, pieces=case.pieces, shards=shards, fill=0.5, length=case.length, local=local, **around)
        gathered = all_gather(moved.detach(), length=case.length, local=local, **around)
        if not torch.equal(gathered, expected) or not moved.isfinite().all():
            wrong.append(f"{seed}: {case}: values")
        weights = torch.randn_like(expected)
        expected.backward(weights)
        moved.backward(own_rows(weights, sharded_rows(weights, 1, 1, case.length, local, case.layout, group)))
        for i, (w, x, shard) in enumerate(zip(wholes, mine, shards, strict=True)):
            grad = torch.zeros_like(x) if x.grad is None else x.grad
            if shard is None:
                dist.all_reduce(grad)
            else:
                grad = all_gather(grad, length=shard[0], local=shard[1], **around)
            if not torch.equal(grad, torch.zeros_like(w) if w.grad is None else w.grad):
                wrong.append(f"{seed}: {case}: gradient of part {i}")
    return wrong


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_any_arrangement_is_that_of_the_whole_tensors(world_size: int) -> None:
    assert run_ranks(compare, world_size, list(range(60))) == [[]] * world_size


def move_other_dtypes(rank: int, world_size: int) -> bool:
    """Booleans, integers and halves arrive as they are."""
    group = dist.group.WORLD.group_name
    same = True
    for dtype in (torch.bool, torch.int64, torch.int16, torch.bfloat16):
        whole = torch.arange(9).reshape(1, 9).remainder(2 if dtype == torch.bool else 9).to(dtype)
        around: dict[str, Any] = {"dim": 1, "outer": 1, "layout": "contiguous", "group": group}
        x = take_shard(whole, length=9, local=local_length(9, world_size, "contiguous"), **around)
        local = local_length(7, world_size, "contiguous")
        moved = arrange_rows([x], pieces=[(0, 2, 0, 7)], shards=[(9, x.shape[1])], fill=0, length=7, local=local, **around)
        same &= torch.equal(all_gather(moved, length=7, local=local, **around), whole[:, 2:])
    return same


def test_rows_of_any_dtype_move() -> None:
    assert all(run_ranks(move_other_dtypes, 2))


# What is a move -------------------------------------------------------------------------------------------------------

X, Y = torch.zeros(2, 9, 4), torch.zeros(2, 5, 4)
MOVES = [
    pytest.param(aten.cat.default, ([X, Y], 1), [(1, 14, ((0, 0, 0, 9), (1, 0, 9, 5)))], id="two laid end to end"),
    pytest.param(aten.slice.Tensor, (X, 1, 2), [(1, 7, ((0, 2, 0, 7),))], id="the start cut off"),
    pytest.param(aten.slice.Tensor, (X, 1, -3, -1), [(1, 2, ((0, 6, 0, 2),))], id="counted from behind"),
    pytest.param(aten.slice.Tensor, (X, 1, 0, 9, 2), None, id="a step is none"),
    pytest.param(aten.split_with_sizes.default, (X, [4, 5], 1), [(1, 4, ((0, 0, 0, 4),)), (1, 5, ((0, 4, 0, 5),))], id="cut in two"),
    pytest.param(aten.split.Tensor, (X, 5, 1), [(1, 5, ((0, 0, 0, 5),)), (1, 4, ((0, 5, 0, 4),))], id="cut in parts of five"),
    pytest.param(aten.slice_scatter.default, (X, Y, 1, 2, 7), [(1, 9, ((0, 0, 0, 2), (1, 0, 2, 5), (0, 7, 7, 2)))], id="a part written"),
    pytest.param(aten.constant_pad_nd.default, (X, [0, 0, 1, -1], 7), [(1, 9, ((0, 0, 1, 8),))], id="shifted by a row"),
    pytest.param(aten.constant_pad_nd.default, (X, [0, 0, -2, 1]), [(1, 8, ((0, 2, 0, 7),))], id="shifted the other way"),
    pytest.param(aten.pad.default, (X, [0, 0, 1, 0]), [(1, 10, ((0, 0, 1, 9),))], id="a row in front"),
    pytest.param(aten.pad.default, (X, [1, 1], "circular"), None, id="another mode is none"),
    pytest.param(aten.pad.default, (X, [1, 0, 1, 0]), None, id="two dims are none"),
    pytest.param(aten.neg.default, (X,), None, id="another operator is none"),
]


@pytest.mark.parametrize(("op", "args", "expected"), MOVES)
def test_what_a_result_is_made_of(op: Any, args: tuple[Any, ...], expected: list[tuple[Any, ...]] | None) -> None:
    graph = fx.Graph()

    def entered(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        node = graph.placeholder("x")
        node.meta["val"] = x
        return node

    node = graph.call_function(op, fx.node.map_aggregate(args, entered))
    node.meta["val"] = op(*args)
    moves = moves_of(node)
    assert (None if moves is None else [(m.dim, m.length, m.pieces) for m in moves]) == expected
