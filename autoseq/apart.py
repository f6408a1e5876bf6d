"""A context for work that is no part of the user's program, beside which it runs."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes


class apart:
    """For work that is no part of the user's program: no gradients, no autocast, and no mode that watches operations.

    A context that is entered twice a step: contextlib's would take as long as what it is for.
    """

    __slots__ = ("_autocast", "_grad", "_modes")

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        self._autocast = torch._C._DisableAutocast()
        self._autocast.__enter__()
        self._modes = _disable_current_modes() if torch._C._len_torch_dispatch_stack() else None
        if self._modes is not None:
            self._modes.__enter__()

    def __exit__(self, *raised: object) -> None:
        if self._modes is not None:
            self._modes.__exit__(*raised)  # type: ignore[arg-type]
        self._autocast.__exit__(*raised)
        torch._C._set_grad_enabled(self._grad)
