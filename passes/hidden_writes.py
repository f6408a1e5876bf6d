"""Hidden writes: in-place writes that change a value and not its gradient, as autograd has them.

Part of `normalize`: the interpreter that runs Dynamo's graph while it is traced.

    with torch.no_grad():                    clamp = aten.clamp(w, -1, 1)                    # under no_grad
        w.clamp_(-1, 1)           →          written = autoseq.written(w, clamp)             # the value of clamp, the gradient of w
    y = linear(x, w)                         y = linear(x, written)

Functionalization knows one value a storage. Autograd knows several tensors of one storage, each with a history of its own: x, and
x.detach(), x.data, or a view that was made under no_grad. Here each history gets a storage of its own (a root), and a link joins what
shares memory. After every node that writes to a root, the linked roots take over the new value and keep their histories. Legal
because linked tensors have equal values whenever one is read, and because only a write of a root itself changes its history.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import PropagateUnbackedSymInts

from autoseq.passes.inline import example
from autoseq.passes.keep_hooks import is_hook
from autoseq.passes.late_writes import keeper_of, keepers
from autoseq.passes.source import source_line
from autoseq.passes.strided import Strided, strided
from autoseq.runtime.errors import UnsupportedError
from autoseq.runtime.written import WRITTEN

aten = torch.ops.aten


class WithHiddenWrites(nn.Module):
    """Dynamo's graph as a module that `aot_export_module` traces; `inputs` are its fake inputs. Its last results are those of hooks."""

    num_hooks = 0

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[object]) -> None:
        super().__init__()
        modes = [bool(node.args[0]) for node in gm.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)]
        ever = torch.is_grad_enabled() or any(modes)
        self.gm, self._trainable = gm, [ever and isinstance(x, Tensor) and x.requires_grad for x in inputs]

    def forward(self, *inputs: Any) -> Any:
        with fx_traceback.preserve_node_meta():
            mode = detect_fake_mode()
            assert mode is not None
            mode.epoch += 1
            histories = _Histories(self.gm, self._trainable)
            results = histories.run(*inputs)
            self.num_hooks = len(histories.hooks)
            return (*results, *histories.hooks)


_DETACHES = {aten.detach.default, torch.detach, "detach", "detach_"}
_DROPOUTS = {F.dropout, torch.dropout}
_LOOKUPS = {
    F.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    F.embedding_bag: ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights"),
}
_STRIDED = {aten.as_strided.default, torch.as_strided, torch.as_strided_copy, "as_strided"}
_MOVES_MEMORY = {"set_", "resize_", "resize_as_", "as_strided_", "as_strided_scatter"}
_TURNS = {  # in-place views: they change a tensor's dims, and write nothing
    "t_", "transpose_", "swapaxes_", "swapdims_", "unsqueeze_", "squeeze_", "rename_",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Link:
    """Tensors of two roots that share memory: y is x detached, or with x's history: a strided view of x, or x hooked."""

    x: Tensor
    y: Tensor
    read: Callable[[Tensor], Tensor] | None = None  # y's new value, where it has x's history
    write_back: Callable[[Tensor], Tensor] | None = None  # x's new value


class _Histories(PropagateUnbackedSymInts):
    """Runs a graph on functional tensors. A root is a storage; its tensors share one history."""

    def __init__(self, gm: fx.GraphModule, trainable: list[bool]) -> None:
        super().__init__(gm)
        self._trainable = iter(trainable)
        self._roots: dict[int, Tensor] = {}  # a tensor of each root, so that no other root gets its number
        self._recorded: set[int] = set()  # roots of which autograd may know a history
        self._links: list[_Link] = []
        self._hooked_views: dict[int, str] = {}  # by root: where the hook was registered
        self._unversioned: set[int] = set()  # roots made by `.data`, whose writes no version counter tells
        self._made_in: dict[int, Any] = {}  # by root: the checkpointed region that it was made in
        self._read_again: dict[int, str] = {}  # roots that a checkpointed region reads from outside, and where
        self._replaced: list[tuple[Tensor, Tensor]] = []  # tensors whose `.data` was set, and what they are then
        self.hooks: list[Tensor] = []  # results of hooks, which nothing might read
        self._unrecorded: dict[int, Tensor] = {}  # by tensor: the one that stands for it where no gradients are recorded

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._met(super().placeholder(target, args, kwargs), next(self._trainable))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._met(value, isinstance(value, FunctionalTensor) and value.requires_grad)

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        if n.op == "output":
            self._put_back()
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._call(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._call(super().call_method, target, args, kwargs)

    def _call(self, call: Callable[..., Any], target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.Tensor.set_ and len(args) == 2:
            return self._replace_data(*args)
        if getattr(target, "__name__", "") == "_lower_version_count_by_1":  # Dynamo's, behind a set `.data`
            return args[0]
        if getattr(target, "__name__", target) in _MOVES_MEMORY:
            raise self._refused(
                f"{getattr(target, '__name__', target)} at {source_line(self._node)} gives a tensor other memory, or memory another shape, "
                "which is not supported. Assign a new tensor instead (y = x), or write to the values (y.copy_(x))."
            )
        if target in _DETACHES:
            return self._detached(args[0], in_place=target == "detach_", versioned=target is not aten.detach.default)
        if is_hook(target, args):
            return [self._hooked(args[0][0], call(target, args, kwargs)[0])]
        if target in _STRIDED:
            return self._strided(*args, **kwargs)
        dropout = _Dropout(*args, **kwargs) if target in _DROPOUTS else None
        if dropout is not None and dropout.drops_nothing:
            return dropout.input
        if target in _LOOKUPS:
            args, kwargs = self._renormalized(_LOOKUPS[target], args, kwargs)
        self._note_reads(_tensors((args, kwargs)))
        originals: dict[int, Tensor] = {}
        if not torch.is_grad_enabled() and target not in _TURNS:
            args, kwargs = pytree.tree_map_only(FunctionalTensor, partial(self._without_history, originals), (args, kwargs))
        result = self._followed(call, target, args, kwargs)
        if dropout is not None and not dropout.inplace:
            return self._met(_new_root(result), _root(result) in self._recorded)
        return pytree.tree_map_only(FunctionalTensor, lambda x: originals.get(id(x), x), result)

    def _followed(self, call: Callable[..., Any], target: Any, args: Any, kwargs: Any) -> Any:
        """Call, note the roots of what comes out, and bring what was written to the roots that share its memory."""
        operands = _tensors((args, kwargs))
        recording = torch.is_grad_enabled() and any(_root(x) in self._recorded for x in operands)
        counts = [_count_writes(x) for x in operands]
        result = call(target, args, kwargs)
        written = [x for x, count in zip(operands, counts, strict=True) if _count_writes(x) != count]
        if recording:
            self._recorded.update(_root(x) for x in written if _is_differentiable(x))
        for x in _tensors(result):
            self._met(x, recording)
        self._spread(written)
        return result

    # Roots ------------------------------------------------------------------------------------------------------------

    def _met(self, value: Any, recorded: bool) -> Any:
        """Note a value's root, if it is a new one, and whether autograd may know a history of it."""
        if isinstance(value, FunctionalTensor) and _root(value) not in self._roots:
            self._roots[_root(value)] = value
            self._made_in[_root(value)] = self._node.meta.get("ac_graph_id")
            if recorded and _is_differentiable(value):
                self._recorded.add(_root(value))
        return value

    def _detached(self, x: FunctionalTensor, in_place: bool, versioned: bool) -> Tensor:
        """`x.detach()`: the same memory without the history. In place, every name of x gets the detached tensor."""
        if not _is_differentiable(x):
            return aten.detach.default(x)
        with _recording() if not x.is_base_tensor() else nullcontext():
            child = self._linked(x, aten.detach.default(x))
        if in_place:
            self._rename(x, child)
        if not versioned:
            self._unversioned.add(_root(child))
        return child

    def _without_history(self, originals: dict[int, Tensor], x: FunctionalTensor) -> Tensor:
        """The tensor that stands for x where no gradients are recorded: a write to it must leave x its history."""
        if _root(x) not in self._recorded:
            return x
        if id(x) not in self._unrecorded or _root(self._unrecorded[id(x)]) in self._recorded:
            with _recording() if not x.is_base_tensor() else nullcontext():
                self._unrecorded[id(x)] = self._linked(x, x)
        child = self._unrecorded[id(x)]
        originals[id(child)] = x
        return child

    def _strided(self, x: Tensor, size: Any, stride: Any, storage_offset: Any = None) -> Tensor:
        """`x.as_strided(…)` in a root of its own, linked to x."""
        values = x if torch.is_grad_enabled() else self._without_history({}, x)
        view = strided(x, values, size, stride, storage_offset)
        if not isinstance(view, Strided):
            raise self._refused(
                f"as_strided at {source_line(self._node)} reads memory that is not one tensor's: its operand {view}. "
                "Call contiguous() on the operand first, or write the view with slices, reshape or unfold."
            )
        made = self._met(_new_root(view.read(values)), _root(values) in self._recorded)
        self._links.append(_Link(values, made, view.read, view.write_back))
        return made

    def _replace_data(self, x: Tensor, value: Tensor) -> Tensor:
        """`x.data = value`: x gets the memory of another tensor and keeps its history; what shared its memory keeps the old one."""
        if x.shape != value.shape or x.dtype != value.dtype:
            raise self._refused(
                f"the .data set at {source_line(self._node)} changes shape or dtype, from {tuple(x.shape)} {x.dtype} to "
                f"{tuple(value.shape)} {value.dtype}, which is not supported. Assign a new tensor instead."
            )
        self._unversioned.add(_root(x))
        self._check_write({_root(x)})
        with _recording():
            made = self._met(_new_root(WRITTEN(x, value)), _root(x) in self._recorded)
        self._links.append(_Link(made, value))
        self._replaced.append((x, made))
        self._rename(x, made)
        return made

    def _put_back(self) -> None:
        """The tensors whose `.data` was set get the new values: the inputs among them are written back."""
        for x, made in self._replaced:
            with _recording():
                x.copy_(made)

    def _hooked(self, x: Tensor, result: Tensor) -> Tensor:
        """x with a hook, under all of x's names."""
        self.hooks.append(result)
        hooked: Any = self._node.args[0][0]  # type: ignore[index]
        made = self._met(_new_root(result), recorded=True)
        self._links.append(_Link(x, made, lambda values: values, lambda values: values))
        if example(hooked)._is_view():
            self._hooked_views[_root(made)] = source_line(self._node)
        self._rename(x, made)
        return made

    def _rename(self, x: Tensor, new: Tensor) -> None:
        for node in [node for node, value in self.env.items() if value is x]:
            self.env[node] = new

    def _refused(self, message: str) -> UnsupportedError:
        self.extra_traceback = False  # the message says where
        return UnsupportedError(message)

    def _linked(self, x: Tensor, value: Tensor) -> Tensor:
        """A root of its own with the value of `value`, linked to x."""
        child = _new_root(value)
        self._met(child, recorded=False)
        self._links.append(_Link(x, child))
        return child

    def _spread(self, written: Iterable[Tensor]) -> None:
        """Give the roots that are linked to written ones the new values, with the histories that they have."""
        reached = [_root(x) for x in written]
        for root in reached:  # grows
            for link in self._links:
                for source, target in ((link.x, link.y), (link.y, link.x)):
                    if _root(source) == root and _root(target) not in reached:
                        self._take_over(target, source, link.read if source is link.x else link.write_back)
                        reached.append(_root(target))
        self._check_write(set(reached))

    def _check_write(self, roots: set[int]) -> None:
        """Refuse what a functional graph would compute otherwise than one device."""
        where = source_line(self._node)
        for root in roots & self._hooked_views.keys():
            raise self._refused(
                f"the write at {where} goes to memory of a view that has a hook ({self._hooked_views[root]}); autograd drops the hook "
                "then. Register the hook after the write, or hook a tensor that is no view (y = y.clone())."
            )
        for root in roots & self._read_again.keys():
            raise self._refused(
                f"the write at {where} goes to a tensor that a checkpointed region reads ({self._read_again[root]}): on one device the "
                "region runs again in the backward, with the new values, and writes again. Write outside of the region, before it."
            )
        if roots & self._unversioned and (keeper := self._keeper(roots)) is not None:
            raise self._refused(
                f"the write at {where} goes through .data to a tensor that is kept for the backward of {source_line(keeper)}, which would "
                "compute with the new values, unnoticed by autograd. Write before the tensor is used, or use a clone of it."
            )

    def _keeper(self, roots: set[int]) -> fx.Node | None:
        """What keeps for its backward what this node writes to."""
        written = [n for n in self._node.all_input_nodes if any(_root(x) in roots for x in _tensors(self.env[n]))]
        return keeper_of(self._node, written, self._keepers)

    @cached_property
    def _keepers(self) -> dict[int, fx.Node]:
        return keepers(self.graph)

    def _note_reads(self, operands: Iterable[Tensor]) -> None:
        region = self._node.meta.get("ac_graph_id")
        for x in operands if region is not None else ():
            if self._made_in.get(_root(x)) != region:
                self._read_again.setdefault(_root(x), source_line(self._node))

    def _take_over(self, target: Tensor, source: Tensor, same_history: Callable[[Tensor], Tensor] | None) -> None:
        if same_history is not None:
            with _recording():
                target.copy_(same_history(source))
            return
        if target.shape != source.shape:
            raise self._refused(
                f"the write at {source_line(self._node)} goes to a tensor whose dims were changed in place after it was detached, "
                "which is not supported. Change the dims of the result of a view instead (unsqueeze in place of unsqueeze_)."
            )
        with _recording():
            if _root(target) in self._recorded:
                target.copy_(WRITTEN(target, source))
            else:
                target.copy_(aten.detach.default(source) if _root(source) in self._recorded else source)

    def _renormalized(self, names: Sequence[str], args: Any, kwargs: Any) -> Any:
        """The arguments of an embedding without its max_norm, after the write to its weight that max_norm asks for."""
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        max_norm = given.pop("max_norm", None)
        if max_norm is None:
            return args, kwargs
        weight = self._without_history({}, given["weight"])
        with torch.no_grad():
            torch.embedding_renorm_(weight, given["input"].contiguous(), max_norm, given.get("norm_type", 2.0))
        self._spread([weight])
        return (), given


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, FunctionalTensor)]


def _is_differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _root(x: Any) -> int:
    return x.elem.untyped_storage()._cdata


def _count_writes(x: Any) -> int:
    return torch._functionalize_mutation_counter(x.elem)  # pyright: ignore[reportAttributeAccessIssue]


def _new_root(x: Any) -> Tensor:
    """A functional tensor with the present value of x and a storage of its own."""
    return FunctionalTensor.to_functional(x.from_functional())


@contextmanager
def _recording() -> Iterator[None]:
    """Gradients are recorded: a view is made anew from its base where it is read after a write, and must keep its history."""
    if torch.is_grad_enabled():
        yield
        return
    with torch.enable_grad():
        yield


@dataclass(frozen=True, slots=True)
class _Dropout:
    """The arguments of `F.dropout` and `torch.dropout`; the latter calls its third `train`."""

    input: Any
    p: float = 0.5
    training: bool = True
    inplace: bool = False
    train: bool = True

    @property
    def drops_nothing(self) -> bool:
        """Then it returns its operand, this very tensor, on one device too."""
        return isinstance(self.input, Tensor) and (not (self.training and self.train) or self.p == 0)
