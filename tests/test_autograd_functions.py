"""Custom autograd functions keep the backward that was written for them: one operator each, by rows where both bodies are."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autoseq.passes.autograd_functions import AUTOGRAD_FUNCTION, FUNCTIONS
from autoseq.passes.keep_meaning import keep_meaning
from autoseq.passes.normalize import normalize
from autoseq.passes.open_regions import open_regions
from autoseq.program import fake_inputs
from ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")  # Dynamo does that

TOLERANCE = 1e-5  # relative L2 in float32; sums over rows run in another order
W = 8


class Reversed(torch.autograd.Function):
    """A backward that is not the derivative of the forward: what only its author knows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -3 * grad


class Gelu(torch.autograd.Function):
    """As BLOOM's: the tanh approximation, computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        tanh = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
        return (0.5 * x * ((1 - tanh * tanh) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + tanh)) * grad


class Gated(torch.autograd.Function):
    """Two operands of one shape, two results, an integer, a result without a gradient; and a backward of 1.5 times the truth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, power: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, gate)
        ctx.power = power
        return x**power * gate, x > gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, gate = ctx.saved_tensors
        return 1.5 * grad * ctx.power * x ** (ctx.power - 1) * gate, 1.5 * grad * x**ctx.power, None


class Scaled(torch.autograd.Function):
    """One weight for each channel; autograd sums the gradient that comes back for every row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x * 2).sum((0, 1))


class Shifted(torch.autograd.Function):
    """Its backward gives something where nothing comes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad + 0.1


class Clipped(torch.autograd.Function):
    """A gradient cut to a range that holds 0, and zeroed where it would leave a range of values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() < 1.5, grad.clamp(-0.5, 2), 0)


class Normed(torch.autograd.Function):
    """A norm over the sequence: rows are mixed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = x.norm(dim=1, keepdim=True)
        ctx.save_for_backward(x, norm)
        return x / norm

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, norm = ctx.saved_tensors
        return 2 * grad / norm


class Dropped(torch.autograd.Function):
    """A dropout of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        keep = torch.rand_like(x) > 0.5
        ctx.save_for_backward(keep)
        return x * keep

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (keep,) = ctx.saved_tensors
        return grad * keep * 2


class Written(torch.autograd.Function):
    """It writes to its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * 2


def gated(x: Tensor, w: Tensor) -> Tensor:
    y, larger = Gated.apply(x, x.sin(), 3)
    return y + larger * x


def casting(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return Gelu.apply(F.linear(x, w.expand(W, W))).float()


PROGRAMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "a backward of its own": (lambda x, w: Reversed.apply(x), True),
    "BLOOM's GELU": (lambda x, w: Gelu.apply(x), True),
    "two operands and two results": (gated, True),
    "one after another": (lambda x, w: Gelu.apply(Reversed.apply(x)), True),
    "under autocast": (casting, True),
    "a clipped gradient": (lambda x, w: Clipped.apply(x), True),
    "a weight for each channel": (lambda x, w: Scaled.apply(x, w), False),
    "something for nothing": (lambda x, w: Shifted.apply(x), False),
    "rows that are mixed": (lambda x, w: Normed.apply(x), False),
    "random numbers": (lambda x, w: Dropped.apply(x), False),
}


# Graphs ---------------------------------------------------------------------------------------------------------------


def normal(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> tuple[fx.GraphModule, list[Any]]:
    """What normalization makes of `fn`, and the inputs of its graph."""
    seen: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        open_regions(gm, inputs)
        keep_meaning(gm)
        seen.extend([normalize(gm, fake_inputs(gm, inputs)), [x.node.hint if isinstance(x, torch.SymInt) else x for x in inputs]])
        return gm

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return seen[0], seen[1]


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, W, generator=generator).requires_grad_(), torch.randn(W, generator=generator).requires_grad_()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "random numbers"])
def test_a_function_is_kept_with_its_backward(program: str, dynamic: bool) -> None:
    fn, row_wise = PROGRAMS[program]
    x, w = inputs()
    gm, given = normal(fn, x, w, dynamic=dynamic)
    kept = gm.graph.find_nodes(op="call_function", target=AUTOGRAD_FUNCTION)
    assert kept and all(FUNCTIONS[node.args[3]].row_wise == row_wise for node in kept)
    actual, expected = fx.Interpreter(gm).run(*given)[0], fn(x, w)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    grads = [torch.autograd.grad(y.square().sum(), (x, w), allow_unused=True) for y in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_the_same_function_has_the_same_key_and_another_has_another() -> None:
    def key(fn: Callable[..., Any]) -> str:
        return normal(fn, *inputs())[0].graph.find_nodes(op="call_function", target=AUTOGRAD_FUNCTION)[0].args[3]

    assert key(lambda x, w: Gelu.apply(x)) == key(lambda x, w: Gelu.apply(x)) != key(lambda x, w: Reversed.apply(x))


def test_under_no_grad_only_the_forward_is_kept() -> None:
    with torch.no_grad():
        gm, given = normal(lambda x, w: Gelu.apply(x), *inputs())
        assert not gm.graph.find_nodes(op="call_function", target=AUTOGRAD_FUNCTION)
        assert torch.equal(fx.Interpreter(gm).run(*given)[0], Gelu.apply(given[0]))


def test_a_function_that_writes_to_its_input_is_refused() -> None:
    message = r"UnsupportedError: the custom autograd\.Function at .*test_autograd_functions\.py:\d+ .*writes to its inputs"
    with pytest.raises(Exception, match=message):
        normal(lambda x, w: Written.apply(x.clone()), *inputs())


# Ranks ----------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Attention, then a program with a custom function, then a projection."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self.program, self.qkv, self.out, self.w = program, nn.Linear(W, 3 * W), nn.Linear(W, W), nn.Parameter(torch.randn(W))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.out(PROGRAMS[self.program][0](attended, self.w))


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def train(rank: int, P: int, program: str, inner: str) -> tuple[list[float], list[str]]:
    heard = Messages()
    logging.getLogger("autoseq").addHandler(heard)
    torch.manual_seed(0)
    model, x = Model(program), torch.randn(2, 7, W)
    oracle = copy.deepcopy(model)
    compiled = torch.compile(model, backend="autoseq", options={"inner": inner})
    pairs = []
    for run in (compiled, oracle):
        torch.manual_seed(1)
        pairs.append(run(x))
        (pairs[-1] * torch.arange(W)).sum().backward()
    pairs = [(pairs[0].detach() + 0, pairs[1]), *((a.grad, e.grad) for a, e in zip(model.parameters(), oracle.parameters(), strict=True))]
    logging.getLogger("autoseq").removeHandler(heard)
    return [((a - e).norm() / e.norm()).item() for a, e in pairs if e is not None], heard.lines


@pytest.mark.parametrize("program", list(PROGRAMS))
def test_a_function_on_ranks_has_one_devices_gradients(program: str) -> None:
    tolerance = 2**-7 if "autocast" in program else TOLERANCE  # bfloat16's 8 bits
    (first, lines), (second, silent) = run_ranks(train, 2, program, "aot_eager")
    assert max(*first, *second) <= tolerance, (first, second)
    gathered = [[line for line in each if "autograd_function" in line and "runs on gathered values" in line] for each in (lines, silent)]
    assert bool(gathered[0]) != PROGRAMS[program][1], lines
    assert not gathered[1]  # the first rank speaks for all


@pytest.mark.slow
def test_a_function_goes_through_inductor() -> None:
    for errors, _ in run_ranks(train, 2, "two operands and two results", "inductor"):
        assert max(errors) <= TOLERANCE, errors
