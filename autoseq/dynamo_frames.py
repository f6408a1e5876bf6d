"""Frames that Dynamo hands to this backend: each is compiled, left for a reason that is in its code, or an error by name.

Dynamo by itself leaves a frame for good, in eager mode and without a word, for reasons that lie in one call only: a TorchDispatchMode
around it, a branch without tensor operations, `config.disable`; past `recompile_limit`; and under `suppress_errors` after any error.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, _FrameAction, _FrameExecStrategy
from torch._dynamo import config, decorators
from torch._dynamo.convert_frame import CatchErrorsWrapper, _get_error_on_graph_break
from torch._dynamo.exc import FailOnRecompileLimitHit, InternalTorchDynamoError
from torch._dynamo.guards import get_guard_fail_reason
from torch._dynamo.types import ConvertFrameReturn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import _disable_current_modes

from autoseq.compiled_calls import TORCH_COUNTS, frame_is_idle, frame_is_left, has_reached_a_program, is_ours
from autoseq.runtime.errors import AutoSeqError, NotSplitError

_compilations: WeakKeyDictionary[torch.nn.Module, Counter[CodeType]] = WeakKeyDictionary()
"""How often the code of a frame was compiled for one module; blocks of one class share the code, and each may need its own graph."""

_no_module = torch.nn.Module()


def keep_frames() -> None:
    """Have Dynamo treat frames of this backend so; to be called once."""
    CatchErrorsWrapper.__call__ = _for_ours(CatchErrorsWrapper.__call__)  # type: ignore[method-assign]


def _for_ours(convert: Callable[..., ConvertFrameReturn]) -> Callable[..., ConvertFrameReturn]:
    @wraps(convert)
    def __call__(self: CatchErrorsWrapper, frame: Any, cache_entry: Any, frame_state: Any) -> ConvertFrameReturn:
        if not is_ours(self):
            return convert(self, frame, cache_entry, frame_state)
        if sys._getframe(1).f_code is decorators._nonrecursive_disable_wrapper_code:
            # Dynamo looks for this caller itself, but only just behind frames of its own, of which this one is none.
            return ConvertFrameReturn(apply_to_code=False)
        compiled = _compilations_for(frame)
        if compiled[frame.f_code] >= config.recompile_limit:
            raise _limit_reached(frame, f"recompile_limit ({config.recompile_limit})")
        completed = counters["frames"]["ok"]
        try:
            with _disable_current_modes(), config.patch(_settings()):
                result = convert(self, frame, cache_entry, frame_state)
        except FailOnRecompileLimitHit as error:
            raise _limit_reached(frame, "a limit of Dynamo's configuration or of torch.compile") from error
        except InternalTorchDynamoError as error:
            if isinstance(error.__context__, AutoSeqError):  # of a deferred output whose values Dynamo asked for while it traced
                raise error.__context__ from None
            raise
        if result.guarded_code is None:
            return _left(frame, result, is_complete=counters["frames"]["ok"] > completed)
        if _traces_all_or_raises(self) and _computes_nothing(result.guarded_code.code):
            frame_is_idle()
            return _AS_IT_IS
        compiled[frame.f_code] += 1
        return result

    return __call__


def _settings() -> dict[str, Any]:
    """Dynamo's, while it converts a frame of ours: errors reach the caller, DDP's buckets split no program, and blocks of one class that
    need a graph each do not share one limit."""
    settings = {
        "suppress_errors": False, "fail_on_recompile_limit_hit": True, "recompile_limit": config.accumulated_recompile_limit,
    }  # fmt: skip
    return settings | ({"optimize_ddp": False} if config.optimize_ddp in (True, "ddp_optimizer") else {})


def _compilations_for(frame: Any) -> Counter[CodeType]:
    """Of each code for the module that this frame belongs to; anew after torch._dynamo.reset()."""
    values = frame.f_locals.values()
    first_arguments = (each for value in values if isinstance(value, tuple) for each in value[:1])  # a decorator's *args
    owner = next((value for value in (*values, *first_arguments) if isinstance(value, torch.nn.Module)), _no_module)
    counted = _compilations.setdefault(owner, Counter())
    if not _debug_get_cache_entry_list(frame.f_code):
        del counted[frame.f_code]
    return counted


_AS_IT_IS = ConvertFrameReturn(frame_exec_strategy=_FrameExecStrategy(_FrameAction.DEFAULT, _FrameAction.DEFAULT), apply_to_code=False)
"""This call of a frame runs as it is written; Dynamo sees the next one again."""


def _traces_all_or_raises(convert: CatchErrorsWrapper) -> bool:
    """Whether a graph break is an error here, and torch itself does not count the calls of compiled frames."""
    is_full_graph = getattr(convert._torchdynamo_orig_backend, "_one_graph", False)
    return not TORCH_COUNTS if is_full_graph else _get_error_on_graph_break()


def _computes_nothing(code: CodeType) -> bool:
    """Whether what Dynamo made of a whole frame calls no program. Kept, nothing would tell of its later calls."""
    return not any(name.startswith("__compiled_fn") for name in code.co_names)


def _limit_reached(frame: Any, limit: str) -> NotSplitError:
    code = frame.f_code
    entries = _debug_get_cache_entry_list(code)
    reasons = (get_guard_fail_reason(each.guard_manager, code, frame.f_locals, each.compile_id, None, True) for each in entries)  # pyright: ignore[reportArgumentType]
    # "0/7: scale == 'b'      # return x * len(scale)  # model.py:6 in forward", and a stack behind it
    reason = next(filter(None, reasons), "")
    failed = reason.partition("\n")[0].partition("  #")[0].partition(": ")[2].strip()
    last = f" The last program serves only where {failed}." if failed else ""
    return NotSplitError(
        f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno}) was compiled as often as {limit} allows, and would run whole from "
        f"now on.{last} Keep that value the same in each call, or make it a tensor; if it is an int attribute of a module, "
        "torch._dynamo.config.allow_unspec_int_on_nn_module = True serves all its values with one program. If that many programs are "
        "intended, raise torch._dynamo.config.recompile_limit (accumulated_recompile_limit for all modules of a class)."
    )


def _left(frame: Any, result: ConvertFrameReturn, *, is_complete: bool) -> ConvertFrameReturn:
    """A frame that Dynamo compiled nothing for. `is_complete`: it came to an end, so what it found may be another in the next call."""
    if is_complete and not config.disable:
        frame_is_idle()
    else:
        frame_is_left(frame.f_code, getattr(result, "skip_reason", None) or "Dynamo does not say why")
    if has_reached_a_program() or not (is_complete or config.disable):
        return result  # code between or after the programs, or code that Dynamo cannot trace: it would try again in each call
    return _AS_IT_IS
