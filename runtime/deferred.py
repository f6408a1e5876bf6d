"""Outputs that stay sharded until their values are needed.

A compiled program's sharded output comes back as a `DeferredTensor`: the global shape and dtype, holding only this rank's
rows. The first operation that needs values gathers them, once; a program that computes its loss outside the model, prints,
indexes or saves the output sees what it would see on one device. `repr`, shapes and the like never communicate.

The wrapper is made by an autograd function of the shard, so it is an ordinary tensor to autograd; below autograd,
`__torch_dispatch__` puts the gathered value in its place. The gradient that comes back is replicated, and each rank takes its
rows of it: the backward pass moves nothing.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import TracingContext
from torch.autograd import Function
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from autoseq.runtime.collectives import ShardedRows, own_rows, sharded_rows
from autoseq.runtime.errors import RankMismatchError, RendezvousError, UnsupportedError
from autoseq.runtime.groups import process_group
from autoseq.runtime.layout import Layout
from autoseq.runtime.rendezvous import exchange, timeout_s
from autoseq.runtime.whole_value import Alias, WholeValue

TIMEOUT_VARIABLE = "AUTOSEQ_GATHER_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 60.0


# These give an alias of the whole output, so they need no values yet.
_STILL_DEFERRED = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}

# Methods that read memory without going through the dispatcher, or give it to somebody who may write into it unseen.
_READ_MEMORY = (
    "numpy", "tolist", "cpu", "data_ptr", "storage", "__array__", "__dlpack__", "apply_", "map_", "map2_", "as_subclass",
)  # fmt: skip


def defer(
    local: Tensor,
    *,
    name: str,
    shape: tuple[int, ...],
    dim: int,
    outer: int,
    length: int,
    local_length: int,
    layout: Layout,
    group: str,
    watch: Watch | None = None,
) -> DeferredTensor:
    """The output called `name`, of global `shape`, of which `local` is this rank's padded shard.

    The other keywords describe the sharded dim as in `runtime.collectives`. Sends nothing.
    """
    rows = sharded_rows(local, dim, outer, length, local_length, layout, group)
    shard = _Shard(name, tuple(shape), local, rows, watch)
    return _Defer.apply(local, shard)


class Watch(Protocol):
    """Hears what becomes of an output."""

    is_read: bool  # by something besides a later part of the program

    def before_read(self, sent_bytes: int) -> None:
        """An operation that is in no part of the program is about to read the values, which are not here; a rank sends so many bytes."""

    def before_gather(self) -> None:
        """The values are about to be gathered."""

    def gradient(self, grad: Tensor) -> None:
        """The gradient of the whole value has come back."""


class DeferredTensor(Tensor):
    """A tensor of global shape that holds this rank's rows, and gathers the rest when an operation needs values."""

    _shard: _Shard

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def wrap(shard: _Shard) -> DeferredTensor:
        """A new wrapper of `shard`, without history."""
        wrapper = Tensor._make_wrapper_subclass(
            DeferredTensor, shard.shape, dtype=shard.dtype, device=shard.device, requires_grad=False
        )
        wrapper._shard = shard
        torch._C._set_throw_on_mutable_data_ptr(wrapper)  # it has no memory: whatever reads some gets an error
        return wrapper

    @property
    def local(self) -> Tensor:
        """This rank's valid rows, in its local order, without padding. Differentiable; sends nothing."""
        self._shard.whole.check_aliases()
        rows = self._shard.rows
        return rows.trim(own_rows(self.full(), rows) if self.may_be_written else self._shard.padded)

    @property
    def name(self) -> str:
        """Of the output, with the source line that made it."""
        return self._shard.name

    def watch(self) -> Callable[[], bool]:
        """Returns a function that says whether the whole value was written to since. Keeps nothing alive; sends nothing."""
        return self._shard.whole.watch()

    @property
    def may_be_written(self) -> bool:
        """Whether something may have been written into the whole value: then the shard it came from is out of date."""
        return self._shard.is_gathered and (self._shard.whole.may_be_written or self.is_inference() or self._version > 0)

    @property
    def data(self) -> Tensor:
        """The values without history, deferred too. What is set lies in the memory of the given tensor, as on one device."""
        return Tensor.data.__get__(self)  # pyright: ignore[reportAttributeAccessIssue]

    @data.setter
    def data(self, value: Tensor) -> None:
        wrapper = value if isinstance(value, DeferredTensor) else DeferredTensor.wrap(self._shard.replaced(value))
        Tensor.data.__set__(self, wrapper)  # pyright: ignore[reportAttributeAccessIssue]
        self._shard = wrapper._shard

    def full(self) -> Tensor:
        """The whole value as a plain tensor: gathered if it has not been yet. Differentiable."""
        return self.view(self.shape)

    @torch._disable_dynamo
    def given_away(self) -> Tensor:
        """The memory of the whole value, without history, for a tensor that is to share it."""
        whole, value = self._shard.whole, self._read()
        whole.note_shared()
        whole.may_be_written = True  # by that tensor, perhaps, whose version is its own
        return value.detach()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory of the whole value; in a trace the wrapper's own, which only tells tensors apart."""
        if TracingContext.try_get() is not None:
            return Tensor.untyped_storage(self)
        return self.given_away().untyped_storage()

    def taken_in(self) -> Tensor:
        """`full`, for a compiled part of the program that has this output among its inputs."""
        self._shard.is_taken_in = True
        watch, whole = self._shard.watch, self._shard.whole
        was_read = watch is not None and watch.is_read
        whole.is_taken = True
        full = self.full()
        if watch is not None:
            watch.is_read = was_read
        return full

    def writes_of_a_part(self) -> Callable[[], bool]:
        """Before a part takes it in: returns a function that says whether the part wrote to it."""
        if not self.is_inference() or not self._shard.whole.aliases:
            version = version_of(self)
            return lambda: version_of(self) != version
        self._shard.is_taken_in = True
        self._read()
        self._shard.whole.note_shared()  # no version will tell
        return self._shard.whole.watch()

    def given_back(self, is_written: bool, results: Sequence[Any]) -> None:
        """The part that took it in has returned these results, or none if it failed."""
        whole = self._shard.whole
        whole.is_taken = False
        if is_written:
            whole.note_write()
        elif any(_have_one_memory(result, whole.value) for result in results):
            whole.note_shared()

    def check_aliases(self) -> None:
        """Raises UnsupportedError if something wrote to memory that this output has too, on one device."""
        self._shard.whole.check_aliases()

    def share_memory_with(self, other: Tensor, name: str) -> None:
        """On one device `other`, called `name`, has memory of this output: a write to one is refused where it would show in the other."""
        if isinstance(other, DeferredTensor):
            self._shard.whole.share_with(other._shard.whole)
            return
        alive, values, version = weakref.ref(other), other.detach(), version_of(other)  # the detached tensor counts the writes too
        alias = Alias(name, lambda: version_of(values) != version, lambda: alive() is not None)
        self._shard.whole.aliases.append(alias)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        grad = f", grad_fn=<{self.grad_fn.name()}>" if self.grad_fn else ", requires_grad=True" if self.requires_grad else ""
        return f"DeferredTensor({self._shard}{grad})"

    def __str__(self) -> str:
        return str(self.full())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.full().detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        plain = self.full() if self.grad_fn else self.full().detach().requires_grad_(self.requires_grad)
        return memo.setdefault(id(self), copy.deepcopy(plain, memo))

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        # For torch.compile: a compiled function takes the full value in. No context, so that no guard tells outputs apart.
        return ["_full"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> DeferredTensor:
        return DeferredTensor.wrap(_Shard.gathered(inner["_full"]))

    def _read(self) -> Tensor:
        """`_full`, for an operation. (A guard of Dynamo's looks at `_full` itself, before a part takes it in.)"""
        self._shard.before_read()
        return self._full

    @property
    def _full(self) -> Tensor:
        if self._shard.watch is not None:  # another compiler takes the value from here too
            self._shard.watch.is_read = True
        return self._shard.full()

    @property
    def gathered(self) -> Tensor | None:
        """The whole value without gradient, if it is here. Sends nothing."""
        return self._shard.full() if self._shard.is_gathered else None

    @classmethod
    @torch._disable_dynamo  # between the parts of a model it would be compiled as one more part
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _STILL_DEFERRED:
            return cls.wrap(args[0]._shard)
        kwargs = kwargs or {}
        if torch.Tag.inplace_view in func.tags:
            if isinstance(args[0], DeferredTensor):
                raise UnsupportedError(f"{func} would change the shape of a deferred output in place. Call .full() on it first.")
            args = args[0], *tree_map_only(DeferredTensor, lambda x: x.given_away(), args[1:])  # set_ shares the memory
        plain_args, plain_kwargs = (tree_map_only(DeferredTensor, lambda x: x._read(), given) for given in (args, kwargs))
        if _gives_view(func):
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, DeferredTensor):
                    x._shard.whole.note_shared()
        result = func(*plain_args, **plain_kwargs)
        if not func._schema.is_mutable:
            return result
        # An in-place operation returns the tensor it was given, and autograd insists on the very same object.
        written = _written(func, args, kwargs)
        return tree_map_only(Tensor, lambda out: written.get(id(out), out), result)


@cache
def _gives_view(func: Any) -> bool:
    return any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, DeferredTensor]:
    """The deferred tensors that an operation writes into, by the identity of their values."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    targets = [named.get(each.name) for each in func._schema.arguments if each.alias_info and each.alias_info.is_write]
    outputs = [target for target in tree_leaves(targets) if isinstance(target, DeferredTensor)]
    for output in outputs:
        output._shard.whole.note_write()
    return {id(output._full): output for output in outputs}


def _on_full(name: str) -> Any:
    def call(self: DeferredTensor, *args: Any, **kwargs: Any) -> Any:
        full = self.full()
        self._shard.whole.may_be_written = True
        return getattr(full, name)(*args, **kwargs)

    call.__name__ = name
    return call


for _name in _READ_MEMORY:
    setattr(DeferredTensor, _name, _on_full(_name))


class _Shard:
    """What a deferred tensor and its aliases share: this rank's rows and, once it is needed, the whole value."""

    def __init__(self, name: str, shape: tuple[int, ...], local: Tensor, rows: ShardedRows | None, watch: Watch | None = None) -> None:
        self.name, self.shape, self.dtype, self.device = name, shape, local.dtype, local.device
        self.padded, self._rows, self.watch = local, rows, watch
        self.is_taken_in = False  # by a part of the program, which warned of the gather
        self.whole = WholeValue(name)
        self._serial = _next_serial(rows.group.name) if rows else 0

    @classmethod
    def gathered(cls, value: Tensor) -> _Shard:
        """A whole value, as a compiled function gets it."""
        shard = cls("compiled input", tuple(value.shape), value, None)
        shard.whole.value = value
        return shard

    def replaced(self, value: Tensor) -> _Shard:
        """Another value in this one's place, of which every rank has the whole."""
        shard = _Shard(self.name, tuple(value.shape), value, None)
        shard._rows = self._rows if shard.shape == self.shape else None
        shard.whole, shard.is_taken_in = WholeValue(self.name, value.detach(), may_be_written=True), True
        return shard

    def before_read(self) -> None:
        """An operation is about to read the whole value."""
        if self.watch is not None and not (self.is_gathered or self.is_taken_in):
            self.watch.before_read((self.rows.group.size - 1) * self.padded.numel() * self.padded.element_size())

    def full(self) -> Tensor:
        """The whole value, without gradient. Gathered by the first call."""
        self.whole.check_aliases()
        if self.whole.value is None:
            self.whole.value = self._gather()
        return self.whole.value

    @property
    def is_gathered(self) -> bool:
        return self.whole.value is not None

    @property
    def rows(self) -> ShardedRows:
        """The sharded dim. Raises UnsupportedError for a value that came whole into a compiled function."""
        if self._rows is None:
            raise UnsupportedError(f".local of a {self.name} is not known inside torch.compile: take it outside.")
        return self._rows

    def _gather(self) -> Tensor:
        # Whoever watches operations (a FLOP counter, a fake mode) is not meant to see how the value gets here.
        with torch.no_grad(), _disable_current_modes():
            if self.watch is not None:
                self.watch.before_gather()
            self._meet()
            whole = self.rows.gather(self.padded.detach())
            # The value may be written to; the shard may be saved for the backward pass of whatever computed it.
            return whole.contiguous() if self.rows.group.size > 1 else whole.clone(memory_format=torch.contiguous_format)

    def _meet(self) -> None:
        """All ranks come for the same output, or each gets an error."""
        group = self.rows.group
        mine = f"{self.name!r} (number {self._serial} of this group's outputs, {_describe(self.shape, self.dtype)})"
        seconds = timeout_s(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S)
        try:
            theirs = exchange(group, "reading an output's values", mine.encode(), timeout_s=seconds, advice=_TOGETHER)
        except RendezvousError as error:
            raise RendezvousError(f"The output {mine} could not be gathered. {error}") from None
        for rank, other in enumerate(theirs):
            if other.decode() != mine:
                raise RankMismatchError(
                    f"Rank {group.rank} needs the values of the output {mine} while rank {rank} needs those of {other.decode()}. "
                    "Every rank must use the model's outputs in the same order: compute with them on all ranks, and print or save on one."
                )

    def __str__(self) -> str:
        state = "gathered" if self.is_gathered else "not gathered"
        local = tuple(self._rows.trim(self.padded).shape) if self._rows else self.shape
        return f"{self.name!r}, {_describe(self.shape, self.dtype)}, local shape {local}, {state}"


_TOGETHER = (
    "All ranks read an output's values together: compute on all ranks, print or save on one, as in `value = output[0, 0].item()` before "
    "`if rank == 0: print(value)`. `output.local`, this rank's rows, needs no other rank. If a rank that is missing ended with an error, "
    f"that error comes first. {TIMEOUT_VARIABLE} sets how many seconds are waited."
)


class _Defer(Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, shard: _Shard) -> DeferredTensor:
        ctx.rows, ctx.watch = shard.rows, shard.watch
        return DeferredTensor.wrap(shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.watch is not None:
            ctx.watch.gradient(grad)
        return own_rows(grad, ctx.rows), None


# How many outputs each living group has had: the n-th output on one rank belongs to the n-th on another. Kept by the group
# object, so a group that is made again under an old name counts from the start on every rank.
_counts: weakref.WeakKeyDictionary[dist.ProcessGroup, count[int]] = weakref.WeakKeyDictionary()


def _next_serial(group: str) -> int:
    return next(_counts.setdefault(process_group(group), count(1))) if group else 0


def version_of(x: Tensor) -> int:
    """How often autograd saw x written to; 0 for an inference tensor, which does not count."""
    return 0 if x.is_inference() else x._version


def _have_one_memory(result: Any, value: Tensor | None) -> bool:
    return type(result) is Tensor and value is not None and result.untyped_storage()._cdata == value.untyped_storage()._cdata


def _describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"shape {shape}, {dtype}"
