"""How often an optimizer of a compiled program's parameters has stepped in this process: a rank that skips or repeats a step differs."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

_parameters: WeakIdKeyDictionary = WeakIdKeyDictionary()
_optimizers: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
_steps = 0
_is_counting = False
_HOOKED_IN = Optimizer.profile_hook_step.__code__.co_filename  # a step's hooks run in a function `wrapper` of it


def count() -> int:
    """Steps so far of optimizers that have one of the parameters."""
    return _steps


def count_steps_of(parameters: Sequence[Tensor]) -> None:
    """From now on, count the steps of an optimizer that has one of these."""
    global _is_counting
    if not _is_counting:
        register_optimizer_step_post_hook(_count_step)
        _is_counting = True
    for parameter in parameters:
        _parameters[parameter] = True


def _count_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _steps
    if is_nested():
        return
    # An optimizer that has none of them is looked at again when there are more of them.
    if _optimizers.get(optimizer, 0) != -1 and _optimizers.get(optimizer, 0) < len(_parameters):
        has_one = any(parameter in _parameters for group in optimizer.param_groups for parameter in group["params"])
        _optimizers[optimizer] = -1 if has_one else len(_parameters)
    _steps += _optimizers.get(optimizer, 0) == -1


def is_nested() -> bool:
    """Whether the running step is a part of another's: ranks may split an optimizer differently, such as ZeroRedundancyOptimizer.

    The stack of calls says it also after a step that raised, which torch's hooks do not hear of.
    """
    frame, steps = sys._getframe(), 0
    while frame is not None and steps < 2:
        code, frame = frame.f_code, frame.f_back
        steps += code.co_name == "wrapper" and code.co_filename == _HOOKED_IN
    return steps > 1
