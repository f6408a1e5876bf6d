"""The torch.compile backend, found by its name through the `torch_dynamo_backends` entry point.

It rewrites the graph (`program`), has the ranks agree on it, compiles it with Inductor or runs it eagerly behind
AOTAutograd, and wraps the outputs that are shards.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import fx

from autoseq.agreement import agree_on_program, agree_on_topology
from autoseq.call_shapes import CallShapes
from autoseq.compiled_calls import watch_calls
from autoseq.cxx import refuse_missing_cxx
from autoseq.dynamo_frames import keep_frames
from autoseq.dynamo_hooks import trace_hooks
from autoseq.dynamo_stack import part_of
from autoseq.foreign_programs import stay_apart
from autoseq.given_inputs import GivenInputs
from autoseq.notices import show_by_default
from autoseq.options import Options, parse_options
from autoseq.passes.canonical_order import sort_signature
from autoseq.passes.reached_memory import ReachedMemory, reached_memory
from autoseq.passes.source import input_name, is_buffer
from autoseq.passes.tidy import leave_gradients_unsummed
from autoseq.passes.traceable_masks import let_masks_through
from autoseq.peer_failures import name_failures
from autoseq.planning.topology import Topology
from autoseq.program import Program, build_program, mark_trainable, topology_of
from autoseq.program_call import ProgramCall
from autoseq.progress import Progress, progress_of
from autoseq.random_state import drawing_devices
from autoseq.runtime.data_of_plain_tensors import give_whole_data
from autoseq.runtime.errors import AutoSeqError, TopologyError
from autoseq.runtime.groups import SequenceGroup, group_from_mesh
from autoseq.runtime.nodes import on_nodes
from autoseq.structured_trace import trace_program
from autoseq.views_of_outputs import describe_views_of_outputs
from autoseq.whole_program import copied

log = logging.getLogger("autoseq")

let_masks_through()
describe_views_of_outputs()
give_whole_data()
show_by_default()
watch_calls()
keep_frames()
trace_hooks()
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
    program, memory, failure, part = None, ReachedMemory(), None, part_of(gm, inputs)
    try:
        with progress.rewriting():
            program = build_program(gm, inputs, options=options, group=group, is_fragment=part != "whole", is_sorted=is_sorted, found=found)
        memory = ReachedMemory() if program.whole else reached_memory(gm)
        if options.inner == "inductor" and not (program.whole and program.is_untraced):
            refuse_missing_cxx(program.inputs)
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
    called = partial(progress.called, progress.add(program, topology=lambda: found or topology_of(options, group), is_part=part != "whole"))
    placeholders = gm.graph.find_nodes(op="placeholder")
    names, owned = [input_name(node) for node in placeholders], frozenset(i for i, node in enumerate(placeholders) if is_buffer(node))
    check = GivenInputs(group, names, digest, owned, draws=drawing_devices(program), part=part)
    trace_program(program)
    shapes = CallShapes(group, digest, names, program.inputs)
    run = _compiled(gm, inputs, program, options, group, progress)
    return ProgramCall(run, program, names, group, options, shapes, called, check, memory)


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
