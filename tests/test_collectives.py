"""Each collective moves the right rows, bit for bit, and its gradient is the transpose, on real gloo ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func
from torch import Tensor

from autoseq.runtime import collectives as c
from autoseq.runtime.counting import counters, reset_counters
from autoseq.runtime.groups import group_from_mesh
from autoseq.runtime.layout import Layout, local_length, rank_positions
from autoseq.runtime.traffic import SILENT, Traffic, all_gather_traffic, all_reduce_traffic, all_to_all_traffic, reduce_scatter_traffic
from ranks import run_ranks


@dataclass(frozen=True)
class Case:
    """P ranks share the rows of the middle dim (outer, n, inner) of a tensor."""

    P: int
    layout: Layout
    n: int
    outer: int = 1
    inner: int = 1

    @property
    def s(self) -> int:
        return local_length(self.n, self.P, self.layout)

    @property
    def sharding(self) -> dict[str, Any]:
        group = group_from_mesh(None).name
        return dict(dim=1, outer=self.outer, length=self.n, local=self.s, layout=self.layout, group=group)

    def full(self) -> Tensor:
        """The same whole numbers on every rank, so that sums are exact; none is zero."""
        size = 2 * self.outer * self.n * self.inner * 3
        return torch.arange(1.0, size + 1).reshape(2, self.outer * self.n * self.inner, 3)

    def rows_of(self, rank: int, x: Tensor, padding: str) -> Tensor:
        """What `rank` must hold of x: picked row by row, the slow and obvious way."""
        rows = x.reshape(2, self.outer, self.n, self.inner, 3)
        positions = rank_positions(rank, self.P, self.s, self.layout, "cpu").tolist()
        picked = [rows[:, :, min(p, self.n - 1)] * (padding == "edge" or p < self.n) for p in positions]
        shape = (2, self.outer * self.s * self.inner, 3)
        return torch.stack(picked, 2).reshape(shape) if picked else x.new_empty(shape)


CASES = [
    pytest.param(Case(1, "contiguous", 5), id="one rank"),
    pytest.param(Case(1, "zigzag", 5), id="one rank, zigzag, padded"),
    pytest.param(Case(2, "contiguous", 6), id="two ranks, no padding"),
    pytest.param(Case(2, "contiguous", 7, outer=3), id="two ranks, odd length, composite dim"),
    pytest.param(Case(2, "zigzag", 8, inner=2), id="two ranks, zigzag, no padding, rows of two"),
    pytest.param(Case(2, "zigzag", 7, outer=2, inner=2), id="two ranks, zigzag, odd length, composite dim"),
    pytest.param(Case(3, "contiguous", 4), id="three ranks, a rank with padding only"),
    pytest.param(Case(3, "zigzag", 11, outer=2), id="three ranks, zigzag, odd length"),
    pytest.param(Case(4, "contiguous", 9), id="four ranks, odd length"),
    pytest.param(Case(4, "zigzag", 13), id="four ranks, zigzag, odd length"),
    pytest.param(Case(4, "zigzag", 1), id="four ranks, one row in all"),
    pytest.param(Case(2, "zigzag", 0), id="no rows"),
    pytest.param(Case(2, "contiguous", 5, outer=0), id="nothing outside the rows"),
    pytest.param(Case(2, "contiguous", 5, inner=0), id="nothing inside the rows"),
]
each_case = pytest.mark.parametrize("case", CASES)


def gradient(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.autograd.grad((y * weight).sum(), x)[0]


def check_take_shard(rank: int, P: int, case: Case) -> None:
    x = case.full().requires_grad_()
    shard = c.take_shard(x, **case.sharding)
    assert torch.equal(shard, case.rows_of(rank, x, "edge"))
    # Each rank weighs its rows as one device weighs those rows; what it gives its padding must not count.
    weight = 7 * x.detach()
    local_weight = case.rows_of(rank, weight, "zero") + 1000 * (case.rows_of(rank, weight, "zero") == 0)
    assert torch.equal(gradient(shard, x, local_weight), weight)


def check_all_gather(rank: int, P: int, case: Case) -> None:
    x = case.full()
    shard = case.rows_of(rank, x, "edge").requires_grad_()
    full = c.all_gather(shard, **case.sharding)
    assert torch.equal(full, x)
    assert torch.equal(gradient(full, shard, 7 * x), case.rows_of(rank, 7 * x, "zero"))
    for gather in (c.all_gather, c.all_gather_varying):
        written = gather(shard * 1, **case.sharding).mul_(2)
        assert torch.equal(written, 2 * x)


def check_all_gather_varying(rank: int, P: int, case: Case) -> None:
    x = case.full()
    shard = case.rows_of(rank, x, "edge").requires_grad_()
    full = c.all_gather_varying(shard, **case.sharding)
    assert torch.equal(full, x)
    total = x * sum(10**r for r in range(P))
    assert torch.equal(gradient(full, shard, x * 10**rank), case.rows_of(rank, total, "zero"))


def check_reduce_scatter(rank: int, P: int, case: Case) -> None:
    x = case.full()
    partial = (x * 10**rank).requires_grad_()
    shard = c.reduce_scatter(partial, **case.sharding)
    total = x * sum(10**r for r in range(P))
    assert torch.equal(shard, case.rows_of(rank, total, "edge"))
    assert torch.equal(gradient(shard, partial, case.rows_of(rank, 7 * x, "edge")), 7 * x)


@each_case
def test_take_shard_keeps_this_ranks_rows(case: Case) -> None:
    run_ranks(check_take_shard, case.P, case)


@each_case
def test_all_gather_restores_the_global_order(case: Case) -> None:
    run_ranks(check_all_gather, case.P, case)


@each_case
def test_all_gather_varying_sums_the_ranks_gradients(case: Case) -> None:
    run_ranks(check_all_gather_varying, case.P, case)


@each_case
def test_reduce_scatter_sums_the_ranks_values(case: Case) -> None:
    run_ranks(check_reduce_scatter, case.P, case)


def check_vary(rank: int, P: int) -> None:
    group = group_from_mesh(None).name
    x = torch.arange(1.0, 5.0).requires_grad_()
    y = c.vary(x, group=group)
    assert torch.equal(y, x)
    assert torch.equal(gradient(y, x, torch.full((4,), 10.0**rank)), torch.full((4,), float(sum(10**r for r in range(P)))))


def check_vary_many(rank: int, P: int) -> None:
    group = group_from_mesh(None).name
    xs = [torch.ones(2, 3), torch.ones(4, dtype=torch.float64), torch.ones(5), torch.ones(2), torch.ones(3, dtype=torch.int64)]
    for x in xs[:3]:
        x.requires_grad_()
    a, b, unused, frozen, ints = c.vary_many(xs, group=group)
    assert all(torch.equal(y, x) for y, x in zip((a, b, unused, frozen, ints), xs, strict=True))
    reset_counters()
    loss = (a.t() * 10**rank).sum() + b.sum() * rank
    grads = torch.autograd.grad(loss, xs[:3], allow_unused=True)
    total = float(sum(10**r for r in range(P)))
    assert torch.equal(grads[0], torch.full((2, 3), total))
    assert torch.equal(grads[1], torch.full((4,), float(sum(range(P))), dtype=torch.float64))
    assert grads[2] is None
    assert not frozen.requires_grad
    assert not ints.requires_grad
    # One message per dtype: six and five float32 together, four float64.
    check_counted(all_reduce_traffic(11 * 4, P) + all_reduce_traffic(4 * 8, P))


def check_share_gradient(rank: int, P: int) -> None:
    group = group_from_mesh(None).name
    x = torch.arange(1.0, 5.0).requires_grad_()
    y = c.share_gradient(c.vary(x, group=group), group=group)
    assert torch.equal(y, x)
    # Shares of a gradient that every rank has add up to it; a third of it, three times, is rounded.
    torch.testing.assert_close(gradient(y, x, 3 * x.detach()), 3 * x.detach(), rtol=1e-6, atol=0)


def check_all_reduce(rank: int, P: int) -> None:
    x = torch.full((2, 3), 10.0**rank).t().requires_grad_()
    y = c.all_reduce(x, group=group_from_mesh(None).name)
    assert torch.equal(y, torch.full((3, 2), float(sum(10**r for r in range(P)))))
    assert torch.equal(gradient(y, x, torch.tensor([5.0, 7.0])), torch.tensor([5.0, 7.0]).expand(3, 2))


def check_all_to_all(rank: int, P: int) -> None:
    # Rank a sends a*b numbers to rank b: uneven, and nothing at all to and from rank 0.
    send, recv = [rank * b for b in range(P)], [a * rank for a in range(P)]
    x = torch.cat([torch.full((n,), 10.0 * rank + b) for b, n in enumerate(send)]).requires_grad_()
    y = c.all_to_all_single(x, send_sizes=send, recv_sizes=recv, group=group_from_mesh(None).name)
    assert torch.equal(y, torch.cat([torch.full((n,), 10.0 * a + rank) for a, n in enumerate(recv)]))
    # The gradient goes home: what x[i] became is weighed by its value plus 1 where it went.
    assert torch.equal(gradient(y, x, y.detach() + 1), x + 1)


@pytest.mark.parametrize("P", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check_vary, id="vary sums the ranks' gradients"),
        pytest.param(check_vary_many, id="vary_many: one message per dtype, no gradient for unused, nothing for frozen"),
        pytest.param(check_share_gradient, id="share_gradient: the ranks' shares add up to the gradient"),
        pytest.param(check_all_reduce, id="all_reduce sums; its gradient is the identity"),
        pytest.param(check_all_to_all, id="all_to_all_single: uneven and empty pieces, gradient goes home"),
    ],
)
def test_unsharded_values(check: Callable[[int, int], None], P: int) -> None:
    run_ranks(check, P, backend="autoseq_counted")


def check_dtype(rank: int, P: int, dtype: torch.dtype) -> None:
    case = Case(P, "zigzag", 5)
    x = torch.arange(30).reshape(2, 5, 3).to(dtype)
    full = c.all_gather(c.take_shard(x, **case.sharding), **case.sharding)
    assert full.dtype == dtype
    assert torch.equal(full.contiguous().view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn, torch.float16, torch.bfloat16,
        torch.float64, torch.complex64,
    ],
    ids=str,
)  # fmt: skip
def test_any_dtype_is_gathered_bit_for_bit(dtype: torch.dtype) -> None:
    run_ranks(check_dtype, 2, dtype)


def check_odd_gradients(rank: int, P: int, kind: str) -> None:
    case = Case(P, "zigzag", 7)
    # A copy used per rank collects P equal gradients, and there are two such copies in a row.
    for collective, times in ((c.all_gather, 1), (c.all_gather_varying, P * P)):
        shard = case.rows_of(rank, case.full(), "edge").requires_grad_()
        full = collective(c.take_shard(collective(shard, **case.sharding), **case.sharding), **case.sharding)
        weight = torch.ones_like(full) if kind == "expanded" else torch.arange(1.0, 1 + full.numel()).reshape(2, 3, 7).transpose(1, 2)
        loss = full.sum() if kind == "expanded" else (full.transpose(1, 2) * weight.transpose(1, 2)).sum()
        assert torch.equal(torch.autograd.grad(loss, shard)[0], case.rows_of(rank, times * weight, "zero"))


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_gradients_may_have_any_strides(kind: str) -> None:
    run_ranks(check_odd_gradients, 2, kind)


def check_second_derivative(rank: int, P: int) -> None:
    case = Case(P, "zigzag", 5)
    x = case.full().double().requires_grad_()

    def third_power(x: Tensor) -> Tensor:
        return c.all_gather(c.take_shard(x, **case.sharding) ** 3, **case.sharding).sum()

    (first,) = torch.autograd.grad(third_power(x), x, create_graph=True)
    assert torch.equal(first, 3 * x**2)
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], 6 * x)


def test_gradients_are_differentiable() -> None:
    run_ranks(check_second_derivative, 2)


def layer(case: Case, x: Tensor, w: Tensor, b: Tensor, *, kind: str) -> Tensor:
    """A small program over sharded rows; `whole` is the same program on one device."""
    n, s = x.shape[1] // case.outer, local_length(x.shape[1] // case.outer, case.P, case.layout)
    sharding = dict(case.sharding, length=n, local=s)
    w, b = c.vary_many([w, b], group=sharding["group"])
    h = (c.take_shard(x, **sharding) @ w + b).sin()
    if kind == "varying":
        return c.all_gather(c.reduce_scatter(c.all_gather_varying(h, **sharding) / case.P, **sharding), **sharding)
    if kind == "merged dims":
        return c.all_gather(h.flatten(0, 1), **dict(sharding, dim=0, outer=x.shape[0] * case.outer)).view(x.shape)
    return c.all_gather(h, **sharding)


def whole(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x @ w + b).sin()


def check_program(rank: int, P: int, case: Case, kind: str, trace: str) -> None:
    graphs: list[Any] = []

    def compiler(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    keep: Any = compiler

    def program(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return layer(case, x, w, b, kind=kind)

    # aot_function checks no guards: a trace that had fixed a length would give wrong results for the others.
    traced = program if trace == "eager" else aot_function(program, keep, keep, dynamic=trace == "dynamic")
    for n in (case.n,) if trace == "static" else (case.n, case.n + 1, case.n + 2, 3 * case.n):
        x, w = torch.randn(2, case.outer * n, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
        inputs = [each.requires_grad_() for each in (x, w, w[0].detach().clone())]
        weight = torch.randn_like(x)
        results = [(y := f(*inputs), *torch.autograd.grad((y * weight).sum(), inputs)) for f in (traced, whole)]
        for ours, oracle in zip(*results, strict=True):
            # float64 rounding of sums taken in another order.
            torch.testing.assert_close(ours, oracle, rtol=1e-12, atol=1e-12)
    assert trace == "eager" or len(graphs) == 2, "one forward and one backward graph"


@pytest.mark.parametrize("trace", ["eager", "static", "dynamic"])
@pytest.mark.parametrize("kind", ["plain", "varying", "merged dims"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(2, "contiguous", 6), id="two ranks"),
        pytest.param(Case(3, "zigzag", 8, outer=2), id="three ranks, zigzag, composite dim"),
    ],
)
def test_a_sharded_program_equals_one_device(case: Case, kind: str, trace: str) -> None:
    run_ranks(check_program, case.P, case, kind, trace)


def forward_and_backward(name: str, shard_bytes: int, P: int) -> tuple[Traffic, Traffic]:
    """What a rank sends, whose padded shard has so many bytes."""
    gather, scatter = all_gather_traffic(shard_bytes, P), reduce_scatter_traffic(P * shard_bytes, P)
    return {
        "take_shard": (SILENT, gather),
        "all_gather": (gather, SILENT),
        "all_gather_varying": (gather, scatter),
        "reduce_scatter": (scatter, gather),
    }[name]


def check_cost(rank: int, P: int, name: str) -> None:
    case = Case(P, "zigzag", 7, outer=2)
    shard_bytes = case.rows_of(rank, case.full(), "edge").nbytes
    takes_full = name in ("take_shard", "reduce_scatter")
    x = (case.full() if takes_full else case.rows_of(rank, case.full(), "edge")).requires_grad_()
    forward, backward = forward_and_backward(name, shard_bytes, P)
    reset_counters()
    y = getattr(c, name)(x, **case.sharding)
    check_counted(forward)
    reset_counters()
    y.sum().backward()
    check_counted(backward)


def check_counted(traffic: Traffic) -> None:
    counted = counters().values()
    assert (sum(m for m, _ in counted), sum(b for _, b in counted)) == (traffic.messages, traffic.bytes)


@pytest.mark.parametrize("P", [1, 2, 3])
@pytest.mark.parametrize("name", ["take_shard", "all_gather", "all_gather_varying", "reduce_scatter"])
def test_costs_are_what_is_sent(name: str, P: int) -> None:
    run_ranks(check_cost, P, name, backend="autoseq_counted")


def check_all_to_all_cost(rank: int, P: int) -> None:
    send, recv = [rank + b for b in range(P)], [a + rank for a in range(P)]
    x = torch.ones(sum(send), requires_grad=True)
    reset_counters()
    y = c.all_to_all_single(x, send_sizes=send, recv_sizes=recv, group=group_from_mesh(None).name)
    check_counted(all_to_all_traffic([4 * n for n in send], rank))
    reset_counters()
    y.sum().backward()
    check_counted(all_to_all_traffic([4 * n for n in recv], rank))
    reset_counters()
    total = c.all_reduce(torch.ones(6), group=group_from_mesh(None).name)
    check_counted(all_reduce_traffic(total.nbytes, P))


@pytest.mark.parametrize("P", [1, 2, 3])
def test_costs_of_all_to_all_and_all_reduce(P: int) -> None:
    run_ranks(check_all_to_all_cost, P, backend="autoseq_counted")


def test_without_a_process_group_a_single_rank_keeps_everything() -> None:
    x = torch.randn(2, 5, 3)
    sharding: dict[str, Any] = dict(dim=1, outer=1, length=5, local=5, layout="contiguous", group="")
    for collective in (c.take_shard, c.all_gather, c.all_gather_varying, c.reduce_scatter):
        assert collective(x, **sharding) is x
    assert c.vary(x, group="") is x
    assert c.all_reduce(x, group="") is x
    assert c.all_to_all_single(x.view(-1), send_sizes=[30], recv_sizes=[30], group="").shape == (30,)
