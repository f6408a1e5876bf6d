"""Runs a random program on all its ranks and on one device, and says what became of it.

The oracle is the same module in eager mode: outputs, gradients of parameters and inputs, and parameters and buffers at the end
of one or two steps of SGD. In float64 what is left is rounding (1e-9) or an error; a float32 program that differs by more than
rounding is run in float64 too, and counts as exact if it is exact there. A program whose gradients multiply rounding (saturated
softmaxes, values of 1e5) is "sensitive": one device's own values, from parameters changed in the last bit, differ as much.
"""

from __future__ import annotations

import copy
import linecache
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from autoseq.runtime.errors import AutoSeqError
from lockstep_backend import lockstep_backend, on_threads
from program_text import IMPORTS, RandomProgram, program_text
from rank_threads import RankThreads

WIDE_TOLERANCE = 1e-9  # float64: sums over rows in another order, relative to at least 0.1
TOLERANCE = 2e-5  # float32
RATE = 0.05

NUDGES = 5  # of the last bit of all parameters
ROUNDINGS = 100  # as many units in the last place may the sums of another order be off, going back to parameters

Verdict = Literal["exact", "sensitive", "refused", "wrong", "internal", "no program"]
Named = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program. "no program" is one that torch itself refuses in eager mode."""

    verdict: Verdict
    text: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict in ("wrong", "internal")

    @property
    def kind(self) -> str:
        """The message without what differs from program to program."""
        text = self.text.splitlines()[0] if self.text else ""
        text = re.sub(r"[\w/.-]*random_program_\w+\.py:\d+ in \w+(: .*?(?= runs | is | has |$))?", "(a line)", text)
        return re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "#", text)[:160]


class Differs(Exception):
    """A value that is not one device's; and the errors by name, if all are numbers."""

    def __init__(self, text: str, errors: dict[str, float] | None = None) -> None:
        super().__init__(text)
        self.errors = errors


def check_program(program: RandomProgram) -> Outcome:
    """Run it on its ranks, as threads, and compare."""
    return judged(program, lambda: run_on_threads(program), run_on_threads)


def judged(program: RandomProgram, run: Callable[[], list[Named]], again: Callable[[RandomProgram], Any]) -> Outcome:
    """The outcome of comparing what `run` gives for each rank with one device; `again` runs a program in another precision."""
    compile(program_text(program), "program", "exec")  # a mistake in the table is no program that torch refuses
    try:
        expected = one_device(program)
    except Exception as error:  # noqa: BLE001 (torch refuses the program)
        return Outcome("no program", f"{type(error).__name__}: {error}")
    if not all(_is_finite(value) for value in expected.values()):
        return Outcome("no program", "values that are not finite")
    try:
        for actual in run():
            _compare(actual, expected, program)
    except Differs as error:
        wide = replace(program, wide=True)
        if not program.wide and judged(wide, lambda: again(wide), again).verdict == "exact":
            return Outcome("exact", "rounding")
        return Outcome("sensitive" if program.wide and is_sensitive(program, expected, error.errors) else "wrong", str(error))
    except AutoSeqError as error:
        if "internal error" in str(error):
            return Outcome("internal", f"{type(error).__name__}: {error}")
        return Outcome("refused", f"{type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001 (a failure of the program, to be told)
        return Outcome("internal", f"{type(error).__name__}: {error}\n" + "\n".join(getattr(error, "__notes__", [])))
    return Outcome("exact")


def one_device(program: RandomProgram, nudge: int = 0) -> Named:
    """Every value of the program in eager mode; with `nudge`, from parameters that are changed in the last bit."""
    with built(program) as make, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
        drawn = torch.Generator().manual_seed(nudge)
        for parameter in model.parameters() if nudge else ():
            signs = torch.randint(-1, 2, parameter.shape, generator=drawn).to(parameter.dtype)
            parameter.data.mul_(1 + signs * torch.finfo(parameter.dtype).eps)
        torch.manual_seed(program.seed)
        return train(model, model, program)


def run_on_threads(program: RandomProgram) -> list[Named]:
    """Every value of the program on each of its ranks."""
    torch._dynamo.reset()
    threads = RankThreads(program.P)
    with built(program) as make, on_threads(threads), quiet():
        models = [make() for _ in range(program.P)]
        run = torch.compile(_call, backend=lockstep_backend(threads, program.options))
        torch.manual_seed(program.seed)
        return threads.run(lambda rank: train(models[rank], lambda *args: run(models[rank], *args), program))


def run_on_this_rank(program: RandomProgram) -> list[Named]:
    """Every value of the program on this process's rank."""
    torch._dynamo.reset()
    with built(program) as make:
        model = make()
        torch.manual_seed(program.seed)
        run = torch.compile(model, backend="autoseq", options=program.options)
        return [train(model, run, program)]


def _call(model: nn.Module, *args: Any) -> Any:
    return model(*args)


@contextmanager
def quiet() -> Iterator[None]:
    """Without autoseq's notes on what it gathers, and torch's on what it compiles."""
    log = logging.getLogger("autoseq")
    level = log.level
    log.setLevel(logging.ERROR)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextmanager
def built(program: RandomProgram) -> Iterator[Callable[[], nn.Module]]:
    """A function that makes copies of the program's module. Its text is where Python looks for source lines."""
    name, text = f"random_program_{program.seed}.py", IMPORTS + program_text(program)
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    module = sys.modules["random_program"] = ModuleType("random_program")  # Dynamo looks for it there
    exec(compile(text, name, "exec"), vars(module))
    torch.manual_seed(program.seed)
    model = module.Program()
    model = model.double() if program.wide else model
    try:
        yield lambda: copy.deepcopy(model)
    finally:
        linecache.cache.pop(name, None)
        sys.modules.pop("random_program", None)


def inputs_of(program: RandomProgram, step: int) -> list[Tensor]:
    """ids, rows and other rows that want gradients, and a mask."""
    drawn = torch.Generator().manual_seed(1000 * program.seed + step)
    dtype = torch.float64 if program.wide else torch.float32
    B, S, L = program.batch, program.length, program.other_length
    ids = torch.randint(0, 16, (B, S), generator=drawn)
    rows, others = (torch.randn(B, n, 8, generator=drawn, dtype=torch.float64).to(dtype).requires_grad_() for n in (S, L))
    lengths = torch.randint(1, S + 1, (B, 1), generator=drawn)
    return [ids, rows, others, torch.arange(S) < lengths]


def train(model: nn.Module, run: Callable[..., Any], program: RandomProgram) -> Named:
    """Outputs, gradients and what is left of each step, by name."""
    values: Named = {}
    for step in range(program.steps):
        inputs = inputs_of(program, step)
        outputs = tree_flatten_with_path(run(*inputs))[0]
        drawn, total = torch.Generator().manual_seed(step), torch.zeros(())
        for _, out in outputs:
            if out.is_floating_point():
                total = total + (out * torch.randn(out.shape, generator=drawn, dtype=out.dtype)).sum()
        if total.requires_grad:
            total.backward()
        values |= {f"step {step}: output {''.join(map(str, path))}": out.detach() + 0 for path, out in outputs}
        values |= {f"step {step}: gradient of {name}": x.grad for name, x in zip(["rows", "others"], inputs[1:3], strict=True)}
        for name, parameter in model.named_parameters():
            values[f"step {step}: gradient of {name}"] = parameter.grad
            if parameter.grad is not None:
                parameter.data.sub_(RATE * parameter.grad)
                parameter.grad = None
    return values | {f"at the end: {name}": value.detach().clone() for name, value in model.state_dict().items()}


def is_sensitive(program: RandomProgram, expected: Named, errors: dict[str, float] | None) -> bool:
    """Whether rounding alone makes one device's own values differ as much as ours do, each of them."""
    if errors is None:
        return False
    nudged = [one_device(program, nudge) for nudge in range(1, NUDGES + 1)]
    return all(error <= ROUNDINGS * max(_relative(other[name], expected[name]) for other in nudged) for name, error in errors.items())


def _is_finite(value: Tensor | None) -> bool:
    return value is None or (bool(value.isfinite().all()) and bool((value.abs() < 1e6).all()))


def _compare(actual: Named, expected: Named, program: RandomProgram) -> None:
    if actual.keys() != expected.keys():
        raise Differs(f"other values: {sorted(actual.keys() ^ expected.keys())}")
    errors = {name: _error(actual[name], expected[name], program) for name in expected}
    wrong = {name: text for name, text in errors.items() if text}
    if wrong:
        text = "; ".join(f"{name}: {text}" for name, text in list(wrong.items())[:4])
        numbers = all(text.startswith("relative error") for text in wrong.values())
        raise Differs(text, {name: _relative(actual[name], expected[name]) for name in wrong} if numbers else None)


def _error(actual: Tensor | None, expected: Tensor | None, program: RandomProgram) -> str:
    if expected is None and actual is not None and program.inner != "eager" and not actual.any():
        return ""  # AOTAutograd gives zeros for every input of a part of which one output has a gradient
    if actual is None or expected is None:
        ours, theirs = ("none" if value is None else "one" for value in (actual, expected))
        return "" if actual is expected else f"{ours} where one device has {theirs}"
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{actual.dtype} {tuple(actual.shape)} where one device has {expected.dtype} {tuple(expected.shape)}"
    if not expected.is_floating_point():
        return "" if torch.equal(actual, expected) else "other integers"
    error = _relative(actual, expected)
    return "" if error <= (WIDE_TOLERANCE if program.wide else TOLERANCE) else f"relative error {error:.1e}"


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp(min=0.1)).item()
