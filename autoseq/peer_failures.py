"""Compiled graphs whose collectives fail with an error that says which group, operation and line, in forward and backward.

A collective inside a compiled graph is torch's own, so when a peer dies torch raises a bare RuntimeError with an address in it.
The forward could be caught where Dynamo calls the compiled function, but the backward is called by autograd; so what is wrapped
is each graph as it leaves its compiler.
"""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Callable
from typing import Any

from autoseq.runtime.groups import SequenceGroup
from autoseq.runtime.messages import failed_collective

Compiler = Callable[..., Any]


def name_failures(compiler: Compiler, group: SequenceGroup) -> Compiler:
    """`compiler`, whose graphs raise MessageError when a collective fails."""

    def compile_named(*args: Any, **kwargs: Any) -> Any:
        compiled = compiler(*args, **kwargs)
        if group.size == 1:
            return compiled
        if not hasattr(compiled, "current_callable"):
            return _named(compiled, group)
        # Inductor's: torch looks into this object and sets it up further, so it stays what it is.
        compiled.current_callable = _named(compiled.current_callable, group)
        return compiled

    return compile_named


def _named(run: Callable[[Any], Any], group: SequenceGroup) -> Callable[[Any], Any]:
    def call(args: Any) -> Any:
        try:
            return run(args)
        except RuntimeError as error:
            named = failed_collective(error, _collective(error), group)
            if named is None:
                raise
            raise named from error

    call._boxed_call = True  # type: ignore[attr-defined] (the arguments come in one list, which the graph empties)
    return call


def _collective(error: RuntimeError) -> str:
    """The collective that the graph posted or waited for, from the line of generated code where it failed."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        called = re.search(r"_c10d_functional\.(\w+?)_?\.default\((\w+)", frame.line or "")
        if called and called[1] != "wait_tensor":
            return called[1]
        if called:
            lines = linecache.getlines(frame.filename)[: (frame.lineno or 1) - 1]
            return next(filter(None, (_posted(line, called[2]) for line in reversed(lines))), "a collective")
    return "a collective"


def _posted(line: str, buffer: str) -> str | None:
    """The collective that a line of generated code posts into `buffer`, which it makes or reduces in place."""
    made = re.search(rf"\b{buffer} = torch\.ops\._c10d_functional\.(\w+?)_?\.default|_functional\.(\w+?)_?\.default\({buffer}\b", line)
    return None if made is None else made[1] or made[2]
