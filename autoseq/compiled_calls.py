"""Calls of what torch.compile made for this backend: each reaches a program of ours, or is an error by name.

Dynamo runs a frame that it skips in eager mode and says nothing, which would switch the backend off silently. A hook of Dynamo's contexts
(`enter_exit_hooks`) opens and closes a record around each call; frames that Dynamo leaves uncompiled (`dynamo_frames`) and programs that
run (`backend`) are noted there.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial, wraps
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakSet

import torch
from torch._C._functorch import peek_interpreter_stack
from torch._dynamo import eval_frame
from torch._dynamo.eval_frame import OptimizeContext, OptimizedModule

from autoseq.runtime.errors import NotSplitError
from autoseq.watching_modes import hide_watchers, nothing, refuse_other_modes

TORCH_COUNTS = hasattr(eval_frame, "set_fullgraph_compiled_frame_count")
"""Whether torch itself counts the compiled frames of a call with `fullgraph=True`, those that compute nothing too (not torch 2.11)."""

_compiled: WeakSet[FunctionType] = WeakSet()
"""The functions that torch.compile made for this backend."""


class _Calls(threading.local):
    """A thread's calls: what happened since its outermost one began."""

    is_open: bool = False
    programs: int = 0
    left: list[str]
    is_idle: bool = False

    def __init__(self) -> None:
        self.left = []


_calls = _Calls()


def watch_calls() -> None:
    """Have every context that torch.compile makes for this backend from now on watch its calls; to be called once."""
    OptimizeContext.__init__ = _with_hooks(OptimizeContext.__init__)  # type: ignore[method-assign]
    OptimizeContext.__call__ = _noting(OptimizeContext.__call__)  # type: ignore[method-assign]


def _with_hooks(init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def __init__(self: OptimizeContext, *args: Any, **keywords: Any) -> None:
        init(self, *args, **keywords)
        if is_ours(self.callback):
            # Dynamo undoes no hook that was entered before one that raises, and none after one that raises while it is undone.
            self.enter_exit_hooks.insert(0, _refuse_surroundings)
            self.enter_exit_hooks += [hide_watchers, partial(_watch, is_counted=TORCH_COUNTS and self.fullgraph)]

    return __init__


def _noting(call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def __call__(self: OptimizeContext, fn: Any) -> Any:
        if isinstance(fn, OptimizedModule | FunctionType) and is_compiled_by_us(fn) and not (is_ours(self.callback) or self.export):
            raise NotSplitError(
                "the result of torch.compile(…, backend='autoseq') is compiled again, with another backend that would replace it. Compile "
                "the model itself; to have another backend compile the code around a split model, use autoseq.parallelize(model)."
            )
        compiled = call(self, fn)
        if is_ours(self.callback) and isinstance(compiled, FunctionType):
            _compiled.add(compiled)
        return compiled

    return __call__


def is_ours(callback: Any) -> bool:
    """Whether a callback of Dynamo's, or a backend, comes down to this package's."""
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    function = getattr(callback, "compiler_fn", callback)
    return str(getattr(function, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


def is_compiled_by_us(value: object) -> bool:
    """Whether a module or a function is what torch.compile made for this backend."""
    if isinstance(value, OptimizedModule):
        return is_ours(value.dynamo_ctx.callback)
    if isinstance(value, torch.nn.Module):
        value = value.__dict__.get("_compiled_call_impl")
    return isinstance(value, FunctionType) and value in _compiled


def program_runs() -> None:
    """A program of ours is called."""
    _calls.programs += 1


def is_in_a_call() -> bool:
    """Whether this thread is in a call of what torch.compile made for this backend."""
    return _calls.is_open


def has_reached_a_program() -> bool:
    """Whether this thread's current call has come to a program of ours; before, a frame is still one that a user called."""
    return _calls.programs > 0


def frame_is_left(code: CodeType, reason: str) -> None:
    """Dynamo leaves a frame of ours uncompiled, for a reason that the caller is told if nothing of the call runs split."""
    _calls.left.append(f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno}): {reason}")


def frame_is_idle() -> None:
    """Dynamo finds that a frame of ours computes nothing."""
    _calls.is_idle = True


def _refuse_surroundings() -> Callable[[], None]:
    """What stands around a call, and would change what it computes or have Dynamo leave it, is an error before anything runs."""
    if _is_eager_wished():
        return nothing
    if peek_interpreter_stack() is not None:
        raise NotSplitError(
            "a model that autoseq splits is called inside a transform of torch.func (grad, vmap, jvp, …), which Dynamo does not trace "
            "from outside. Call the transform inside the compiled function, or use loss.backward() instead of torch.func.grad. To run the "
            "model whole, once, call it under torch.compiler.set_stance('force_eager')."
        )
    refuse_other_modes()
    return nothing


def _is_eager_wished() -> bool:
    return eval_frame._stance.stance != "default" or eval_frame._stance.backend is not None or torch._dynamo.config.disable


def _watch(*, is_counted: bool) -> Callable[[], None]:
    """Begin a call, and return its end, where a call that has come to no program is an error, if torch has not counted its frames."""
    before = _calls.programs, _calls.left, _calls.is_idle
    was_open, raised_before = _calls.is_open, sys.exception()
    _calls.is_open, _calls.programs, _calls.left, _calls.is_idle = True, 0, [], False

    def end() -> None:
        programs, left, is_idle, _calls.is_open = _calls.programs, _calls.left, _calls.is_idle, was_open
        _calls.programs, _calls.left, _calls.is_idle = before[0] + programs, before[1], before[2]
        if programs or is_idle or is_counted or sys.exception() is not raised_before or _is_eager_wished():
            return
        reasons = "".join(f"\n  {each}" for each in dict.fromkeys(left)) or (
            "\n  It had skipped the function before: for good, when another compilation of the same code failed, or when another "
            "backend met a dispatch mode or its recompile_limit. torch._dynamo.reset() makes it look again."
        )
        raise NotSplitError(f"a call of a model that autoseq splits ran whole, because Dynamo compiled nothing of it:{reasons}")

    return end
