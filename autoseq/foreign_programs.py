"""Programs of another backend that call a model of ours: the model is called from Python there, and runs split.

Dynamo would trace through the model as if nobody had compiled it, and the other backend would run it whole, silently.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import VariableBuilder
from torch._dynamo.variables.misc import DelayGraphBreakVariable

from autoseq.compiled_calls import is_compiled_by_us, is_ours

_REASON = "it is compiled with the backend 'autoseq', and another backend compiles the function that calls it"


def stay_apart() -> None:
    """Have Dynamo break the graphs of other backends at calls of what is compiled for this one; to be called once."""
    VariableBuilder.__call__ = _breaking(VariableBuilder.__call__)  # type: ignore[method-assign]


def _breaking(build: Callable[..., VariableTracker]) -> Callable[..., VariableTracker]:
    @wraps(build)
    def __call__(self: VariableBuilder, value: Any) -> VariableTracker:
        if is_compiled_by_us(value) and not is_ours(self.tx.output.compiler_fn):
            return DelayGraphBreakVariable(source=self.source, msg=_REASON)
        return build(self, value)

    return __call__
