"""Memory that the backward of one call keeps and that its caller can write to.

    y = model(x)                     # an output that the backward keeps, as attention does
    y.data.mul_(2)                   # on one device the backward computes with the new values; here it keeps other memory
    y.sum().backward()               # refused by name, before any gradient of the call is computed

A write under `no_grad`, which one device's autograd refuses by itself, is refused here too. No version counter tells of a write through
`.data`: a gathered output says whether it was written to (`whole_value`), a plain one is compared by a hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoseq.runtime.deferred import DeferredTensor
from autoseq.runtime.errors import UnsupportedError
from autoseq.runtime.fingerprint import hash_bits, same_hash


@dataclass(frozen=True, slots=True)
class Kept:
    """An input or output that is kept from now on, by a source line of the model."""

    name: str
    keeper: str
    is_written: Callable[[], bool]

    @staticmethod
    def of(value: Tensor, name: str, keeper: str) -> Kept:
        return Kept(name, keeper, value.watch() if isinstance(value, DeferredTensor) else _watch(value.detach()))


def refuse_late_writes(nodes: Iterable[Any], kept: Sequence[Kept]) -> None:
    """Have the backward that begins at `nodes` raise UnsupportedError if something of `kept` is written to until then."""
    asked_in = -1

    def refuse(_: Sequence[Tensor | None]) -> None:
        nonlocal asked_in
        if asked_in == torch._C._current_graph_task_id():
            return
        asked_in = torch._C._current_graph_task_id()
        with torch.no_grad():
            written = next((each for each in kept if each.is_written()), None)
        if written is not None:
            raise UnsupportedError(
                f"{written.name} is kept for the backward of {written.keeper}, and was written to since. One device would compute that "
                "backward with the new values, or refuse. Write to a clone of it (y = y.clone()), or after the backward."
            )

    for node in nodes:
        node.register_prehook(refuse)


def _watch(value: Tensor) -> Callable[[], bool]:
    before = hash_bits(value)
    return lambda: not same_hash(before, hash_bits(value))
