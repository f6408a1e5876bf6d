"""The torch.compile backend, found by its name through the `torch_dynamo_backends` entry point.

It rewrites the graph (`program`), has the ranks agree on it, compiles it with Inductor or runs it eagerly behind
AOTAutograd, and wraps the outputs that are shards.
"""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from autoseq.agreement import agree_on_inputs, agree_on_program, agree_on_topology
from autoseq.call_shapes import CallShapes
from autoseq.compiled_calls import program_runs, watch_calls
from autoseq.drift import Drift
from autoseq.dynamo_frames import keep_frames
from autoseq.foreign_programs import stay_apart
from autoseq.given_inputs import GivenInputs, Part
from autoseq.notices import show_by_default
from autoseq.options import Options, parse_options
from autoseq.passes.canonical_order import sort_signature
from autoseq.passes.shard import RunTimeSize, ShardedOutput, SizeOutput
from autoseq.passes.source import input_name, is_buffer
from autoseq.passes.tidy import leave_gradients_unsummed
from autoseq.passes.traceable_masks import let_masks_through
from autoseq.peer_failures import name_failures
from autoseq.planning.topology import Topology
from autoseq.program import Program, build_program, mark_trainable, topology_of
from autoseq.progress import Progress, progress_of
from autoseq.random_state import drawing_devices
from autoseq.runtime.deferred import DeferredTensor, defer
from autoseq.runtime.errors import AutoSeqError, TopologyError, UnsupportedError
from autoseq.runtime.groups import SequenceGroup, group_from_mesh
from autoseq.runtime.layout import Layout
from autoseq.runtime.messages import connect
from autoseq.runtime.nodes import on_nodes
from autoseq.second_derivatives import refuse_second_derivatives
from autoseq.structured_trace import trace_program
from autoseq.views_of_outputs import describe_views_of_outputs
from autoseq.watching_modes import refuse_fake_tensors
from autoseq.whole_program import copied

log = logging.getLogger("autoseq")

let_masks_through()
describe_views_of_outputs()
show_by_default()
watch_calls()
keep_frames()
stay_apart()


def autoseq(gm: fx.GraphModule, inputs: Sequence[object], *, options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Compile one Dynamo graph with its sequence split over ranks; see `Options` for `options`.

    An error is raised when the compiled function is called, so that it reaches the caller as itself: Dynamo would wrap an
    exception of a backend, and answer some by running the model unsplit.
    """
    try:
        chosen = told_options(options)
        group = group_from_mesh(chosen.mesh)
        progress = progress_of(group, chosen)
        with progress.compiling():
            with progress.waiting():
                found = agree_on_topology(group, lambda: topology_of(chosen, group)) if chosen.topology is None else None
                group = _on_nodes(group, chosen)
            return _compile(gm, inputs, chosen, group, found, progress)
    except AutoSeqError as error:
        return _raiser(error)


def told_options(given: Mapping[str, Any] | None) -> Options:
    """The options. A topology's file may be missing on this rank's machine only, so the other ranks are told, where they can be."""
    try:
        return parse_options(given)
    except TopologyError as error:
        try:
            agree_on_program(group_from_mesh((given or {}).get("mesh")), [], error)
        except AutoSeqError as untold:  # the caller sees its own mistake
            log.debug("the other ranks were not told of a mistake in the options: %s", untold)
        raise


def _on_nodes(group: SequenceGroup, options: Options) -> SequenceGroup:
    """The ranks that share the sequence. The first program that wants nodes has all ranks agree on them and make their groups."""
    ranks_per_node = options.ranks_per_node
    return on_nodes(group, ranks_per_node, agree=lambda: agree_on_program(group, [f"ranks_per_node={ranks_per_node}"], None))


def _raiser(error: AutoSeqError) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


def _compile(
    gm: fx.GraphModule, inputs: Sequence[object], options: Options, group: SequenceGroup, found: Topology | None, progress: Progress,
    is_sorted: bool = False,
) -> Callable[..., Any]:  # fmt: skip
    program, failure, is_part = None, None, is_fragment(gm, inputs)
    try:
        with progress.rewriting():
            program = build_program(gm, inputs, options=options, group=group, is_fragment=is_part, is_sorted=is_sorted, found=found)
    except AutoSeqError as error:
        failure = error
    except Exception as error:  # noqa: BLE001 (whatever it is, the other ranks are told and the caller sees it)
        failure = AutoSeqError(f"internal error while rewriting the program: {type(error).__name__}: {error}")
        failure.__cause__ = error
    lines = [*(program.fingerprint() if program is not None else []), repr(_comparable(options))]
    with progress.waiting():
        digest = agree_on_program(group, lines, failure, may_change=not is_sorted)
    if digest is None:
        ordered = copied(gm)
        order = sort_signature(ordered)
        if order is not None:
            return order.around(_compile(ordered, order.given(inputs), options, group, found, progress, is_sorted=True))
        digest = agree_on_program(group, lines, failure)
    if failure is not None:
        raise failure
    assert program is not None and digest is not None
    if is_sorted and program.whole and options.inner == "eager":
        options = replace(options, inner="aot_eager")  # one backward, where eagerly run operators have theirs in the order that was traced
    called = partial(progress.called, progress.add(program, topology=lambda: found or topology_of(options, group), is_part=is_part))
    placeholders = gm.graph.find_nodes(op="placeholder")
    names, owned = [input_name(node) for node in placeholders], frozenset(i for i, node in enumerate(placeholders) if is_buffer(node))
    check = GivenInputs(group, names, digest, owned, draws=drawing_devices(program), part=_part(is_part))
    trace_program(program)
    shapes = CallShapes(group, digest, names, program.inputs)
    return _Runner(_compiled(gm, inputs, program, options, group, progress), program, names, group, options, shapes, called, check)


def _compiled(
    gm: fx.GraphModule, inputs: Sequence[object], program: Program, options: Options, group: SequenceGroup, progress: Progress
) -> Callable[..., Any]:  # fmt: skip
    """The rewritten graph, or the one that Dynamo made where the program runs whole."""
    if not program.whole:
        return _inner(program.gm, program.inputs, options, group, progress)
    if options.grad_sync == "none":
        mark_trainable(gm, inputs)
        leave_gradients_unsummed(gm, group=group.name)
        gm.recompile()
    # What autoseq could not trace, AOTAutograd could not either.
    return _inner(gm, program.inputs, replace(options, inner="eager") if program.is_untraced else options, group, progress)


def _comparable(options: Options) -> Mapping[str, object]:
    """Options as ranks compare them: a mesh's ranks differ between groups, the rest may not."""
    return {name: getattr(options, name) for name in options.__dataclass_fields__ if name != "mesh"}


# To save memory Inductor would post a message only where it is waited for, and no message would travel while something is computed.
INDUCTOR = {"reorder_for_peak_memory": False}


def _inner(gm: fx.GraphModule, fake: Sequence[object], options: Options, group: SequenceGroup, progress: Progress) -> Callable[..., Any]:
    if options.inner != "inductor":
        from torch._dynamo.backends.debugging import aot_eager, boxed_nop

        compiler = name_failures(progress.of_compiler(boxed_nop), group)
        if options.inner == "aot_eager":
            return aot_eager(gm, list(fake), fw_compiler=compiler, bw_compiler=compiler)
        run = compiler(gm, list(fake))
        return lambda *args: run(list(args))
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    named = name_failures(progress.of_compiler(compile_fx_inner), group)
    return compile_fx(gm, list(fake), inner_compile=named, config_patches=INDUCTOR)  # type: ignore[return-value, arg-type]


def is_fragment(gm: fx.GraphModule, inputs: Sequence[object]) -> bool:
    """Whether this graph is a part of a program that Dynamo traced in several parts."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        return True
    if any(isinstance(x, DeferredTensor) for x in inputs):
        return True
    return not _called_from_outside()


def _part(is_part: bool) -> Part:
    if not is_part:
        return "whole"
    return "first" if _called_from_outside() else "later"


_PASSED_OVER = (
    "torch/_dynamo/", "torch/_inductor/", "torch/_functorch/", "torch/_compile.py", "torch/_utils_internal.py", "torch/utils/_",
    "torch/_logging", "torch/_subclasses", "torch/__init__.py", "contextlib.py", "autoseq/backend.py", "autoseq/dynamo_frames.py",
)  # fmt: skip


def _called_from_outside() -> bool:
    """Whether the frame being compiled is the one that was given to torch.compile: its caller is Dynamo's own wrapper."""
    frame = sys._getframe()
    seen_callback = False
    while frame is not None:
        name = frame.f_code.co_filename.replace("\\", "/")
        if "torch/_dynamo/eval_frame.py" in name and frame.f_code.co_name in ("compile_wrapper", "_fn", "__call__"):
            return True
        inside = any(part in name for part in _PASSED_OVER)
        seen_callback = seen_callback or "torch/_dynamo/convert_frame.py" in name
        if seen_callback and not inside and "torch/nn/modules/module.py" not in name:
            return False
        frame = frame.f_back
    return False


class _Runner:
    """The compiled program as Dynamo calls it: checks the first inputs, gathers deferred ones, wraps sharded outputs."""

    def __init__(
        self, compiled: Callable[..., Any], program: Program, names: Sequence[str], group: SequenceGroup, options: Options,
        shapes: CallShapes, called: Callable[[Sequence[object]], None], check: GivenInputs,
    ) -> None:  # fmt: skip
        self._compiled, self._names, self._group, self._options = compiled, names, group, options
        self._outputs = program.sharding.outputs
        self._layout: Layout = program.plan.layout
        self._floats, self._contents = program.floats, program.contents
        self._versions: dict[int, tuple[int, int]] = {}
        sizes = [size for out in self._outputs for size in (*out.shape, out.outer, out.length, out.local)]
        self._size_outputs = {size.index for size in sizes if isinstance(size, SizeOutput)}
        self._agreed, self._shapes, self._called, self._check = False, shapes, called, check
        self._drift = Drift(group, strict=options.strict)

    def __call__(self, *args: Any) -> Any:
        program_runs()
        if self._group.size > 1:
            refuse_fake_tensors(args)
        given, args = args, tuple(x.taken_in() if isinstance(x, DeferredTensor) else x for x in args)
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
        results = list(self._compiled(*args))
        self._called(results)
        if self._options.inner != "eager":
            refuse_second_derivatives(results, self._options.inner)
        shards = {out.index: results[out.index] for out in self._outputs}
        wrapped = [(out.index, self._wrap(out, results)) for out in self._outputs]
        for index, value in wrapped:
            results[index] = value
        self._check.watch(shards, results)
        return [r for i, r in enumerate(results) if i not in self._size_outputs]

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
            watch=self._check.output(name),
        )  # fmt: skip
        return deferred.local if self._options.outputs == "local" else deferred
