"""A model that Dynamo traces in several parts, looked at without other ranks: the calls of the parts, and what one hands to the next.

On ranks a sharded output is a `DeferredTensor`, which gathers itself when a later part, or Python between the parts, needs its values.
Here it is one too, of the whole value, which is there already; what a gather would send is noted. Layers of one class share the
compiled code of their parts, so a part may be called several times, each time with other parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Function

from autoseq.between_parts import ReadsBetweenParts
from autoseq.compiled_calls import program_runs
from autoseq.passes.shard import ShardedOutput
from autoseq.passes.sizes import hint, num_bytes
from autoseq.passes.source import first_source
from autoseq.program import Gathered, Program
from autoseq.runtime.deferred import DeferredTensor
from autoseq.runtime.layout import local_length
from autoseq.runtime.whole_value import WholeValue

log = logging.getLogger("autoseq")


@dataclass(slots=True)
class _PretendedShard:
    """What a `DeferredTensor` asks of its shard."""

    name: str
    value: Tensor
    padded: Tensor
    made: Gathered
    sent_bytes: int
    reads: ReadsBetweenParts
    is_gathered: bool = False
    is_taken_in: bool = False
    watch: None = None
    whole: WholeValue = field(default_factory=lambda: WholeValue(""))  # what is written is not looked at

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    def before_read(self) -> None:
        if not (self.is_gathered or self.is_taken_in):
            self.reads.note(self.name, self.sent_bytes)

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


class PretendedCall:
    """One call of a program: the parameters it was given, and what it handed on as shards."""

    def __init__(self, program: Program, args: Sequence[object]) -> None:
        self._program, self._owned = program, program.owned_among(args)
        self.shards: list[_PretendedShard] = []

    @property
    def program(self) -> Program:
        """With what is gathered of it, which is known once the model has run."""
        gathered = tuple(shard.made for shard in self.shards if shard.is_gathered)
        return replace(self._program, owned=self._owned, gathered=gathered)


class PretendedPart:
    """A part of a model as Dynamo calls it: runs whole, and hands on as shards what its program gives back as shards."""

    def __init__(
        self, gm: fx.GraphModule, program: Program, world_size: int, reads: ReadsBetweenParts, note: Callable[[PretendedCall], None]
    ) -> None:  # fmt: skip
        self._gm, self._program, self._P, self._reads, self._note = gm, program, world_size, reads, note
        self._sizes = _sizes(program.inputs)
        self._is_told = False

    def __call__(self, *args: Any) -> Sequence[Any]:
        program_runs()
        call = PretendedCall(self._program, args)
        self._note(call)
        self._tell_other_sizes(args)
        results = list(self._gm(*(x.taken_in() if isinstance(x, DeferredTensor) else x for x in args)))
        for out in self._program.sharding.outputs:
            shard = self._shard(results[out.index], out)
            call.shards.append(shard)
            results[out.index] = _Defer.apply(results[out.index], shard)
        return results

    def _shard(self, value: Tensor, out: ShardedOutput) -> _PretendedShard:
        length = out.length if isinstance(out.length, int) else value.shape[out.dim]
        local = out.local if isinstance(out.local, int) else local_length(length, self._P, self._program.plan.layout)
        padded = torch.empty(value.numel() // length * local, dtype=value.dtype, device="meta")
        made = Gathered(out.index, num_bytes(padded), num_bytes(value))
        sent = (self._P - 1) * made.shard_bytes
        return _PretendedShard(f"{out.name} ({out.source})", value.detach(), padded, made, sent, self._reads)

    def _tell_other_sizes(self, args: Sequence[Any]) -> None:
        """Compiled code with symbolic sizes serves others too, but is counted with those that it was traced with."""
        sizes = _sizes(args)
        if sizes != self._sizes and not self._is_told:
            self._is_told = True
            mine, other = next((mine, other) for mine, other in zip(self._sizes, sizes, strict=True) if mine != other)
            where = first_source(self._program.before)
            log.warning(
                "the part of the model that begins at %s is called with other sizes too (%s, traced with %s); these calls are counted "
                "with the sizes that were traced", where, other, mine,
            )  # fmt: skip


def _sizes(values: Sequence[object]) -> list[object]:
    """The shapes of tensors and the numbers among the inputs of a program, without symbols."""
    sizes: list[object] = []
    for x in values:
        if isinstance(x, Tensor):
            sizes.append([hint(size) for size in x.shape])
        elif isinstance(x, (int, torch.SymInt)):
            sizes.append(hint(x))
    return sizes
