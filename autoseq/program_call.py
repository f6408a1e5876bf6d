"""A compiled program as Dynamo calls it: what is checked and gathered before, and wrapped and watched behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from autoseq.agreement import agree_on_inputs
from autoseq.between_parts import ReadsBetweenParts
from autoseq.call_shapes import CallShapes
from autoseq.compiled_calls import program_runs
from autoseq.drift import Drift
from autoseq.given_inputs import GivenInputs
from autoseq.options import Options
from autoseq.passes.reached_memory import ReachedMemory
from autoseq.passes.shard import RunTimeSize, ShardedOutput, SizeOutput
from autoseq.program import Program
from autoseq.runtime.deferred import DeferredTensor, defer
from autoseq.runtime.errors import UnsupportedError
from autoseq.runtime.groups import SequenceGroup
from autoseq.runtime.kept_memory import Kept, refuse_late_writes
from autoseq.runtime.layout import Layout
from autoseq.runtime.messages import connect
from autoseq.second_derivatives import refuse_second_derivatives
from autoseq.watching_modes import refuse_fake_tensors


class ProgramCall:
    """The compiled program as Dynamo calls it: checks the first inputs, gathers deferred ones, wraps sharded outputs."""

    def __init__(
        self, compiled: Callable[..., Any], program: Program, names: Sequence[str], group: SequenceGroup, options: Options,
        shapes: CallShapes, called: Callable[[Sequence[object]], None], check: GivenInputs, memory: ReachedMemory,
    ) -> None:  # fmt: skip
        self._compiled, self._names, self._group, self._options = compiled, names, group, options
        self._outputs = program.sharding.outputs
        self._layout: Layout = program.plan.layout
        self._floats, self._contents = program.floats, program.contents
        self._versions: dict[int, tuple[int, int]] = {}
        sizes = [size for out in self._outputs for size in (*out.shape, out.outer, out.length, out.local)]
        self._size_outputs = {size.index for size in sizes if isinstance(size, SizeOutput)}
        self._agreed, self._shapes, self._called, self._check, self._memory = False, shapes, called, check, memory
        self._drift, self._reads = Drift(group, strict=options.strict), ReadsBetweenParts(program, options, group)

    def __call__(self, *args: Any) -> Any:
        program_runs()
        if self._group.size > 1:
            refuse_fake_tensors(args)
        taken = [(x, x.writes_of_a_part()) for x in args if isinstance(x, DeferredTensor)]
        results: list[Any] = []
        try:
            given, args = args, tuple(x.taken_in() if isinstance(x, DeferredTensor) else x for x in args)
            self._compare(given, args)
            results += self._compiled(*args)
        finally:
            for x, is_written in taken:
                x.given_back(is_written(), results)
        for x, _ in taken:
            x.check_aliases()
        self._called(results)
        if self._options.inner != "eager":
            refuse_second_derivatives(results, self._options.inner)
        shards = {out.index: results[out.index] for out in self._outputs}
        wrapped = [(out.index, self._wrap(out, results)) for out in self._outputs]
        for index, value in wrapped:
            results[index] = value
        self._check.watch(shards, results)
        self._watch_memory(given, shards, results)
        return [r for i, r in enumerate(results) if i not in self._size_outputs]

    def _compare(self, given: Sequence[Any], args: Sequence[Any]) -> None:
        """What the program is given, with other ranks' and with what it was compiled for."""
        self._shapes.agree(args)
        if not self._agreed:
            agree_on_inputs(self._group, self._names, args, draws=self._check.draws)
            self._check.agreed(args)
            connect(self._group, args)
            self._agreed = True
        self._drift.look(args)
        self._check_floats(args)
        self._check_contents(args)
        self._check.take(given, args)

    def _watch_memory(self, given: Sequence[Any], shards: Mapping[int, torch.Tensor], results: Sequence[Any]) -> None:
        """Writes from now on are refused where one device's would reach other tensors, or what the backward keeps."""
        for each in self._memory.overlaps:
            output, other = results[each.output], (given if each.is_input else results)[each.other]
            name = self._names[each.other] if each.is_input else _name(other, each.other)
            if isinstance(output, DeferredTensor):
                output.share_memory_with(other, name)
            elif isinstance(other, DeferredTensor):
                other.share_memory_with(output, _name(output, each.output))
        self._refuse_late_writes(given, [shards.get(i, result) for i, result in enumerate(results)], results)

    def _refuse_late_writes(self, given: Sequence[Any], compiled: Sequence[Any], results: Sequence[Any]) -> None:
        reached = self._memory
        if not (reached.kept_inputs or reached.kept_outputs) or not torch.is_grad_enabled():
            return
        nodes = {result.grad_fn for result in compiled if isinstance(result, torch.Tensor)} - {None}
        if not nodes:
            return
        inputs = [(self._names[i], given[i], keeper) for i, keeper in reached.kept_inputs.items() if isinstance(given[i], DeferredTensor)]
        outputs = [(_name(results[i], i), results[i], keeper) for i, keeper in reached.kept_outputs.items()]
        refuse_late_writes(nodes, [Kept.of(value, name, keeper) for name, value, keeper in (*inputs, *outputs)])

    def _check_floats(self, args: Sequence[Any]) -> None:
        for index, assumed in self._floats.items():
            if args[index].item() != assumed:
                raise UnsupportedError(
                    f"the program was compiled for {self._names[index]} = {assumed:g} and is called with {args[index].item():g}. With "
                    "dynamic=True Dynamo makes Python floats inputs; leave dynamic unset, or torch._dynamo.reset() and compile again."
                )

    def _check_contents(self, args: Sequence[Any]) -> None:
        """A buffer that was read as a mask is still what it was. On a GPU it is looked at again only after torch wrote to it."""
        for index, content in self._contents.items():
            version = (id(args[index]), args[index]._version)
            looked_at = content.device.type != "cpu" and self._versions.get(index) == version
            if not looked_at and not torch.equal(args[index], content):
                raise UnsupportedError(
                    f"the buffer {self._names[index]} was read as a mask when the program was compiled, and holds other values now. "
                    "Call torch._dynamo.reset() after changing it, or pass the mask as an input."
                )
            self._versions[index] = version

    def _wrap(self, out: ShardedOutput, results: Sequence[Any]) -> torch.Tensor:
        def size(of: RunTimeSize) -> int:
            return int(results[of.index]) if isinstance(of, SizeOutput) else of

        name = f"{out.name} ({out.source})"
        deferred = defer(
            results[out.index], name=name, shape=tuple(map(size, out.shape)), dim=out.dim, outer=size(out.outer),
            length=size(out.length), local_length=size(out.local), layout=self._layout, group=self._group.name,
            watch=self._check.output(name, self._reads.note),
        )  # fmt: skip
        return deferred.local if self._options.outputs == "local" else deferred


def _name(output: Any, number: int) -> str:
    return output.name if isinstance(output, DeferredTensor) else f"output {number}"
