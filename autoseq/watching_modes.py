"""Calls under a TorchDispatchMode: one that only watches (counts operators or memory) sees the split program run, others are refused.

Dynamo compiles nothing under a mode. Here the modes step aside while it traces, as they do when a program is compiled before, and so do
the hooks by which watchers follow modules: a trace that goes through them would be another program, on one rank perhaps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch._C._dynamo import guards
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.modules import module
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from autoseq.runtime.errors import NotSplitError

_WATCHERS = "torch.utils.", "torch.distributed._tools.", "torch.distributed.tensor.debug"
"""Where torch's counters of operators, messages and memory are, and what follows modules for them."""

_HOOKS = (
    module._global_forward_pre_hooks, module._global_forward_hooks, module._global_backward_pre_hooks, module._global_backward_hooks,
)  # fmt: skip


def refuse_other_modes() -> None:
    """Raises NotSplitError under a mode that might change what operators compute."""
    for mode in _get_current_dispatch_mode_stack():
        if not _only_watches(mode):
            raise NotSplitError(
                f"a model that autoseq splits is called under {type(mode).__qualname__}, a TorchDispatchMode that might change the results "
                "of operators: it would see each rank's shards, or nothing of fused kernels. If the mode only watches, define its "
                "classmethod ignore_compile_internals to return True; else leave the mode for this call. To run the model whole, once, "
                "call it under torch.compiler.set_stance('force_eager')."
            )


def _only_watches(mode: TorchDispatchMode) -> bool:
    kind = type(mode)
    return kind.is_infra_mode() or kind.ignore_compile_internals() or kind.__module__.startswith(_WATCHERS)


def refuse_fake_tensors(inputs: Sequence[object]) -> None:
    """Raises NotSplitError for a call without values, which ranks can neither compare nor send."""
    modes = _get_current_dispatch_mode_stack()
    if any(isinstance(each, FakeTensor) for each in inputs) or any(isinstance(mode, FakeTensorMode) for mode in modes):
        raise NotSplitError(
            "a model that autoseq splits is called with fake tensors, or under FakeTensorMode, and ranks have nothing to send. "
            "`autoseq inspect` and `autoseq plan` show a split model without running it; under "
            "torch.compiler.set_stance('force_eager') the model runs whole, on fake tensors too."
        )


def hide_watchers() -> Callable[[], None]:
    """Have guards and traces be what they are without a mode; returns what undoes it."""
    if not _python_dispatch._is_in_any_mode_without_ignore_compile_internals:
        return nothing
    kept = [dict(hooks) for hooks in _HOOKS]
    for hooks in _HOOKS:
        for key in [key for key, hook in hooks.items() if _is_of_a_watcher(hook)]:
            del hooks[key]
    guards.set_is_in_mode_without_ignore_compile_internals(False)

    def show() -> None:
        guards.set_is_in_mode_without_ignore_compile_internals(True)
        for hooks, before in zip(_HOOKS, kept, strict=True):
            added = {key: hook for key, hook in hooks.items() if key not in before}
            hooks.clear()
            hooks.update(before | added)

    return show


def nothing() -> None:
    """What undoes nothing."""


def _is_of_a_watcher(hook: Callable[..., object]) -> bool:
    return type(getattr(hook, "__self__", None)).__module__.startswith(_WATCHERS)
