"""Mixtures of experts: a sort of the slots by expert is found where nobody sees the order, and runs on each rank's own slots."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoseq.inspection import inspect_model
from autoseq.passes.dispatch import find_dispatches
from graphs import trace
from ranks import run_ranks

TOLERANCE = 1e-5  # relative L2; float32 sums in another order
EXPERTS, SLOTS = 4, 2
Dispatched = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Tokens [T, C], experts' ids and weights [T, k], matrices [E, C, C] to the experts' weighted sum for each token."""


def by_sort(x: Tensor, ids: Tensor, weights: Tensor, matrices: Tensor) -> Tensor:
    ordered, perm = torch.sort(ids.reshape(-1))
    rows = torch.bmm(x[perm // SLOTS].unsqueeze(1), matrices[ordered]).squeeze(1) * weights.reshape(-1)[perm].unsqueeze(-1)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.shape[0])
    return rows[inverse].view(*ids.shape, -1).sum(1)


def by_argsort_and_index_add(x: Tensor, ids: Tensor, weights: Tensor, matrices: Tensor) -> Tensor:
    flat = ids.flatten()
    perm = torch.argsort(flat)
    token = perm.div(SLOTS, rounding_mode="floor")
    rows = torch.bmm(x[token].unsqueeze(1), matrices[flat[perm]]).squeeze(1)
    gate, up = (rows * weights.flatten()[perm].unsqueeze(-1)).chunk(2, -1)
    return torch.zeros_like(x).index_add(0, token, torch.cat([gate, up], -1))


def by_two_argsorts(x: Tensor, ids: Tensor, weights: Tensor, matrices: Tensor) -> Tensor:
    perm = torch.argsort(ids.flatten(), stable=True)
    picked = torch.index_select(x.repeat_interleave(SLOTS, 0), 0, perm)
    rows = torch.bmm(picked.reshape(-1, 1, x.shape[-1]), matrices[ids.flatten()[perm]]).flatten(1)
    return (rows[torch.argsort(perm)].unflatten(0, ids.shape) * weights.unsqueeze(-1)).sum(1)


def the_order_is_seen(x: Tensor, ids: Tensor, weights: Tensor, matrices: Tensor) -> Tensor:
    """As `by_sort`, but the first expert's first token is somebody else's business too."""
    first = torch.sort(ids.reshape(-1))[1][:1]
    return by_sort(x, ids, weights, matrices) + x[first // SLOTS]


def descending(x: Tensor, ids: Tensor, weights: Tensor, matrices: Tensor) -> Tensor:
    perm = torch.sort(ids.reshape(-1), descending=True)[1]
    return torch.zeros_like(x).index_add(0, perm // SLOTS, x[perm // SLOTS])


def another_number_of_slots(x: Tensor, ids: Tensor, weights: Tensor, matrices: Tensor) -> Tensor:
    """Rows of half the tokens, each of which has the slots of two: a rank does not have them beside its slots."""
    perm = torch.sort(ids.reshape(-1))[1]
    half = x[: x.shape[0] // 2]
    return torch.zeros_like(x).index_add(0, perm // SLOTS, half[perm // (2 * SLOTS)])


def mixed_with_unsorted_rows(x: Tensor, ids: Tensor, weights: Tensor, matrices: Tensor) -> Tensor:
    perm = torch.sort(ids.reshape(-1))[1]
    rows = x[perm // SLOTS] * weights.reshape(-1).unsqueeze(-1)  # the weights are in natural order
    return torch.zeros_like(x).index_add(0, perm // SLOTS, rows)


def summed_over_the_order(x: Tensor, ids: Tensor, weights: Tensor, matrices: Tensor) -> Tensor:
    perm = torch.sort(ids.reshape(-1))[1]
    rows = x[perm // SLOTS].cumsum(0)
    return torch.zeros_like(x).index_add(0, perm // SLOTS, rows)


LOCAL = [by_sort, by_argsort_and_index_add, by_two_argsorts]
WHOLE = [the_order_is_seen, descending, another_number_of_slots, mixed_with_unsorted_rows, summed_over_the_order]


@pytest.mark.parametrize(
    ("dispatched", "found"),
    [*((f, 1) for f in LOCAL), (the_order_is_seen, 1), (another_number_of_slots, 1),
     *((f, 0) for f in (descending, mixed_with_unsorted_rows, summed_over_the_order))],
)  # fmt: skip
def test_a_dispatch_is_found_where_nobody_sees_the_order(dispatched: Dispatched, found: int) -> None:
    x, ids, weights, matrices = torch.randn(6, 8), torch.randint(0, EXPERTS, (6, SLOTS)), torch.rand(6, SLOTS), torch.randn(EXPERTS, 8, 8)
    assert len(find_dispatches(trace(dispatched, x, ids, weights, matrices).normal)) == found


class Mixture(nn.Module):
    """One attention, and a mixture of experts on its tokens."""

    def __init__(self, dispatched: Dispatched) -> None:
        super().__init__()
        self.qkv, self.router, self.dispatched = nn.Linear(8, 24), nn.Linear(8, EXPERTS), dispatched
        self.matrices = nn.Parameter(torch.randn(EXPERTS, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        tokens = x.reshape(-1, 8)
        weights, ids = self.router(tokens).softmax(-1).topk(SLOTS, -1)
        return x + self.dispatched(tokens, ids, weights, self.matrices).view_as(x)


def make(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Mixture(globals()[name]), {"x": torch.randn(2, 11, 8)}


def train(rank: int, world_size: int, names: list[str]) -> dict[str, float]:
    worst = {}
    for name in names:
        torch._dynamo.reset()
        model, batch = make(name)
        oracle = copy.deepcopy(model)
        actual = torch.compile(model, backend="autoseq", options={"inner": "eager"})(**batch)
        expected = oracle(**batch)
        (actual.sin().sum()).backward()
        (expected.sin().sum()).backward()
        pairs: list[Any] = [(actual.detach() + 0, expected.detach())]
        pairs += [(p.grad, e.grad) for p, e in zip(model.parameters(), oracle.parameters(), strict=True) if e.grad is not None]
        worst[name] = max(((a - e).norm() / e.norm()).item() for a, e in pairs)
    return worst


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_mixture_has_one_devices_numbers_wherever_it_runs(world_size: int) -> None:
    for worst in run_ranks(train, world_size, [f.__name__ for f in (*LOCAL, *WHOLE)]):
        assert {name: error for name, error in worst.items() if error > TOLERANCE} == {}


@pytest.mark.parametrize("dispatched", LOCAL)
def test_a_local_dispatch_sends_nothing(dispatched: Dispatched) -> None:
    found = inspect_model(lambda: make(dispatched.__name__), seq_len=11, world_size=2)
    assert found.fallbacks == []
    (program,) = found.programs
    (sort,) = [n for n in program.gm.graph.nodes if getattr(n.target, "__name__", "").startswith(("sort", "argsort"))][:1]
    assert sort.args[0].meta["val"].shape == (2 * 6 * SLOTS,)  # 6 of 11 tokens, of two sequences


@pytest.mark.parametrize("dispatched", WHOLE)
def test_a_sort_whose_order_is_seen_runs_whole_and_says_so(dispatched: Dispatched) -> None:
    found = inspect_model(lambda: make(dispatched.__name__), seq_len=11, world_size=2)
    assert "aten.sort.default" in [fallback.op for fallback in found.fallbacks]
