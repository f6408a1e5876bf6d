"""`plain.data = output`: a plain tensor whose `.data` is set to a deferred output receives the memory of the whole value.

torch would copy the wrapper's own fields, which have no memory, into the plain tensor, and the next operation on it would end the
process. The setter calls neither `__torch_function__` nor `__torch_dispatch__` of the value, so `torch.Tensor` gets a `__setattr__`.
Dynamo compiles no frame of this name, while it would see another descriptor in place of `torch.Tensor.data`.
"""

from typing import Any

from torch import Tensor

from autoseq.runtime.deferred import DeferredTensor

_set_attribute = object.__setattr__


def give_whole_data() -> None:
    """Have `torch.Tensor` do so; further calls change nothing."""
    Tensor.__setattr__ = __setattr__  # type: ignore[method-assign, assignment]


def __setattr__(self: Tensor, name: str, value: Any) -> None:
    if name == "data" and isinstance(value, DeferredTensor) and not isinstance(self, DeferredTensor):
        value = value.given_away()
    _set_attribute(self, name, value)
