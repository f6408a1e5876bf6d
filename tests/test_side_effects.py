"""What a forward does besides computing: its results, gradients, parameters and buffers are one device's after it, or it is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoseq import AutoSeqError
from ranks import run_ranks
from side_effect_programs import PROGRAMS, W, Written

TOLERANCE = 1e-5  # relative L2 in float32, against at least 0.1; sums over rows run in another order


def errors_of(name: str, **options: Any) -> dict[str, float]:
    """Relative errors of everything that a program returns, differentiates and writes to."""
    torch.manual_seed(0)
    model, x = Written(name), torch.randn(2, 9, W)
    oracle = copy.deepcopy(model)
    compiled = torch.compile(model, backend="autoseq", options=options)
    actual, expected = everything(compiled, model, x), everything(oracle, oracle, x)
    assert actual.keys() == expected.keys()
    return {key: ((actual[key] - e).norm() / e.norm().clamp(min=0.1)).item() for key, e in expected.items()}


def everything(run: Callable[..., Any], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    given = leaf * 1
    results = run(given)
    results = results if isinstance(results, tuple) else (results,)
    torch.manual_seed(1)
    weighted = [(result * torch.randn(result.shape)).sum() for result in results if result.requires_grad]
    torch.stack(weighted).sum().backward()
    found = {f"result {i}": result for i, result in enumerate(results)} | {"input": given, "gradient of the input": leaf.grad}
    found |= dict(model.named_parameters()) | dict(model.named_buffers())
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {key: value.detach() + 0 for key, value in found.items() if value is not None}


def run_programs(rank: int, P: int, names: list[str], options: dict[str, Any]) -> dict[str, dict[str, float]]:
    found = {}
    for name in names:
        torch._dynamo.reset()
        found[name] = errors_of(name, **options)
    return found


def check_programs(P: int, inner: str, names: list[str], **options: Any) -> None:
    for found in run_ranks(run_programs, P, names, {"inner": inner, **options}, timeout_s=400):
        wrong = {name: errors for name, errors in found.items() if not max(errors.values()) <= TOLERANCE}
        assert not wrong, wrong


EXACT = list(PROGRAMS)


@pytest.mark.parametrize("P", [1, 2])
def test_writes_have_one_devices_values_and_gradients(P: int) -> None:
    check_programs(P, "eager", EXACT)


SEEN_BY_AOT = ["a parameter under no grad", "an embedding with max norm", "an activation through data and detach", "an input"]


def test_writes_are_right_behind_aotautograd() -> None:
    check_programs(2, "aot_eager", [*SEEN_BY_AOT, "a running mean and a parameter", "a checkpointed region"])


def test_hooks_and_strided_views_are_right_behind_aotautograd() -> None:
    check_programs(2, "aot_eager", ["two hooks behind a reader", "hooks between writes", "writes to a strided view and its base"])


def test_windows_are_right_in_zigzag_layout() -> None:
    names = ["overlapping windows", "memory of an attention", "a write to a view", "two hooks behind a reader"]
    check_programs(2, "eager", names, layout="zigzag")


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_callers_no_grad_goes_on_after_a_write_to_a_parameter(inner: str) -> None:
    model = Written("an embedding with max norm")
    compiled = torch.compile(model, backend="autoseq", options={"inner": inner})
    with torch.no_grad():
        results = [compiled(torch.randn(2, 9, W)) for _ in range(2)]
        assert not torch.is_grad_enabled()
    assert not any(result.requires_grad for result in results)


REFUSED: dict[str, Callable[[Any, Tensor], Any]] = {}


def refused(message: str) -> Callable[[Callable[[Any, Tensor], Any]], Callable[[Any, Tensor], Any]]:
    def add(fn: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
        PROGRAMS[message] = REFUSED[message] = fn
        return fn

    return add


@refused(r"set_ at .*test_side_effects.py:\d+ in .* gives a tensor other memory, .* Assign a new tensor instead \(y = x\)")
def other_memory(m: Any, x: Tensor) -> Any:
    y = m.attend(x).detach()
    y.set_(x.detach() * 2)
    return m.f(y)


@refused(r"as_strided at .*test_side_effects.py:\d+ .* its operand has gaps. Call contiguous\(\)")
def memory_with_gaps(m: Any, x: Tensor) -> Any:
    return m.attend(x)[:, 2:].as_strided((2, 3), (16, 1))


@refused(r"as_strided at .*test_side_effects.py:\d+ .* its operand does not hold all of it")
def memory_around_a_view(m: Any, x: Tensor) -> Any:
    return m.attend(x)[1].as_strided((2, 3), (16, 1), 0)


@refused(r"the hook registered at .*test_side_effects.py:\d+ .* uses a tensor that is made after the hooked tensor was read")
def a_hook_with_a_late_tensor(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    z = y * 3
    scale = z.detach().mean()
    y.register_hook(lambda grad: grad * scale)
    return y + z


@refused(r"the write at .*test_side_effects.py:\d+ .* goes to memory of a view that has a hook \(.*test_side_effects.py:\d+")
def a_write_to_a_hooked_view(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))[:, 1:]
    y.register_hook(lambda grad: grad * 2)
    y.mul_(3)
    return y


@refused(r"the write at .*test_side_effects.py:\d+ .* goes through .data to a tensor that is kept for the backward of .* use a clone")
def data_that_a_backward_reads(m: Any, x: Tensor) -> Any:
    y = m.f(m.attend(x))
    m.f.weight.data[1:] *= 0.5
    return y


@refused(r"the write at .*test_side_effects.py:\d+ .* goes to a tensor that a checkpointed region reads .* Write outside of the region")
def a_parameter_in_a_checkpointed_region(m: Any, x: Tensor) -> Any:
    def body(x: Tensor) -> Tensor:
        with torch.no_grad():
            m.f.weight.mul_(0.5)
        return torch.tanh(m.f(x))

    return checkpoint(body, m.attend(x), use_reentrant=False)


@pytest.mark.parametrize("message", list(REFUSED))
def test_what_cannot_be_kept_exact_is_refused_by_name(message: str) -> None:
    compiled = torch.compile(Written(message), backend="autoseq", options={"inner": "eager"})
    with pytest.raises(AutoSeqError, match=message):
        compiled(torch.randn(2, 9, W, requires_grad=True) * 1)


@pytest.mark.slow
def test_writes_are_right_behind_inductor() -> None:
    check_programs(2, "inductor", ["an embedding with max norm"])
