"""What torch.compile was given, and all the programs that this backend has made of it in this process: what notices and reports are about.

A model that Dynamo traces in parts has several programs, and one more for each other length or mode; they belong together because the same
call of the compiled model is on the stack wherever one of them is compiled.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from autoseq.dynamo_stack import outermost_call
from autoseq.planning.topology import Topology
from autoseq.program import Program

_STEPS_KEPT = 16

Counters = dict[str, tuple[int, int]]
"""Op -> messages and bytes, as `runtime.counting` has them."""


@dataclass(slots=True, eq=False)
class Compiled:
    """One program, and how often it was called. `local` is its local graph as it was before a compiler got it, which may change it."""

    program: Program
    local: fx.Graph
    ranks: int
    topology: Callable[[], Topology]
    is_part: bool
    calls: int = 0


@dataclass(slots=True)
class Steps:
    """The programs that one step calls, those of the latest; when each step began, and what had been sent then, where that is counted."""

    programs: list[Compiled] = field(default_factory=list)
    began_s: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS_KEPT))
    sent: deque[Counters] = field(default_factory=lambda: deque(maxlen=_STEPS_KEPT))

    def begin(self) -> None:
        """The next step's first call."""
        self.programs = []
        self.began_s.append(time.perf_counter())
        counting = sys.modules.get("autoseq.runtime.counting")  # nobody counts who has not imported it
        if counting is not None:
            self.sent.append(counting.counters())


@dataclass(slots=True, eq=False, weakref_slot=True)
class CompiledModel:
    """The programs of one model or function, in the order in which they were compiled, and its steps: those that train, and others."""

    name: str
    programs: list[Compiled] = field(default_factory=list)
    training: Steps = field(default_factory=Steps)
    others: Steps = field(default_factory=Steps)

    def called(self, compiled: Compiled, *, trains: bool) -> None:
        """A call of a program; of a model in parts the one that was compiled first begins a step."""
        compiled.calls += 1
        steps = self.training if trains else self.others
        if not compiled.is_part or compiled is self.programs[0]:
            steps.begin()
        steps.programs.append(compiled)

    @property
    def steps(self) -> Steps:
        """Those that train, where there are any."""
        return self.training if self.training.programs else self.others


_models: weakref.WeakKeyDictionary[Any, CompiledModel] = weakref.WeakKeyDictionary()
_kept_alive: dict[int, tuple[Any, CompiledModel]] = {}
"""Of objects that cannot be referred to weakly, by their ids."""


def model_being_compiled() -> CompiledModel:
    """The one whose call is on this thread's stack."""
    target = unwrapped(outermost_call())
    try:
        return _models.setdefault(target, CompiledModel(name_of(target)))
    except TypeError:
        return _kept_alive.setdefault(id(target), (target, CompiledModel(name_of(target))))[1]


def known_models() -> list[tuple[Any, CompiledModel]]:
    """What has been compiled and is still there."""
    return list(_models.items())


def name_of(target: Any) -> str:
    """`GPT`, `train_step`."""
    if target is None:
        return "the compiled function"
    return type(target).__name__ if isinstance(target, nn.Module) else getattr(target, "__name__", type(target).__name__)


def unwrapped(compiled: Any) -> Any:
    """What torch.compile was given, from what it returned or from the bound method that it made of a module."""
    while True:
        inner = getattr(compiled, "_orig_mod", None) or getattr(compiled, "_torchdynamo_orig_callable", None)
        inner = inner or getattr(compiled, "__self__", None)
        if inner is None and not isinstance(compiled, nn.Module):
            inner = getattr(compiled, "__wrapped__", None)  # torch wraps modules of its own in one more function
        if inner is None:
            return compiled
        compiled = inner
