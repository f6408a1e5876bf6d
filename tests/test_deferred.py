"""A deferred output is, to the program that uses it, the tensor one device would have given."""

import copy
import io
import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from autoseq.runtime import collectives as c
from autoseq.runtime.counting import counters, reset_counters
from autoseq.runtime.deferred import DeferredTensor, defer
from autoseq.runtime.errors import OptionError, RankMismatchError, RendezvousError, UnsupportedError
from autoseq.runtime.groups import SequenceGroup, group_from_mesh
from autoseq.runtime.layout import Layout, local_length
from ranks import RankError, run_ranks


def deferred(
    x: Tensor, *, name: str = "logits", layout: Layout = "contiguous", outer: int = 1, group: SequenceGroup | None = None
) -> DeferredTensor:
    """x, computed on shards of its dim 1, as a compiled program gives it back."""
    group = group or group_from_mesh(None)
    n = x.shape[1] // outer
    sharding: dict[str, Any] = dict(dim=1, outer=outer, length=n, layout=layout, group=group.name)
    s = local_length(n, group.size, layout)
    return defer(c.take_shard(x, **sharding, local=s), name=name, shape=tuple(x.shape), **sharding, local_length=s)


def example(n: int = 5, outer: int = 1) -> Tensor:
    """The same values on every rank."""
    torch.manual_seed(0)
    return torch.randn(2, outer * n, 3, requires_grad=True)


# What programs do with an output. Each gives the same on the deferred output as on one device's.
def save_and_load(y: Tensor) -> Any:
    file = io.BytesIO()
    torch.save({"logits": y}, file)
    file.seek(0)
    return torch.load(file)["logits"]


def write_in_place(y: Tensor) -> Tensor:
    y += 1
    y.mul_(2)
    y[0, 1] = 0
    return y * y


def set_data(y: Tensor) -> Tensor:
    alias, value = y.detach(), y.data * 0.5
    y.data = value
    value[0, 0] = 7
    return y * y + alias


def set_data_of_another_dtype(y: Tensor) -> Tensor:
    z = y.detach()
    z.data = z.data[:, :2].double()
    return z.exp() + y.sum()


def set_data_to_itself(y: Tensor) -> Tensor:
    z = y.detach()
    y.data = z
    y.data.add_(1)
    return z * y


USES: list[Any] = [
    pytest.param(lambda y: (y * y).sum(), id="arithmetic and a sum"),
    pytest.param(lambda y: y[0], id="indexing"),
    pytest.param(lambda y: y[:, -1:, :2], id="slicing"),
    pytest.param(lambda y: y.view(-1, 3), id="a view"),
    pytest.param(lambda y: torch.cat(list(y)), id="iteration"),
    pytest.param(lambda y: torch.stack([y, y.detach()]), id="a list of tensors"),
    pytest.param(lambda y: torch.nn.functional.cross_entropy(y.view(-1, 3), torch.arange(y.numel() // 3) % 3), id="a loss"),
    pytest.param(lambda y: y @ torch.ones(3, 4), id="a matmul"),
    pytest.param(lambda y: torch.where(y > 0, y, 0), id="a condition"),
    pytest.param(lambda y: y.double().sin(), id="another dtype"),
    pytest.param(lambda y: y.full() if isinstance(y, DeferredTensor) else y * 1, id="full"),
    pytest.param(lambda y: checkpoint(torch.sin, y, use_reentrant=False), id="a checkpoint"),
    pytest.param(write_in_place, id="writing in place"),
    pytest.param(set_data, id="setting .data"),
    pytest.param(set_data_of_another_dtype, id="setting .data of another shape and dtype"),
    pytest.param(set_data_to_itself, id="setting .data to itself"),
]

READS: list[Any] = [
    pytest.param(lambda y: y.detach().numpy(), id="numpy"),
    pytest.param(lambda y: np.asarray(y.detach()), id="numpy.asarray"),
    pytest.param(lambda y: y.tolist(), id="tolist"),
    pytest.param(lambda y: y[0, 0, 0].item(), id="item"),
    pytest.param(lambda y: y.detach().cpu(), id="cpu"),
    pytest.param(lambda y: str(y.detach()), id="print"),
    pytest.param(lambda y: f"{y.detach()}", id="format"),
    pytest.param(save_and_load, id="torch.save"),
    pytest.param(lambda y: save_and_load(y.detach()).requires_grad, id="torch.save keeps requires_grad"),
    pytest.param(lambda y: pickle.loads(pickle.dumps(y.detach())), id="pickle"),
    pytest.param(lambda y: copy.deepcopy(y.detach()), id="copy.deepcopy"),
    pytest.param(lambda y: torch.from_dlpack(y.detach()), id="dlpack"),
    pytest.param(lambda y: bool((y > -100).all()), id="truth"),
    pytest.param(lambda y: max(y.detach().flatten()).item(), id="a builtin"),
]


def check_use(rank: int, P: int, layout: Layout, outer: int, index: int) -> None:
    use = USES[index].values[0]
    x = example(outer=outer)
    mine, whole = use(deferred(x, layout=layout, outer=outer)), use(x * 1)
    assert type(mine) is Tensor
    # The gathered values are the same bits and the program after them is the same, so nothing is rounded differently.
    assert torch.equal(mine, whole)
    weight = torch.randn(mine.shape)
    assert torch.equal(*(torch.autograd.grad((value * weight).sum(), x)[0] for value in (mine, whole)))


def check_read(rank: int, P: int, index: int) -> None:
    read = READS[index].values[0]
    x = example()
    mine, whole = read(deferred(x)), read(x.detach().requires_grad_())
    assert type(mine) is type(whole)
    assert torch.equal(mine, whole) if isinstance(mine, Tensor) else np.array_equal(mine, whole)


def numbered(params: list[Any]) -> Any:
    # Ranks are other processes: a lambda does not travel, its place in the table does.
    return [pytest.param(i, id=param.id) for i, param in enumerate(params)]


@pytest.mark.parametrize(
    ("P", "layout", "outer"),
    [
        pytest.param(1, "contiguous", 1, id="one rank"),
        pytest.param(2, "contiguous", 1, id="two ranks"),
        pytest.param(3, "zigzag", 2, id="three ranks, zigzag, composite dim"),
    ],
)
@pytest.mark.parametrize("use", numbered(USES))
def test_using_it_gives_one_devices_values_and_gradients(P: int, layout: Layout, outer: int, use: int) -> None:
    run_ranks(check_use, P, layout, outer, use)


@pytest.mark.parametrize("read", numbered(READS))
def test_reading_it_gives_one_devices_values(read: int) -> None:
    run_ranks(check_read, 2, read)


def check_silence(rank: int, P: int) -> None:
    x = example()
    reset_counters()
    y = deferred(x)
    assert (y.shape, y.dtype, y.device, y.requires_grad, y.is_leaf) == (x.shape, x.dtype, x.device, True, False)
    assert (y.stride(), y.dim(), len(y), y.numel(), y.is_contiguous()) == (x.stride(), 3, 2, 30, True)
    alias = y.detach()
    assert isinstance(alias, DeferredTensor)
    assert not alias.requires_grad
    shown = "DeferredTensor('logits', shape (2, 5, 3), torch.float32, local shape (2, {}, 3), not gathered{})"
    assert repr(y) == shown.format(3 - rank, ", grad_fn=<_DeferBackward>")
    assert repr([alias]) == f"[{shown.format(3 - rank, '')}]"
    assert torch.equal(y.local, x[:, 3 * rank : 3 * rank + 3])
    assert counters() == {}
    y.sum()
    alias.sum()
    loss = (y * 2).sum()
    assert counters() == {"all_gather": (1, 2 * 3 * 3 * 4)}
    # With respect to the shard the output was made of; take_shard, which made that, is this test's own.
    (gradient,) = torch.autograd.grad(loss, y._shard.padded)
    assert torch.equal(gradient[:, : 3 - rank], torch.full((2, 3 - rank, 3), 2.0))
    assert torch.equal(gradient[:, 3 - rank :], torch.zeros(2, rank, 3))
    assert counters() == {"all_gather": (1, 2 * 3 * 3 * 4)}, "the backward pass moves nothing"
    assert "gathered, grad_fn" in repr(y)
    assert repr(alias).endswith("gathered)")


def test_looking_at_it_sends_nothing_and_values_are_gathered_once() -> None:
    run_ranks(check_silence, 2, backend="autoseq_counted")


def check_local(rank: int, P: int, layout: Layout) -> None:
    x = example(n=7)
    y = deferred(x, layout=layout)
    held = {("contiguous", 0): [0, 1, 2, 3], ("contiguous", 1): [4, 5, 6], ("zigzag", 0): [0, 1, 6], ("zigzag", 1): [2, 3, 4, 5]}
    rows = held[layout, rank]
    assert torch.equal(y.local, x[:, rows])
    # Losses of the ranks' own rows add up to the whole loss.
    assert torch.equal(torch.autograd.grad((y.local**2).sum(), x)[0], 2 * x)
    y.add_(1)
    assert torch.equal(y.local, x[:, rows] + 1)
    assert torch.equal(torch.autograd.grad((y.local * 3).sum(), x)[0], torch.full_like(x, 3))
    y = deferred(x, layout=layout)
    y.data.mul_(2)
    assert torch.equal(y.local, x[:, rows] * 2)
    y.data = x.data * 4
    assert torch.equal(y.local, x[:, rows] * 4)
    assert torch.equal(torch.autograd.grad(y.local.sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_local_is_this_ranks_valid_rows(layout: Layout) -> None:
    run_ranks(check_local, 2, layout)


def check_kinds(rank: int, P: int) -> None:
    ids = torch.arange(10).view(2, 5)
    y = deferred(ids)
    assert (y.dtype, y.requires_grad) == (torch.int64, False)
    assert torch.equal(y + 0, ids)
    with torch.inference_mode():
        z = deferred(example().detach())
        assert z.local.shape == (2, 3 - rank, 3)
        assert torch.equal(z * 1, example())
        z.zero_()
        assert not z.local.any()
    leaf = deferred(example().detach()).requires_grad_()
    (leaf * 2).sum().backward()
    assert type(leaf.grad) is Tensor
    assert torch.equal(leaf.grad, torch.full((2, 5, 3), 2.0))
    x = example()
    kept = deferred(x)
    kept.retain_grad()
    (kept**2).sum().backward()
    assert kept.grad is not None
    assert torch.equal(kept.grad, 2 * x)
    assert torch.equal(torch.autograd.grad(torch.autograd.grad((deferred(x) ** 3).sum(), x, create_graph=True)[0].sum(), x)[0], 6 * x)
    doubled = deferred(x.detach())
    assert doubled.add_(doubled.detach()) is doubled
    assert torch.equal(doubled.detach() * 1, 2 * x)
    out = deferred(x.detach())
    assert torch.add(x.detach(), 1, out=out) is out
    assert torch.equal(out.detach(), x + 1)


def test_leaves_integers_inference_hooks_and_out_arguments() -> None:
    run_ranks(check_kinds, 2)


def same_error_as_one_device(rank: int, P: int) -> None:
    x = example()
    for act in (lambda y: y.numpy(), copy.deepcopy):
        messages = []
        for value in (deferred(x), x * 1):
            with pytest.raises(RuntimeError) as caught:
                act(value)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    with pytest.raises(UnsupportedError, match=r"squeeze_.* would change the shape of a deferred output in place"):
        deferred(x.detach()).squeeze_(0)


def test_what_one_device_refuses_is_refused_alike() -> None:
    run_ranks(same_error_as_one_device, 2)


def check_compiled(rank: int, P: int, dynamic: bool | None) -> None:
    w = torch.randn(3, 3, requires_grad=True)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def program(y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return ((y @ w).sin() ** 2).sum(), y[:, 1:]

    compiled = torch.compile(program, backend=backend, dynamic=dynamic, fullgraph=True)
    for n in (5, 6, 7, 5):
        x = example(n)
        results = []
        for f, y in ((compiled, deferred(x)), (program, x * 1)):
            loss, rows = f(y, w)
            assert type(rows) is Tensor
            results.append((loss, rows, *torch.autograd.grad(loss + rows.sum(), (x, w))))
        assert all(torch.equal(mine, whole) for mine, whole in zip(*results, strict=True))
    assert len(graphs) == (1 if dynamic else 2), "another deferred output must not mean another graph"
    inplace = torch.compile(lambda y: y.add_(1), backend="aot_eager")
    y = deferred(example().detach())
    assert inplace(y) is y
    assert torch.equal(y * 1, example() + 1)
    y.data = example() * 4
    assert torch.equal(torch.compile(lambda y: y.data * 2 + y, backend="eager", fullgraph=True)(y), example() * 8 + example() * 4)


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_a_compiled_function_sees_the_full_value(dynamic: bool | None) -> None:
    run_ranks(check_compiled, 2, dynamic)


def check_local_in_compiled(rank: int, P: int) -> None:
    y = deferred(example())
    whole = torch.compile(lambda y: y.local.sum(), backend="eager")(y)
    assert torch.equal(whole, y.local.sum())


def test_local_works_in_a_compiled_function() -> None:
    run_ranks(check_local_in_compiled, 2)


def one_never_comes(rank: int, P: int, use: str) -> tuple[str, float]:
    y = deferred(example())
    if rank == 1:
        return "", 0.0
    start = time.monotonic()
    with pytest.raises(RendezvousError) as caught:
        str(y) if use == "print" else y.sum()
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize("use", ["print", "sum"])
def test_a_rank_that_never_comes_to_the_gather_is_an_error_not_a_hang(use: str) -> None:
    message, seconds = run_ranks(with_timeout, 2, "0.5", one_never_comes, use)[0]
    assert "The output 'logits' (number 1 of this group's outputs, shape (2, 5, 3), torch.float32) could not be gathered" in message
    assert "Ranks [1] did not come within 0.5 s" in message
    assert "AUTOSEQ_GATHER_TIMEOUT_S" in message
    assert seconds < 10


def with_timeout(rank: int, P: int, timeout: str, job: Callable[..., Any], *args: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOSEQ_GATHER_TIMEOUT_S", timeout)
        return job(rank, P, *args)


def gather_now(rank: int, P: int) -> None:
    deferred(example()).sum()


@pytest.mark.parametrize("timeout", ["soon", "0", "-1"])
def test_the_timeout_must_be_a_positive_number(timeout: str) -> None:
    message = f"{OptionError.__name__}: AUTOSEQ_GATHER_TIMEOUT_S must be a number of seconds above 0, got '{timeout}'"
    with pytest.raises(RankError, match=message):
        run_ranks(with_timeout, 2, timeout, gather_now)


def late_then_together(rank: int, P: int) -> None:
    y = deferred(example())
    with pytest.raises(RendezvousError), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOSEQ_GATHER_TIMEOUT_S", "0.3" if rank == 0 else "30")
        if rank == 1:
            time.sleep(1)
        y.sum()
    assert torch.equal(y * 1, example())


def test_after_a_missed_gather_a_later_one_works() -> None:
    run_ranks(late_then_together, 2)


def different_outputs(rank: int, P: int) -> str:
    a, b = deferred(example(), name="logits"), deferred(example(), name="hidden")
    with pytest.raises(RankMismatchError) as caught:
        (a if rank == 0 else b).sum()
    return str(caught.value)


def different_steps(rank: int, P: int) -> str:
    steps = [deferred(example()) for _ in range(2)]
    with pytest.raises(RankMismatchError) as caught:
        steps[rank].sum()
    return str(caught.value)


def test_ranks_that_want_different_outputs_are_told() -> None:
    message = run_ranks(different_outputs, 2)[0]
    assert "Rank 0 needs the values of the output 'logits' (number 1" in message
    assert "while rank 1 needs those of 'hidden' (number 2" in message


def test_the_same_output_of_different_steps_is_not_mixed() -> None:
    message = run_ranks(different_steps, 2)[0]
    assert "'logits' (number 1 of" in message
    assert "'logits' (number 2 of" in message


def two_groups(rank: int, P: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    for name in ("sequence", "data"):
        x = example() + mesh["data" if name == "sequence" else "sequence"].get_local_rank()
        first, second = (deferred(x * k, group=group_from_mesh(mesh[name])) for k in (1, 2))
        assert torch.equal(second - first, x)
    dist.barrier()


def test_two_groups_and_two_models_do_not_mix() -> None:
    run_ranks(two_groups, 4)
