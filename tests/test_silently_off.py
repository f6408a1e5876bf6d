"""What makes Dynamo run a frame in eager mode without a word: a model that autoseq splits runs split there, or is an error by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._debug_mode import DebugMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import autoseq
from autoseq import backend
from autoseq.program_call import ProgramCall
from ranks import run_ranks

# torch says that hooks of a FLOP counter for all modules fire for torch.compile's wrapper too.
pytestmark = pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks:UserWarning")

X = torch.linspace(-1, 1, 64).view(1, 8, 8)


class Attention(nn.Module):
    """One attention, with a branch that computes nothing and an int that each module has another of."""

    def __init__(self, number: int = 1) -> None:
        super().__init__()
        self.qkv, self.number = nn.Linear(8, 24), number

    def forward(self, x: Tensor, text: str = "a", early: bool = False) -> Tensor:
        if early:
            return x
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2) * self.number * len(text)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="autoseq", options={"inner": "eager"})  # type: ignore[return-value]


def parallelized(model: nn.Module) -> nn.Module:
    return autoseq.parallelize(model, inner="eager")


WAYS = pytest.mark.parametrize("way", [compiled, parallelized])


class Calls(list[int]):
    """The calls of programs, and of how many programs."""

    @property
    def programs(self) -> int:
        return len(set(self))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    made, call = Calls(), ProgramCall.__call__

    def counted(self: Any, *args: Any) -> Any:
        made.append(id(self))
        return call(self, *args)

    monkeypatch.setattr(ProgramCall, "__call__", counted)
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


class Logging(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Watching(Logging):
    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


WATCHERS: dict[str, Callable[[], Any]] = {
    "FLOP counter": lambda: FlopCounterMode(display=False), "memory tracker": MemTracker, "message counter": CommDebugMode,
    "debug mode": DebugMode, "own": Watching,
}  # fmt: skip


@WAYS
@pytest.mark.parametrize("is_first", [True, False], ids=["first call", "later call"])
@pytest.mark.parametrize("mode", WATCHERS.values(), ids=WATCHERS)
def test_a_call_under_a_watching_mode_and_those_after_it_run_split(mode: Any, is_first: bool, way: Any, calls: Calls) -> None:
    model, x = way(Attention()), X.clone().requires_grad_()
    if not is_first:
        model(x)
    before = len(calls)
    with mode():
        model(x).sum().backward()
    model(x)
    assert len(calls) == before + 2 and calls.programs == 1


@WAYS
def test_a_flop_counter_counts_a_split_model(way: Any, calls: Calls) -> None:
    plain = Attention()
    with FlopCounterMode(display=False) as expected:
        plain(X).sum().backward()
    with FlopCounterMode(display=False) as counted:
        way(plain)(X).sum().backward()
    assert calls and counted.get_total_flops() == expected.get_total_flops()


@WAYS
def test_a_mode_that_may_change_results_is_refused(way: Any, calls: Calls) -> None:
    model = way(Attention())
    with Logging(), pytest.raises(autoseq.NotSplitError, match=r"called under Logging.*define its classmethod ignore_compile_internals"):
        model(X)
    model(X)
    assert len(calls) == 1


def under_no_values(model: Callable[..., Any]) -> None:
    with FakeTensorMode() as mode:
        model(mode.from_tensor(X))


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "torch.func.grad": (lambda model: torch.func.grad(lambda x: model(x).sum())(X), "inside a transform of torch.func"),
    "torch.func.vmap": (lambda model: torch.func.vmap(model)(X[None]), "inside a transform of torch.func"),
}


@WAYS
@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_a_transform_around_a_call_is_refused(call: Any, message: str, way: Any, calls: Calls) -> None:
    model = way(Attention())
    with pytest.raises(autoseq.NotSplitError, match=message):
        call(model)
    model(X)
    assert len(calls) == 1


@WAYS
def test_a_call_that_computes_nothing_switches_nothing_off(way: Any, calls: Calls) -> None:
    model = way(Attention())
    for _ in range(2):
        assert model(X, early=True) is X
    model(X)
    assert len(calls) == 1


class Counting(nn.Module):
    """Branches that compute nothing: without any tensor, with one that passes through, and with an attribute that is set."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.count = Attention(), 0

    def forward(self, x: Tensor | None = None, key: str | None = None) -> Any:
        if x is None:
            self.count += 1
            return key
        if key is not None:
            self.count += 1
            return {key: self.passed(x)}
        return self.inner(x)

    def passed(self, x: Tensor) -> list[Tensor]:
        return [x] * 2


@pytest.mark.parametrize(("fullgraph", "raises"), [(False, False), (False, True), (True, False)], ids=["breaks", "errors", "full"])
def test_branches_that_compute_nothing_are_no_unsplit_calls(fullgraph: bool, raises: bool, calls: Calls) -> None:
    model = Counting()
    compiled = torch.compile(model, backend="autoseq", options={"inner": "eager"}, fullgraph=fullgraph)
    with torch._dynamo.error_on_graph_break(raises):
        for number in range(1, 4):
            assert compiled() is None
            assert compiled(X, "a")["a"][1] is X and model.count == 2 * number
            compiled(X)
    assert len(calls) == 3 and calls.programs == 1


class Broken(Attention):
    """A break inside a call whose result is returned: of the outer frame Dynamo keeps code that calls neither a program nor a rest."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.part(x)

    def part(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


@WAYS
def test_what_a_frame_without_operations_calls_is_split(way: Any, calls: Calls) -> None:
    model = way(Broken())
    for _ in range(2):
        model(X)
    assert len(calls) == 2 and calls.programs == 1


@WAYS
def test_an_explicit_wish_for_eager_mode_holds_for_its_calls_only(way: Any, calls: Calls) -> None:
    model = way(Attention())
    with torch.compiler.set_stance("force_eager"):
        model(X)
    with torch._dynamo.config.patch(disable=True):
        model(X)
    assert not calls
    model(X)
    assert len(calls) == 1


class Generator(Attention):
    def forward(self, x: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
        yield super().forward(x)


@WAYS
def test_a_forward_that_dynamo_cannot_trace_is_an_error_with_its_reason(way: Any, calls: Calls) -> None:
    for _ in range(2):
        with pytest.raises(autoseq.NotSplitError, match="ran whole, because Dynamo compiled nothing of it"):
            list(way(Generator())(X))


@WAYS
def test_code_that_was_skipped_for_another_backend_is_an_error(way: Any, calls: Calls) -> None:
    with Logging():
        torch.compile(Attention(), backend="eager")(X)
    with pytest.raises(autoseq.NotSplitError, match=r"another backend met a dispatch mode.*torch._dynamo.reset\(\)"):
        way(Attention())(X)


@WAYS
def test_an_error_is_never_suppressed(way: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("broken compiler")

    monkeypatch.setattr(backend, "_inner", broken)
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(Exception, match="broken compiler"):
        way(Attention())(X)


@WAYS
def test_blocks_that_need_a_program_each_are_all_split(way: Any, calls: Calls) -> None:
    blocks = [way(Attention(number)) for number in range(10)]
    for _ in range(2):
        for block in blocks:
            block(X)
    assert len(calls) == 20 and calls.programs == 10


def passed_on(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs)

    return wrapper


class Decorated(Attention):
    forward = passed_on(Attention.forward)  # type: ignore[assignment]


def test_blocks_behind_a_decorator_are_all_split(calls: Calls) -> None:
    for number in range(10):
        torch.compile(Decorated(number).forward, backend="autoseq", options={"inner": "eager"})(X)
    assert len(calls) == 10


@WAYS
def test_past_the_recompile_limit_each_new_call_is_an_error_that_names_the_cause(way: Any, calls: Calls) -> None:
    model = way(Attention())
    for length in range(1, 9):
        model(X, "a" * length)
    said = r"Attention.forward \(.*:\d+\) was compiled as often as recompile_limit \(8\) allows.*only where text == 'aaaaaaaa'"
    for _ in range(2):
        with pytest.raises(autoseq.NotSplitError, match=said):
            model(X, "a" * 9)
    model(X, "aa")
    assert len(calls) == 9
    torch._dynamo.reset()
    model(X, "a" * 9)


@pytest.mark.parametrize("of", ["torch.compile", "the configuration"])
def test_a_limit_of_torch_compile_is_an_error_too(of: str, calls: Calls) -> None:
    keywords: Any = {"recompile_limit": 1} if of == "torch.compile" else {}
    if keywords and "recompile_limit" not in inspect.signature(torch.compile).parameters:
        pytest.skip("torch.compile takes no recompile_limit in torch 2.11")
    model = torch.compile(Attention(), backend="autoseq", options={"inner": "eager"}, **keywords)
    model(X)
    with (
        torch._dynamo.config.patch({} if keywords else {"accumulated_recompile_limit": 1}),
        pytest.raises(autoseq.NotSplitError, match="was compiled as often as a limit of Dynamo's configuration or"),
    ):
        model(X, "aa")


class Step(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().mean() + len(list(self.model.parameters()))


@WAYS
def test_a_model_in_a_function_that_another_backend_compiles_runs_split(way: Any, calls: Calls) -> None:
    model = way(Attention())
    expected = Step(model)(X)
    assert torch.equal(torch.compile(lambda x: model(x).square().mean() + 2, backend="eager")(X), expected)
    assert torch.equal(torch.compile(Step(model), backend="eager")(X), expected)
    assert len(calls) == 3
    torch._dynamo.reset()
    with pytest.raises(Exception, match="compiled with the backend 'autoseq', and another backend compiles the function that calls it"):
        torch.compile(Step(model), backend="eager", fullgraph=True)(X)
    calls.clear()
    assert torch.equal(way(Step(model))(X), expected)
    assert len(calls) == 1  # of ours: it has the model in it


def test_another_backend_compiles_around_a_parallelized_model_and_replaces_no_compiled_one(calls: Calls) -> None:
    torch.compile(parallelized(Attention()), backend="eager")(X)
    assert len(calls) == 1
    with pytest.raises(autoseq.NotSplitError, match="compiled again, with another backend that would replace it"):
        torch.compile(compiled(Attention()), backend="eager")


@WAYS
def test_a_call_that_is_checkpointed_reentrantly_runs_split(way: Any, calls: Calls) -> None:
    model, x = way(Attention()), X.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=True).sum().backward()
    assert len(calls) == 2


def under_modes(rank: int, world_size: int) -> tuple[float, str]:
    """One rank alone counts FLOPs; then all call the model without values."""
    torch.manual_seed(0)
    plain = Attention()
    expected = plain(X)
    model = compiled(plain)
    model(X)
    with FlopCounterMode(display=False) if rank == 0 else torch.enable_grad():
        error = (model(X).detach() - expected).abs().max().item()
    with pytest.raises(autoseq.NotSplitError) as raised:
        under_no_values(model)
    return error, str(raised.value)


def test_one_rank_alone_may_count_and_fake_tensors_are_refused() -> None:
    for error, said in run_ranks(under_modes, 2, timeout_s=60):
        assert error <= 1e-6  # float32 rounding of values around 1
        assert "called with fake tensors, or under FakeTensorMode" in said


def strict_without_operations(rank: int, world_size: int) -> None:
    torch.manual_seed(0)
    for fullgraph in (True, False):
        torch._dynamo.reset()
        model = torch.compile(Attention(), backend="autoseq", options={"inner": "eager", "strict": True}, fullgraph=fullgraph)
        for early in (True, False, True):
            model(X, early=early)


def test_a_program_without_operations_is_no_fallback() -> None:
    run_ranks(strict_without_operations, 2, timeout_s=60)
