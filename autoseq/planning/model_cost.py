"""What a model costs one rank besides its attention: products, memory that is read and written, collectives, and what is kept.

Counted in a dry run of the rewritten program (`autoseq/dry_run.py`), forward and backward, with a stand-in for each attention that
computes and sends nothing: what attention costs, its strategies say. One count serves any length and, where no step sees all rows, any
number of ranks, since everything it holds is either fixed or grows with the rows that a rank has (`gathered` has the other models).

Memory traffic is counted as Inductor fuses it: what a pointwise operator makes is written only if something else than pointwise
operators and reductions reads it, or the backward does; matrix products hide theirs. That is a model of the compiler, not a measurement.
"""


from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import flop_registry

from autoseq.dry_run import CountCollectives, Counts, Place, Step, add_counts, gather_counts, place_of, run_backward
from autoseq.program import Program
from autoseq.runtime.layout import local_length
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.timeline import WAYS, Way

_RECOMPUTED = (CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_RECOMPUTE)
_REDUCTIONS = {"mean", "sum", "amax", "amin", "var_mean", "native_layer_norm", "_softmax", "_log_softmax", "nll_loss_forward"}
_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
_MAKES_NOTHING = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh"}


@dataclass(frozen=True, slots=True)
class PassCost:
    """One way, for the tokens of a rank: `flops` of products by dtype grow with them, `fixed_bytes` of memory traffic do not.

    `again` are products of the forward that the backward computes once more (checkpointed layers), not among `flops`.
    """

    flops: tuple[tuple[str, int], ...]
    fixed_bytes: int
    growing_bytes: int
    launches: int
    again: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Collective:
    """Collectives of one kind outside attention: messages of a step, and the bytes of their whole buffers."""

    kind: str
    full_bytes: int
    messages: int


@dataclass(frozen=True, slots=True)
class ModelCost:
    """A model besides its attention, on a rank with so many tokens (rows times batch), of a sequence on so many ranks.

    `reduced` are all-reduces, whose size does not depend on the tokens: gradients, and sums of losses. `exchanged` are the
    collectives of steps that needed other rows, which grow with them. `kept_bytes` (what autograd saves, and what one part of a model
    gathered of another), `largest_bytes` and `gathered_bytes` (the largest value that is gathered within a part) grow.
    """

    tokens: int
    ranks: int
    forward: PassCost
    backward: PassCost
    reduced: tuple[Collective, ...]
    exchanged: tuple[Collective, ...]
    parameters: int
    trained: int  # of the parameters: those that want a gradient
    parameter_bytes: int
    gradient_bytes: int
    kept_bytes: int
    largest_bytes: int
    gathered_bytes: int = 0
    buffer_bytes: int = 0  # registered buffers, which FSDP leaves whole

    def way(self, way: Way) -> PassCost:
        return self.forward if way == "forward" else self.backward


def model_cost(programs: Sequence[Program], *, world_size: int, tokens: int | None = None) -> ModelCost:
    """What the programs of one model cost rank 0 of `world_size`, attention left out.

    `tokens` are what the costs are said to be of; if not given, the rows of the longest attention.
    """
    counted = [_counted(program, world_size) for program in programs]
    if tokens is None:
        sites = [(planned.site.site, planned.layout) for program in programs for planned in program.plan.sites]
        tokens = max(site.batch * local_length(max(site.q_len, site.k_len), world_size, layout) for site, layout in sites)
    owned = _owned(programs)
    parameters = [x for x in owned if isinstance(x, nn.Parameter)]
    collectives = _collectives([each.counts for each in counted], world_size)
    return ModelCost(
        tokens=tokens,
        ranks=world_size,
        forward=_pass_cost(counted, "forward"),
        backward=_pass_cost(counted, "backward"),
        reduced=tuple(each for each in collectives if each.kind == "all_reduce"),
        exchanged=tuple(each for each in collectives if each.kind != "all_reduce"),
        parameters=sum(x.numel() for x in parameters),
        trained=sum(x.numel() for x in owned if x.requires_grad),
        parameter_bytes=sum(_bytes(x) for x in parameters),
        buffer_bytes=sum(_bytes(x) for x in owned) - sum(_bytes(x) for x in parameters),
        gradient_bytes=sum(_bytes(x) for x in owned if x.requires_grad),
        kept_bytes=sum(each.kept_bytes for each in counted),
        largest_bytes=max(each.largest_bytes for each in counted),
        gathered_bytes=max(each.gathered_bytes for each in counted),
    )


def _owned(programs: Sequence[Program]) -> list[Tensor]:
    """The distinct parameters and buffers of some programs: a later part of a model may use those of an earlier one.

    Not told apart by their names: layers of one class have the same in a part that is traced once for all of them.
    """
    return list({id(x): x for program in programs for x in program.owned}.values())


def _pass_cost(counted: Sequence["_Counted"], way: Way) -> PassCost:
    flops, again = (Counter[str](), Counter[str]())
    for each in counted:
        flops.update(each.flops[way])
        if way == "backward":
            again.update(each.again_flops)
    moved = [each.moved(way) for each in counted]
    fixed, growing, launches = (sum(numbers) for numbers in zip(*moved, strict=True))
    return PassCost(tuple(sorted(flops.items())), fixed, growing, launches, again=tuple(sorted(again.items())))


def _collectives(counts: Sequence[Counts], P: int) -> list[Collective]:
    """Whole buffers, by what of them a rank sends."""
    total: dict[str, Collective] = {}
    for of_one in counts:
        for kind, sent in of_one.items():
            passes = 2 if kind == "all_reduce" else 1
            before = total.get(kind, Collective(kind, 0, 0))
            full = sent.bytes * P // ((P - 1) * passes)
            total[kind] = Collective(kind, before.full_bytes + full, before.messages + sent.messages)
    return [total[kind] for kind in sorted(total)]


# The dry run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Op:
    """One operator that reads and writes memory: what it reads and makes."""

    way: Way
    product: bool
    fuses: bool
    pointwise: bool
    reads: tuple[Tensor, ...]
    makes: tuple[Tensor, ...]


class _Counted(CountCollectives):
    """Products, memory traffic and collectives of one program. Tensors are held to the end, so that a storage is known by its address."""

    def __init__(self, world_size: int, owned: Sequence[Tensor]) -> None:
        super().__init__(world_size)
        self.flops: dict[Way, Counter[str]] = {"forward": Counter(), "backward": Counter()}
        self.again_flops = Counter[str]()
        self.way: Way = "forward"
        self.again = False  # what runs now runs once more in the backward
        self.kept_bytes = self.largest_bytes = self.gathered_bytes = 0
        self._ops = list[_Op]()
        # Of parameters, or as large as they are whatever the tokens.
        self._fixed = {_storage(x) for x in owned}
        self._shapes = {tuple(x.shape) for x in owned} | {tuple(x.shape)[::-1] for x in owned}
        self._saved: dict[int, Tensor] = {}
        self._made_again: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is _GATHER:
            self.gathered_bytes = max(self.gathered_bytes, _bytes(out))
        if func.namespace == "aten" and not func.is_view and func._opname not in _MAKES_NOTHING:
            self._note(func, args, kwargs or {}, out)
        return out

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        reads, makes = tuple(_tensors((args, kwargs))), tuple(_tensors(out))
        if not makes:
            return
        pointwise = torch.Tag.pointwise in func.tags or func._opname in ("_to_copy", "clone", "cat", "fill_", "copy_")
        for way in WAYS if self.again else (self.way,):
            product = func.overloadpacket in flop_registry
            if product:
                once_more = self.again and way == "backward"
                flops = self.again_flops if once_more else self.flops[way]
                flops[str(makes[0].dtype).removeprefix("torch.")] += int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
            self._ops.append(_Op(way, product, pointwise or func._opname in _REDUCTIONS, pointwise, reads, makes))
        if self.again:
            self._made_again |= {_storage(x) for x in makes}
        if self._is_fixed(func, reads, makes):
            self._fixed |= {_storage(x) for x in makes}
        else:
            self.largest_bytes = max(self.largest_bytes, *(_bytes(x) for x in makes))

    def _is_fixed(self, func: Any, reads: Sequence[Tensor], makes: Sequence[Tensor]) -> bool:
        """Whether what an operator makes does not grow with the tokens: a gradient of a parameter, or made of what is fixed."""
        fixed = [_storage(x) in self._fixed for x in reads]
        sums_over_tokens = func.overloadpacket in flop_registry or func._opname == "embedding_dense_backward"
        is_gradient = sums_over_tokens and self.way == "backward" and not any(fixed) and tuple(makes[0].shape) in self._shapes
        return is_gradient or (bool(fixed) and all(fixed))

    def keep(self, x: Tensor) -> Tensor:
        """A hook for what autograd saves; what the backward makes again is not kept."""
        if _storage(x) not in self._made_again:
            self._saved[_storage(x)] = x
        return x

    def keep_anyway(self, result: Any) -> None:
        """What one checkpointed region hands to the next: kept, so that each can be computed again by itself, as AOTAutograd does."""
        for x in _tensors(result):
            self._made_again.discard(_storage(x))
            self._saved[_storage(x)] = x

    def end_of_forward(self, owned: Sequence[Any]) -> None:
        """What has been kept, besides what the program was given."""
        given = {_storage(x) for x in owned if isinstance(x, Tensor)}
        self.kept_bytes = sum(x.untyped_storage().nbytes() for address, x in self._saved.items() if address not in given)
        self.way = "backward"

    def moved(self, way: Way) -> tuple[int, int, int]:
        """Bytes that do not depend on the tokens, bytes that do, and kernels: of one way."""
        in_registers = self._in_registers()
        fixed = growing = launches = 0
        for op in self._ops:
            if op.way != way:
                continue
            written = [x for x in op.makes if _storage(x) not in in_registers]
            launches += bool(written)
            if op.product:
                continue  # its memory traffic is part of its rate
            for x in (*written, *(x for x in op.reads if _storage(x) not in in_registers)):
                if _storage(x) in self._fixed or x.dim() == 0:
                    fixed += _bytes(x)
                else:
                    growing += _bytes(x)
        return fixed, growing, launches

    def _in_registers(self) -> set[int]:
        """What pointwise operators make for other operators that are fused with them, in the same pass."""
        makers = {_storage(x): op for op in self._ops for x in op.makes}
        written = {_storage(x) for op in self._ops for x in op.makes if not op.pointwise} | set(self._saved)
        for op in self._ops:
            for x in op.reads:
                maker = makers.get(_storage(x))
                if not op.fuses or (maker is not None and maker.way != op.way):
                    written.add(_storage(x))
        return set(makers) - written


class _StandIn(Function):
    """Attention as the rest of the model sees it: a result and gradients of the right shapes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> Tensor:
        ctx.shapes = [None if x is None else (x.shape, x.dtype, x.device) for x in (q, k, v, *others)]
        return q.new_empty(*q.shape[:3], v.shape[3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        return tuple(torch.empty(x[0], dtype=x[1], device=x[2]) if x and needed else None for x, needed in wanted)


def _is_recomputed(node: fx.Node) -> bool:
    return node.meta.get("recompute") in _RECOMPUTED


def _region(node: fx.Node) -> int:
    """The checkpointed region of a node that is computed again; regions that come later have larger numbers."""
    return node.meta.get("ac_graph_id", 0)


class _CountingStep(Step):
    """Runs the graph with stand-ins for attention, and says which operators the backward repeats."""

    def __init__(self, gm: fx.GraphModule, place: Place, counted: _Counted) -> None:
        super().__init__(gm, place)
        self._counted = counted
        self._attentions = {strategy.attention for strategy in STRATEGIES.values()}
        self.held: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        self._counted.again = _is_recomputed(n)
        try:
            result = super().run_node(n)
        finally:
            self._counted.again = False
        if _is_recomputed(n) and any(_is_recomputed(user) and _region(user) > _region(n) for user in n.users):
            self._counted.keep_anyway(result)
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        self.held.append(super().get_attr(target, args, kwargs))
        return self.held[-1]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in self._attentions:
            q, k, v, captures, *others = args
            return _StandIn.apply(q, k, v, *captures, *others)
        return super().call_function(target, args, kwargs)


def _counted(program: Program, world_size: int) -> _Counted:
    place = place_of(program)
    inputs = [place.convert(x) for x in program.inputs]
    counted = _Counted(world_size, program.owned_among(inputs))
    step = _CountingStep(program.gm, place, counted)
    with place.mode, torch.enable_grad(), counted:
        with torch.autograd.graph.saved_tensors_hooks(counted.keep, lambda x: x):
            # What only a tensor's value tells the size of cannot be counted without values.
            results = [] if program.is_untraced else step.run(*inputs)
        counted.end_of_forward([*inputs, *step.held])
        run_backward(results, inputs)
    for each in program.gathered if world_size > 1 else ():
        counted.counts = add_counts(counted.counts, gather_counts(each, world_size))
        counted.kept_bytes += each.full_bytes
    return counted


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    return int(x.numel()) * x.element_size()
