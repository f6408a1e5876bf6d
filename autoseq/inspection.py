"""What autoseq would do to a model, found out on one machine without peers, weights or data: for `autoseq inspect`.

The model is made on the meta device, the other ranks are a fake process group, and compilation stops where the rewritten graph
would be compiled, so neither memory nor time grows with the model's sizes, only with its number of operators.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from autoseq.asked_strategies import Asked, check_patterns
from autoseq.between_parts import ReadsBetweenParts
from autoseq.dry_run import Counts, add_counts, step_traffic
from autoseq.dynamo_stack import part_of
from autoseq.graph_text import remember_global
from autoseq.options import Options
from autoseq.passes.attention_site import LeftWhole
from autoseq.passes.autocast import ENTER
from autoseq.passes.read_masks import DenseMask
from autoseq.passes.shard import Fallback
from autoseq.passes.sizes import hint, num_bytes
from autoseq.planner import SitePlan, joined_sites
from autoseq.planning.beside_one_device import Beside, beside_one_device
from autoseq.planning.found import found_topology
from autoseq.planning.topology import Topology
from autoseq.pretended_parts import PretendedCall, PretendedPart
from autoseq.program import Program, build_program
from autoseq.runtime.errors import AutoSeqError, FallbackError, MeshError, NoAttentionError, TargetError
from autoseq.runtime.groups import SequenceGroup, group_from_mesh
from autoseq.runtime.nodes import on_nodes
from autoseq.target import brief

log = logging.getLogger("autoseq")

Made = tuple[nn.Module, Mapping[str, Any]]
T = TypeVar("T")

_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Intermediate:
    """A tensor of the local graph: its shape, and its size in bytes."""

    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """The rewritten programs (one, or one for each call of a part that Dynamo traced by itself) and what a step of them sends."""

    world_size: int
    sequence_length: int
    programs: tuple[Program, ...]
    collectives: Counts
    beside: Beside | None = None  # one device, where that was asked for

    @property
    def sites(self) -> list[SitePlan]:
        return joined_sites(program.plan for program in self.programs)

    @property
    def fallbacks(self) -> list[Fallback]:
        return [fallback for program in self.programs for fallback in program.fallbacks]

    @property
    def left_as_written(self) -> list[LeftWhole]:
        return [each for program in self.programs for each in program.left_as_written] if self.world_size > 1 else []

    @property
    def whole(self) -> str:
        """Why every rank runs all of the model; "" where any attention is split."""
        return "" if self.sites else why_whole(self.programs)

    @property
    def layout(self) -> str:
        """Of the attentions: `zigzag`, or `contiguous, zigzag` where parts of a model have their own."""
        return ", ".join(dict.fromkeys(site.layout for site in self.sites))

    @property
    def dense_masks(self) -> list[DenseMask]:
        return [mask for program in self.programs for mask in program.dense_masks]

    @property
    def largest_intermediate(self) -> Intermediate:
        found = [item for program in self.programs for item in intermediates(program.gm.graph)]
        return max(found, key=lambda item: item.num_bytes, default=Intermediate((), 0))


def inspect_model(
    make: Callable[[], Made],
    *,
    seq_len: int,
    world_size: int,
    strategy: Asked = "auto",
    layout: str = "auto",
    ranks_per_node: int | None = None,
) -> Inspection:
    """Rewrite the model that `make` returns, with the keyword arguments of one call, for rank 0 of `world_size`.

    `make` runs on the meta device; a model that cannot be made or traced there is made with real weights. Raises
    AutoSeqError as compiling the model would, TargetError if the model itself fails.
    """
    options = Options(strategy=strategy, layout=layout, ranks_per_node=ranks_per_node)
    return inspect_programs(make, seq_len=seq_len, world_size=world_size, options=options)


def inspect_programs(
    make: Callable[[], Made], *, seq_len: int, world_size: int, options: Options, beside: bool = False
) -> Inspection:  # fmt: skip
    """`inspect_model`, with options as the backend takes them; `beside` one device, if asked, for the topology of the options."""
    topology = topology_of(options, world_size) if beside else None
    return with_programs(make, lambda programs: inspected(programs, seq_len, world_size, topology), world_size=world_size, options=options)


def topology_of(options: Options, world_size: int) -> Topology:
    """The one that was asked for, or what is found on this machine."""
    return options.topology if isinstance(options.topology, Topology) else found_topology(world_size)


def inspected(programs: Sequence[Program], seq_len: int, world_size: int, topology: Topology | None = None) -> Inspection:
    """What is to be said of rewritten programs, while their group of ranks is there; beside one device, with a topology."""
    collectives: Counts = {}
    for program in programs:
        collectives = add_counts(collectives, step_traffic(program, world_size))
    beside = None if topology is None else beside_one_device(programs, ranks=world_size, topology=topology)
    return Inspection(world_size, seq_len, tuple(programs), collectives, beside)


def why_whole(programs: Sequence[Program]) -> str:
    """Why programs are not split, each reason once."""
    return "; ".join(dict.fromkeys(program.whole for program in programs if program.whole))


def with_programs(
    make: Callable[[], Made], use: Callable[[Sequence[Program]], T], *, world_size: int, options: Options, weights: bool = True
) -> T:
    """What `use` makes of the rewritten programs of a model, while the pretended group of ranks is there. Raises as `inspect_model`.

    `weights`: a model that cannot be made or traced on the meta device may be made with real ones; else it is a TargetError.
    """
    with _fake_group(world_size, options.ranks_per_node) as group:
        try:
            with torch.device("meta"):
                model, kwargs = make()
            programs = _capture(model, kwargs, options, group)
            _tell_autocast(programs)
        except Exception as error:
            if isinstance(error, AutoSeqError) and not isinstance(error, TargetError):
                raise
            if not weights:
                raise TargetError(f"the model cannot be looked at without weights: {brief(error)}") from error
            model, kwargs = make()
            programs = _capture(model, kwargs, options, group)
            log.warning("the model was made with real weights, because without them: %s", brief(error))
        return use(programs)


@contextlib.contextmanager
def _fake_group(world_size: int, ranks_per_node: int | None) -> Iterator[SequenceGroup]:
    if dist.is_initialized():
        raise MeshError("inspecting pretends to be one of many ranks, so it cannot run where torch.distributed is initialized")
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield on_nodes(group_from_mesh(None), ranks_per_node)
    finally:
        dist.destroy_process_group()


class _Captured(Exception):
    """Ends the call of a compiled model: there is no more to see."""


def _capture(model: nn.Module, kwargs: Mapping[str, Any], options: Options, group: SequenceGroup) -> list[Program]:
    """The rewritten programs of one call of the model."""
    backend, is_whole = _CapturingBackend(options, group), True
    torch._dynamo.reset()
    try:
        torch.compile(model, backend=backend)(**kwargs)
    except _Captured:
        pass
    except FallbackError:  # of what Python reads between the parts
        raise
    except Exception as error:
        if not backend.programs:
            raise TargetError(f"the model failed when it was traced: {brief(error)}") from error
        log.warning("only the parts of the model up to this error were seen: %s", brief(error))
        is_whole = False
    finally:
        torch._dynamo.reset()
    if backend.failure is not None:
        raise backend.failure
    programs = backend.programs
    if not programs:
        raise NoAttentionError(f"torch.compile made no graph of {type(model).__name__}, so there is nothing to look at")
    if backend.is_in_parts:
        names = dict.fromkeys(planned.site.run_name for program in programs for planned in program.plan.sites)
        if names:
            check_patterns(options.strategy, list(names), of_part=not is_whole)
        _tell_untraced(model, programs)
    return programs


def _tell_autocast(programs: Sequence[Program]) -> None:
    """Autocast is a device's, and without weights there is none."""
    if any(node.target is ENTER for program in programs for node in program.before.nodes):
        log.warning(
            "the model enters torch.autocast, which does nothing while there are no weights: all numbers are of the dtype of its "
            "parameters. For those of another, give it parameters of that dtype (model.bfloat16())"
        )


def _tell_untraced(model: nn.Module, programs: Sequence[Program]) -> None:
    """What Python does between the parts of a model is in none of them; that it computes with parameters can be known."""
    traced = {id(x) for program in programs for x in program.owned}
    left = [name for name, x in model.named_parameters() if id(x) not in traced]
    if left:
        shown = ", ".join(left[:_MOST_NAMED]) + (", …" if len(left) > _MOST_NAMED else "")
        log.warning(
            "%d parameters (%s) are in no part of the model that torch.compile traced. If Python computes with them between the parts "
            "(TORCH_LOGS=graph_breaks says why), neither they nor that work are counted",
            len(left), shown,
        )  # fmt: skip


class _CapturingBackend:
    """A torch.compile backend that rewrites graphs and keeps them."""

    def __init__(self, options: Options, group: SequenceGroup) -> None:
        self._options, self._group = options, group
        self._calls: list[PretendedCall] = []
        self.failure: AutoSeqError | None = None
        self.num_graphs = 0
        self.is_in_parts = False

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
        is_part = part_of(gm, inputs) != "whole" or self.num_graphs > 0
        self.is_in_parts = self.is_in_parts or is_part
        self.num_graphs += 1
        try:
            program = build_program(
                gm, inputs, options=self._options, group=self._group, is_fragment=is_part, observe=remember_global, level=logging.INFO
            )
        except AutoSeqError as error:
            self.failure = error
            return _stop
        if not is_part:
            self._calls.append(PretendedCall(program, inputs))
            return _stop
        reads = ReadsBetweenParts(program, self._options, self._group, level=logging.INFO)
        return PretendedPart(gm, program, self._group.size, reads, self._calls.append)  # runs on the meta device, to get to the next one

    @property
    def programs(self) -> list[Program]:
        """One for each call, in their order, with what is gathered between them."""
        return [call.program for call in self._calls]


def _stop(*_: object) -> Any:
    raise _Captured


def intermediates(graph: fx.Graph) -> list[Intermediate]:
    """Every tensor that a graph makes: not its inputs, parameters and what it holds, nor names for them."""
    given = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    for node in graph.nodes:
        if getattr(node.target, "__name__", "") in ("vary", "vary_many", "getitem") and set(node.all_input_nodes) <= given:
            given.add(node)
    made = [node.meta.get("val") for node in graph.nodes if node not in given]
    return [_intermediate(val) for val in made if isinstance(val, torch.Tensor)]


def _intermediate(val: torch.Tensor) -> Intermediate:
    return Intermediate(tuple(hint(size) for size in val.shape), num_bytes(val))
