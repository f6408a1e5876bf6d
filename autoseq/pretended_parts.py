"""A model that Dynamo traces in several parts, looked at without other ranks: what one part hands to the next as a shard.

On ranks a sharded output is a `DeferredTensor`, which gathers itself when a later part, or Python between the parts, needs its values.
Here it is one too, of the whole value, which is there already; what a gather would send is noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Function

from autoseq.passes.shard import ShardedOutput
from autoseq.passes.sizes import num_bytes
from autoseq.program import Gathered, Program
from autoseq.runtime.deferred import DeferredTensor
from autoseq.runtime.layout import local_length


@dataclass(slots=True)
class _PretendedShard:
    """What a `DeferredTensor` asks of its shard."""

    name: str
    value: Tensor
    padded: Tensor
    gathered: Gathered  # what is gathered where somebody needs the values
    is_gathered: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    def full(self) -> Tensor:
        self.is_gathered = True
        return self.value


class _Defer(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, shard: Any) -> DeferredTensor:
        return DeferredTensor.wrap(shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class PretendedPart:
    """A part of a model as Dynamo calls it: runs whole, and hands on as shards what its program gives back as shards."""

    def __init__(self, gm: fx.GraphModule, program: Program, world_size: int) -> None:
        self._gm, self._program, self._P = gm, program, world_size
        self._shards: list[_PretendedShard] = []

    def __call__(self, *args: Any) -> Sequence[Any]:
        results = list(self._gm(*(x.full() if isinstance(x, DeferredTensor) else x for x in args)))
        for out in self._program.sharding.outputs:
            results[out.index] = self._defer(results[out.index], out)
        return results

    @property
    def gathered(self) -> tuple[Gathered, ...]:
        """The outputs that something after this part needed whole, each once even if the part was called for several layers."""
        return tuple({shard.gathered.output: shard.gathered for shard in self._shards if shard.is_gathered}.values())

    def _defer(self, value: Tensor, out: ShardedOutput) -> Tensor:
        length = out.length if isinstance(out.length, int) else value.shape[out.dim]
        local = out.local if isinstance(out.local, int) else local_length(length, self._P, self._program.plan.layout)
        padded = torch.empty(value.numel() // length * local, dtype=value.dtype, device="meta")
        sizes = Gathered(out.index, num_bytes(padded), num_bytes(value))
        self._shards.append(_PretendedShard(f"{out.name} ({out.source})", value.detach(), padded, sizes))
        return _Defer.apply(value, self._shards[-1])
