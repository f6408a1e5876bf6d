"""From Dynamo's graph to the local graph and its plan: what the backend compiles and what `inspect` shows.

    Dynamo graph → open regions → normalize → find attention → read masks → plan → find sequence → shard → lower → tidy
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import fx
from torch._guards import TracingContext
from torch._subclasses import FakeTensor, FakeTensorMode

from autoseq.asked_strategies import check_patterns
from autoseq.options import Options
from autoseq.passes.attention_site import LeftWhole
from autoseq.passes.canonical_order import sort_nodes
from autoseq.passes.find_attention import find_attention
from autoseq.passes.find_sequence import find_sequence
from autoseq.passes.formula.held import CONTENT, READ
from autoseq.passes.keep_meaning import keep_meaning
from autoseq.passes.lower import lower
from autoseq.passes.normalize import drop_noops, normalize
from autoseq.passes.open_regions import open_regions
from autoseq.passes.reached_memory import writes_overlapping_input
from autoseq.passes.read_masks import DenseMask, read_masks
from autoseq.passes.runner import Pass, run_passes
from autoseq.passes.shard import Fallback, Sharding, shard
from autoseq.passes.short_attention import ShortAttention, leave_short_whole
from autoseq.passes.sizes import num_bytes
from autoseq.passes.source import first_source
from autoseq.passes.specialize_floats import specialize_floats
from autoseq.passes.tidy import bucket_varies, drop_idle_varies, leave_gradients_unsummed, refresh_values
from autoseq.planner import Plan, find_sites, make_plan
from autoseq.planning.found import found_topology
from autoseq.planning.topology import Topology
from autoseq.runtime.deferred import DeferredTensor
from autoseq.runtime.errors import FallbackError, NoSequenceError
from autoseq.runtime.groups import SequenceGroup, process_group, speaks_for_all
from autoseq.whole_program import (
    NAMES_BREAKS,
    NEEDS_VALUES,
    Whole,
    copied,
    no_attention,
    no_rows_of_its_own,
    say_once,
    too_short,
    untraceable,
    writes_shared_inputs,
)

log = logging.getLogger("autoseq")

_NO_LIMIT = 1 << 62

GRADIENT_BUCKET_BYTES = 64 << 20
"""Parameter gradients are reduced in messages of up to this many bytes."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """A sharded output that something after the program needs whole: its number, the bytes of a rank's padded shard and of all of it."""

    output: int
    shard_bytes: int
    full_bytes: int


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that costs, and what of it: bytes that are sent for a value that is gathered whole, and of one that every rank holds."""

    what: str
    gathered_bytes: int = 0
    held_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Program:
    """A rewritten program: the local graph, what it was before, the plan, and every choice that costs something.

    A program that runs `whole` has no plan, and its graphs are for reports: what runs is Dynamo's own. Where all parts of a model are
    looked at, there is one for each call of a part; `gathered` is known there, and `owned`: the model's own parameters and buffers, so
    that those which calls share are the same tensors.
    """

    gm: fx.GraphModule
    before: fx.Graph
    inputs: list[object]
    floats: dict[int, float]
    contents: dict[int, torch.Tensor]  # of inputs that were read as masks
    plan: Plan
    sharding: Sharding
    dense_masks: tuple[DenseMask, ...]
    left_whole: tuple[LeftWhole, ...]
    whole: str = ""  # why every rank runs what Dynamo traced, on full inputs; "" where the program is split
    gathered: tuple[Gathered, ...] = ()
    owned: tuple[torch.Tensor, ...] = ()

    @property
    def is_untraced(self) -> bool:
        """Whether it was not traced further than Dynamo did."""
        return bool(self.whole) and not any("val" in node.meta for node in self.before.nodes)

    @property
    def fallbacks(self) -> list[Fallback]:
        return self.sharding.fallbacks

    @property
    def left_as_written(self) -> list[LeftWhole]:
        """The attentions that no strategy serves, besides those among the fallbacks."""
        told = {fallback.source for fallback in self.fallbacks}
        return [each for each in self.left_whole if each.source not in told]

    def warned(self) -> list[Warned]:
        """What a run on several ranks warns of; what is gathered is what a rank sends."""
        whole = [_warned(each, "runs whole on every rank" if self.whole else ON_GATHERED) for each in self.fallbacks]
        left = [Warned(f"the attention at {each.source} is left as it is written: {each.reason}") for each in self.left_as_written]
        masks = self.dense_masks
        held = [Warned(f"the mask of the attention at {m.source} is held whole: {m.reason}", held_bytes=m.num_bytes) for m in masks]
        return [*whole, *left, *held]

    def owned_among(self, values: Sequence[object]) -> tuple[torch.Tensor, ...]:
        """Of values for all its inputs, those of parameters and buffers."""
        given = zip(self.before.find_nodes(op="placeholder"), values, strict=True)
        return tuple(x for node, x in given if isinstance(x, torch.Tensor) and _is_owned(node))

    def fingerprint(self) -> list[str]:
        """The inputs, the global graph and the plan, as lines of text without anything that differs between ranks."""
        given = [f"{node.name} is {node.meta.get('source_name', node.name)}" for node in self.before.find_nodes(op="placeholder")]
        return [*given, *str(self.before).splitlines(), *(["(runs whole)"] if self.whole else self.plan.lines(seconds=False))]


def build_program(
    gm: fx.GraphModule,
    inputs: Sequence[object],
    *,
    options: Options,
    group: SequenceGroup,
    is_fragment: bool,
    is_sorted: bool = False,
    observe: Callable[[str, fx.GraphModule], None] | None = None,
    found: Topology | None = None,
    level: int = logging.WARNING,
) -> Program:
    """Rewrite one Dynamo graph, which is left as it is; `inputs` are its real or fake inputs. What cannot be split is to run whole.

    `found` is the hardware that the ranks agreed on where no option names one; without it this rank finds its own. `level` is that of what
    a run warns of, on the rank that speaks for all. `is_sorted`: ranks traced the program in different orders, and were told of it before.
    """
    level = level if speaks_for_all(group, options.mesh) and not is_sorted else logging.DEBUG
    traced, gm = gm, copied(gm)
    open_regions(gm, inputs)
    keep_meaning(gm)
    floats = specialize_floats(gm, inputs)
    fake = fake_inputs(gm, inputs)
    normal = _normalized(gm, fake, traced, is_part=is_fragment)
    if isinstance(normal, Whole):
        return _whole(normal, traced, fake, inputs, options, group, level)
    if is_sorted:
        sort_nodes(normal)
    mark_trainable(normal, inputs)
    records = run_passes(normal, (*_READ, Pass("leave_short_whole", partial(leave_short_whole, group_size=group.size))), observe=observe)
    short: list[ShortAttention] = records["leave_short_whole"].result
    sites = find_sites(normal, group.mesh)
    placeholders = normal.graph.find_nodes(op="placeholder")
    contents = {i: node.meta[CONTENT].clone() for i, node in enumerate(placeholders) if READ in node.meta}
    num_found, left_whole = records["find_attention"].result
    if not sites:
        if short and group.size > 1 and options.outputs == "local":
            raise NoSequenceError(no_rows_of_its_own(short[0]))
        why = too_short(short[0]) if short else no_attention(traced, left_whole, is_part=is_fragment)
        return _whole(why, normal, fake, inputs, options, group, level)
    names = [*(named.run_name for named in sites), *(each.name for each in short)]
    check_patterns(options.strategy, names, of_part=is_fragment, level=level)
    topology, reserved = found or topology_of(options, group), _parameter_bytes(normal, fake)
    plan = make_plan(
        sites, group_size=group.size, strategy=options.strategy, layout=options.layout, topology=topology, reserved_bytes=reserved
    )  # fmt: skip
    if plan.memory_bytes() + reserved > topology.memory_bytes:
        log.log(min(level, logging.WARNING), "%s", _too_large(plan, topology, reserved))
    before = fx.Graph()
    before.graph_copy(normal.graph, {}, return_output_node=True)
    records |= run_passes(normal, _rewrite_passes(options, group, plan), observe=observe)
    lowered = records["lower"].result + len(short)
    assert lowered == num_found, f"{num_found} attention sites were found, {lowered} rewritten"
    sharding: Sharding = records["shard"].result
    sharding.fallbacks.extend(_gathered_inputs(inputs, group))
    dense_masks = tuple(mask for mask in records["read_masks"].result[1] if mask.source not in {each.source for each in short})
    program = Program(normal, before, fake, floats, contents, plan, sharding, dense_masks, tuple(left_whole))
    _tell(program, options, group, level)
    return program


def _normalized(gm: fx.GraphModule, fake: Sequence[object], traced: fx.GraphModule, *, is_part: bool) -> fx.GraphModule | Whole:
    """The graph in functional ATen, or why it has no such form."""
    try:
        return normalize(gm, fake)
    except NEEDS_VALUES as error:
        return untraceable(traced, error, is_part=is_part)
    except (RuntimeError, AssertionError):  # what aot_export_module raises of inputs that overlap
        if writes_overlapping_input(traced):
            return writes_shared_inputs(traced, is_part=is_part)
        raise


_READ = (
    Pass("drop_noops", drop_noops),
    Pass("find_attention", find_attention),
    Pass("read_masks", read_masks),
)


def _rewrite_passes(options: Options, group: SequenceGroup, plan: Plan) -> tuple[Pass, ...]:
    lowering = Pass("lower", partial(lower, strategies=plan.strategies(), axes=group.axes))
    if group.size == 1:
        return Pass("shard", lambda gm: Sharding([], [])), lowering
    gather = options.outputs == "full"
    return (
        Pass("find_sequence", find_sequence),
        Pass("shard", partial(shard, group=group.name, group_size=group.size, layout=plan.layout, gather_outputs=gather)),
        lowering,
        Pass("drop_idle_varies", drop_idle_varies),
        *([Pass("leave_gradients_unsummed", partial(leave_gradients_unsummed, group=group.name))] if options.grad_sync == "none" else []),
        Pass("bucket_varies", partial(bucket_varies, bucket_bytes=GRADIENT_BUCKET_BYTES)),
        Pass("refresh_values", refresh_values),
    )


def topology_of(options: Options, group: SequenceGroup) -> Topology:
    """The one that was asked for, or what is known of this machine, whose memory is a limit only if it is a GPU's."""
    if isinstance(options.topology, Topology):
        return options.topology
    found = found_topology(group.size, dist.get_process_group_ranks(process_group(group.name)) if group.name else None)
    return found if torch.cuda.is_available() else replace(found, memory_bytes=_NO_LIMIT)


def _too_large(plan: Plan, topology: Topology, reserved: int) -> str:
    return (
        f"no choice of strategies fits in the memory of topology {topology.name}, {topology.memory_bytes:,} bytes a rank: attention holds "
        f"{plan.memory_bytes():,} at least, parameters and gradients {reserved:,}. More ranks or a shorter sequence would fit "
        "(autoseq plan says which)"
    )


READS_SHARDS, READS_BETWEEN = "the part that reads what is made", "Python between the parts of the program"
"""The operations of fallbacks between the parts of a program; what they cost is the gather of what another part made."""

ON_GATHERED = "runs on gathered values"


def _gathered_inputs(inputs: Sequence[object], group: SequenceGroup) -> list[Fallback]:
    """Of a part of a program that Dynamo traced in several parts: what another part made as shards, and none has gathered before."""
    if group.size == 1:
        return []
    shards = {id(x._shard): x._shard for x in inputs if isinstance(x, DeferredTensor) and not x._shard.is_taken_in}
    reason = "the program was traced in several parts" + NAMES_BREAKS
    others = group.size - 1
    return [Fallback(READS_SHARDS, shard.name, reason, others * num_bytes(shard.padded)) for shard in shards.values()]


def _whole(
    why: Whole, gm: fx.GraphModule, fake: list[object], inputs: Sequence[object], options: Options, group: SequenceGroup, level: int
) -> Program:  # fmt: skip
    """A program that every rank runs whole; `gm` is for reports."""
    sent = sum(each.bytes_per_rank for each in _gathered_inputs(inputs, group))
    computes = any(node.op.startswith("call") for node in gm.graph.nodes)
    fallbacks = [Fallback(why.what, first_source(gm.graph), why.reason, sent)] if group.size > 1 and (computes or sent) else []
    program = Program(gm, gm.graph, fake, {}, {}, Plan("contiguous", ()), Sharding(fallbacks, []), (), (), whole=why.reason)
    _tell(program, options, group, level if say_once(why.kind, group) else logging.DEBUG)
    return program


def _parameter_bytes(gm: fx.GraphModule, inputs: Sequence[object]) -> int:
    """Of parameters and their gradients, which are whole on every rank."""
    given = zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
    owned = [(node, x) for node, x in given if isinstance(x, torch.Tensor) and _is_owned(node)]
    return sum(num_bytes(x) * (2 if node.meta["requires_grad"] else 1) for node, x in owned)


def _is_owned(placeholder: fx.Node) -> bool:
    return bool(placeholder.meta.get("is_parameter") or placeholder.meta.get("is_buffer"))


def mark_trainable(gm: fx.GraphModule, inputs: Sequence[object]) -> None:
    """Note on each input whether it needs a gradient and whether it is a parameter; a buffer's content is known."""
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if node.meta.get("is_buffer"):
            node.meta[CONTENT] = value
        node.meta["requires_grad"] = isinstance(value, torch.Tensor) and value.requires_grad
        node.meta["is_parameter"] = isinstance(value, torch.nn.Parameter)


def fake_inputs(gm: fx.GraphModule, inputs: Sequence[object]) -> list[object]:
    """Dynamo's real inputs as fake tensors of its own mode, symbolic sizes kept.

    A deferred output of an earlier part of the program stands for its whole value here.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context and context.fake_mode else FakeTensorMode()

    def fake(node: fx.Node, value: object) -> object:
        if isinstance(value, DeferredTensor):
            shape = node.meta["example_value"].shape
            with mode:
                return torch.empty(shape, dtype=value.dtype, device=value.device, requires_grad=value.requires_grad)
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        symbolic = context.tensor_to_context.get(value) if context else None
        # With its source a symbolic size is Dynamo's own symbol again, not a new one that nothing guards.
        source = getattr(symbolic, "tensor_source", None)
        return mode.from_tensor(value, static_shapes=symbolic is None, symbolic_context=symbolic, source=source)

    return [fake(node, value) for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)]


def _tell(program: Program, options: Options, group: SequenceGroup, level: int) -> None:
    """Each choice that costs something is said once; under `strict` a fallback is an error."""
    lines = [_line(each) for each in program.warned()] if group.size > 1 else []
    if lines and options.strict:
        raise FallbackError("strict=True forbids fallbacks, and there are:\n  " + "\n  ".join(lines))
    for line in lines:
        log.log(level, "%s", line)
    for line in program.plan.lines() if program.plan.sites else ():
        log.info("%s", line)
    for line in program.plan.reasons():
        log.debug("%s", line)


def report_fallback(fallback: Fallback, options: Options, group: SequenceGroup, level: int) -> None:
    """One that shows when the program runs: said once for each source line, an error under `strict`."""
    line = _line(_warned(fallback, ON_GATHERED))
    if options.strict:
        raise FallbackError(f"strict=True forbids fallbacks, and there is one:\n  {line}")
    if say_once(f"{fallback.op} {fallback.source}", group) and speaks_for_all(group, options.mesh):
        log.log(level, "%s", line)


def _warned(fallback: Fallback, how: str) -> Warned:
    return Warned(f"{fallback.op} at {fallback.source} {how} ({fallback.reason})", fallback.bytes_per_rank)


def _line(warned: Warned) -> str:
    sizes = (warned.gathered_bytes, "bytes a rank"), (warned.held_bytes, "bytes")
    return "; ".join([warned.what, *(f"{size:,} {unit}" for size, unit in sizes if size)])
