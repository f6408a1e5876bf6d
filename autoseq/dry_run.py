"""One training step of a local graph on fake tensors, to count what it would send. Computes and sends nothing.

The collectives that the compiler inserted, those inside losses and strategies, and their gradients all reach the dispatcher as
functional collectives, forward and backward; a dispatch mode counts them there, by the conventions of `runtime.traffic`.
What strategies send inside opaque operators is counted by their formulas. Tests hold the result to what the counting backend
sees on real ranks.
"""

import contextlib
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from autoseq.passes.sizes import hint
from autoseq.planner import Plan
from autoseq.program import Gathered, Program
from autoseq.runtime.moves import move_traffic
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.traffic import SILENT, Traffic, all_gather_traffic, all_reduce_traffic, all_to_all_traffic, reduce_scatter_traffic

Counts = dict[str, Traffic]
"""Op (named as the counting backend names it) -> messages and bytes of rank 0."""


def step_traffic(program: Program, world_size: int) -> Counts:
    """What rank 0 sends in one forward and backward of a program, and for those outputs that a later part of the model gathers."""
    if world_size == 1:
        return {}
    gathers = reduce(add_counts, (gather_counts(each, world_size) for each in program.gathered), Counts())
    if program.whole:
        return gathers
    counted = CountCollectives(world_size)
    place = place_of(program)
    inputs = [place.convert(x) for x in program.inputs]
    with place.mode, torch.enable_grad(), counted:
        run_backward(Step(program.gm, place).run(*inputs), inputs)
    return add_counts(add_counts(counted.counts, _opaque(program.plan, world_size)), gathers)


def gather_counts(gathered: Gathered, world_size: int) -> Counts:
    """What rank 0 sends to gather an output; the gradient that comes back is cut up, which moves nothing."""
    return {"all_gather": all_gather_traffic(gathered.shard_bytes, world_size)}


class _Meta:
    """Where a program made on the meta device runs: there, which is several times faster than a fake mode. It knows no symbolic sizes."""

    mode = contextlib.nullcontext()

    def convert(self, x: Any) -> Any:
        if isinstance(x, torch.SymInt):
            return hint(x)
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty([hint(size) for size in x.shape], dtype=x.dtype, device="meta", requires_grad=x.requires_grad)


class _Fake:
    """Where any other program runs; symbolic sizes are those of its trace."""

    def __init__(self, inputs: Sequence[object]) -> None:
        mode = detect_fake_mode(inputs)
        assert mode is not None
        self.mode = mode

    def convert(self, x: Any) -> Any:
        if isinstance(x, torch.SymInt):
            return hint(x)
        if not isinstance(x, torch.Tensor):
            return x
        if not isinstance(x, FakeTensor):
            return self.mode.from_tensor(x, static_shapes=True)
        if all(isinstance(size, int) for size in x.shape):
            return x
        with self.mode:
            return torch.empty([hint(size) for size in x.shape], dtype=x.dtype, device=x.device, requires_grad=x.requires_grad)


Place = _Meta | _Fake


def place_of(program: Program) -> Place:
    """Where a program is run without computing anything."""
    on_meta = all(x.device.type == "meta" for x in program.inputs if isinstance(x, torch.Tensor))
    return _Meta() if on_meta else _Fake(program.inputs)


def add_counts(a: Counts, b: Counts) -> Counts:
    """The sum of two counts, op by op."""
    return {op: a.get(op, SILENT) + b.get(op, SILENT) for op in sorted(a.keys() | b.keys())}


def run_backward(results: Sequence[Any], inputs: Sequence[object]) -> None:
    """The gradients of the loss if the program returns a scalar, else of everything it returns."""
    outputs = [r for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
    outputs = [r for r in outputs if r.dim() == 0][:1] or outputs
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    if outputs and leaves:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(r) for r in outputs], allow_unused=True)


class Step(fx.Interpreter):
    """Runs the graph with gradients on; attributes that the graph holds hold no data either."""

    def __init__(self, gm: fx.GraphModule, place: Place) -> None:
        super().__init__(gm)
        self._place = place

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._place.convert(super().get_attr(target, args, kwargs))


class CountCollectives(TorchDispatchMode):
    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.counts: Counts = {}
        self._P = world_size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _COLLECTIVES:
            op, count = _COLLECTIVES[func]
            self.counts[op] = self.counts.get(op, SILENT) + count(self._P, *args)
        return func(*args, **(kwargs or {}))


def _bytes(x: torch.Tensor) -> int:
    return int(x.numel()) * x.element_size()


def _all_to_all(P: int, x: torch.Tensor, recv_sizes: list[int], send_sizes: list[int], *_: Any) -> Traffic:
    row = _bytes(x) // max(1, x.shape[0])
    return all_to_all_traffic([int(size) * row for size in send_sizes], 0)


_ops = torch.ops._c10d_functional
_COLLECTIVES = {
    _ops.all_reduce.default: ("all_reduce", lambda P, x, *_: all_reduce_traffic(_bytes(x), P)),
    _ops.all_gather_into_tensor.default: ("all_gather", lambda P, x, *_: all_gather_traffic(_bytes(x), P)),
    _ops.reduce_scatter_tensor.default: ("reduce_scatter", lambda P, x, *_: reduce_scatter_traffic(_bytes(x), P)),
    _ops.all_to_all_single.default: ("all_to_all", _all_to_all),
    torch.ops.autoseq.move_rows.default: ("all_to_all", lambda P, *args: move_traffic(*args)),
}


def _opaque(plan: Plan, world_size: int) -> Counts:
    counts: Counts = {}
    for planned in plan.sites:
        sent = STRATEGIES[planned.strategy].opaque(planned.site.site, world_size, plan.layout, planned.site.ways)
        counts = add_counts(counts, {op: traffic for op, traffic in sent.items() if traffic != SILENT})
    return counts
