"""What torch.compile was given, and all the programs that this backend has made of it in this process: what notices and reports are about.

A model that Dynamo traces in parts has several programs, and one more for each other length or mode; they belong together because the same
call of the compiled model is on the stack wherever one of them is compiled.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import nn

from autoseq.program import Program


@dataclass(slots=True)
class Compiled:
    """One program, whether it is a part of a model that Dynamo traced in several, and how often it was called."""

    program: Program
    is_part: bool
    calls: int = 0


@dataclass(slots=True, eq=False, weakref_slot=True)
class CompiledModel:
    """The programs of one model or function, in the order in which they were compiled."""

    name: str
    programs: list[Compiled] = field(default_factory=list)


_models: weakref.WeakKeyDictionary[Any, CompiledModel] = weakref.WeakKeyDictionary()
_nameless = CompiledModel("the compiled function")


def model_being_compiled() -> CompiledModel:
    """The one whose call is on this thread's stack."""
    target = None
    for frame in _frames():
        if frame.f_code.co_name in ("compile_wrapper", "_fn") and _file(frame).endswith("torch/_dynamo/eval_frame.py"):
            target = frame.f_locals.get("fn", target)  # the outermost is the last
    return _nameless if target is None else model_of(target)


def model_of(compiled: Any) -> CompiledModel:
    """The record of a module or a function, made where there is none yet."""
    target = unwrapped(compiled)
    name = type(target).__name__ if isinstance(target, nn.Module) else getattr(target, "__name__", type(target).__name__)
    try:
        return _models.setdefault(target, CompiledModel(name))
    except TypeError:  # an object of the user's that cannot be referred to weakly
        return _nameless


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


def known_models() -> list[tuple[Any, CompiledModel]]:
    """All that have been compiled and are still there."""
    return list(_models.items())


def compilation_began_s() -> float:
    """When Dynamo began with the frame that it now compiles, by `time.time`; now, if it does not say."""
    for frame in _frames():
        if frame.f_code.co_name == "_compile" and _file(frame).endswith("torch/_dynamo/convert_frame.py"):
            began_ns = frame.f_locals.get("start_time_ns")
            return began_ns / 1e9 if isinstance(began_ns, int) else time.time()
    return time.time()


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename.replace("\\", "/")
