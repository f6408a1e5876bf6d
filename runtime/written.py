"""`written(old, new)`: the value of `new` with the history of `old`, which is what a tensor is after a write that autograd does not see.

The operator is composite: tracing before autograd keeps it whole, and AOTAutograd opens it. Its gradient goes to `old` unchanged.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

_LIBRARY = torch.library.Library("autoseq", "FRAGMENT")
_LIBRARY.define("written(Tensor old, Tensor new) -> Tensor")


class _Written(Function):
    @staticmethod
    def forward(ctx: Any, old: Tensor, new: Tensor) -> Tensor:
        return new.view_as(new)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


def _written(old: Tensor, new: Tensor) -> Tensor:
    return _Written.apply(old, new.detach()) if old.requires_grad and torch.is_grad_enabled() else new.detach()


_LIBRARY.impl("written", _written, "CompositeImplicitAutograd")
WRITTEN = torch.ops.autoseq.written.default
