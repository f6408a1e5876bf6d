"""Memory that the backward of one call keeps and that its caller can write to.

    y = model(x)                     # an output that the backward keeps, as attention does
    y.data.mul_(2)                   # on one device the backward computes with the new values; here it keeps other memory
    y.sum().backward()               # refused by name, before any gradient of the call is computed

A write under `no_grad`, which one device's autograd refuses by itself, is refused here too. No version counter tells of a write through
`.data`, so values are compared: those of a gathered output with the rank's own rows, those of a plain one with a hash of what they were.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from autoseq.runtime.deferred import DeferredTensor
from autoseq.runtime.errors import UnsupportedError
from autoseq.runtime.fingerprint import exact_bits


class KeptMemory:
    """What one call keeps: inputs and outputs, each with the source line that keeps it."""

    def __init__(self, results: Iterable[Any]) -> None:
        """`results` are what the compiled program returned: with their backward, the call's begins."""
        self._nodes = {result.grad_fn for result in results if isinstance(result, Tensor) and result.grad_fn is not None}
        self._kept: list[tuple[Callable[[], bool], str, str]] = []

    def keep(self, name: str, value: Tensor, keeper: str) -> None:
        """`value`, an input or a result, is kept by `keeper`. Raises UnsupportedError in the backward if it is written to until then."""
        if not self._nodes:
            return
        if not self._kept:
            for node in self._nodes:
                node.register_prehook(self._refuse_written)
        with torch.no_grad():
            self._kept.append((value.watch_memory() if isinstance(value, DeferredTensor) else _watch(value.detach()), name, keeper))

    def _refuse_written(self, _: Sequence[Tensor | None]) -> None:
        with torch.no_grad():
            for is_written, name, keeper in self._kept:
                if is_written():
                    raise UnsupportedError(
                        f"{name} is kept for the backward of {keeper}, and was written to since. One device would compute that backward "
                        "with the new values, or refuse. Write to a clone of it (y = y.clone()), or after the backward."
                    )


def _watch(value: Tensor) -> Callable[[], bool]:
    before = exact_bits(value)
    return lambda: exact_bits(value) != before
