"""What the stack says while Dynamo compiles a frame: whose call of torch.compile it is, which part of it, and since when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, Literal

from torch import fx

from autoseq.call_stack import frames
from autoseq.compiled_calls import is_ours
from autoseq.runtime.deferred import DeferredTensor

Part = Literal["whole", "first", "later"]
"""Where a program stands in its model, of which Dynamo may trace several parts."""

_PASSED_OVER = (
    "torch/_dynamo/", "torch/_inductor/", "torch/_functorch/", "torch/_compile.py", "torch/_utils_internal.py", "torch/utils/_",
    "torch/_logging", "torch/_subclasses", "torch/__init__.py", "torch/nn/modules/module.py", "contextlib.py", "autoseq/dynamo_frames.py",
)  # fmt: skip
"""Files whose frames lie between the frame that is compiled and the one that called it."""


def part_of(gm: fx.GraphModule, inputs: Sequence[object]) -> Part:
    """Which part of its program the graph is that Dynamo has just traced."""
    if not _called_by_a_user():
        return "later"
    reason = getattr(gm, "compile_subgraph_reason", None)
    is_broken = reason is not None and reason.graph_break
    return "first" if is_broken or any(isinstance(x, DeferredTensor) for x in inputs) else "whole"


def outermost_call() -> Any:
    """What was given to torch.compile, with this package as its backend, by the outermost call on this thread's stack; None without one."""
    target = None
    for frame in frames():
        if _is_compiled_call(frame) and is_ours(frame.f_locals["self"].callback):
            target = frame.f_locals["fn"]
    return target


def compilation_began_s() -> float:
    """When Dynamo began with the frame that it now compiles, by `time.time`; now, if it does not say."""
    for frame in frames():
        if frame.f_code.co_name == "_compile" and _file(frame).endswith("torch/_dynamo/convert_frame.py"):
            began_ns = frame.f_locals.get("start_time_ns")
            return began_ns / 1e9 if isinstance(began_ns, int) else time.time()
    return time.time()


def _called_by_a_user() -> bool:
    """Whether the frame being compiled is the one that was given to torch.compile: its caller is Dynamo's own wrapper."""
    is_behind_callback = False
    for frame in frames():
        if _is_compiled_call(frame):
            return True
        is_behind_callback = is_behind_callback or "torch/_dynamo/convert_frame.py" in _file(frame)
        if is_behind_callback and not any(part in _file(frame) for part in _PASSED_OVER):
            return False
    return False


def _is_compiled_call(frame: FrameType) -> bool:
    """Whether it is the wrapper that torch.compile puts around what it is given."""
    return frame.f_code.co_name == "compile_wrapper" and _file(frame).endswith("torch/_dynamo/eval_frame.py")


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename.replace("\\", "/")
