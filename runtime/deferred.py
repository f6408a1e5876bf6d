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
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.autograd import Function
from torch.utils._pytree import tree_leaves, tree_map_only

from autoseq.runtime.collectives import own_rows, sharded_rows
from autoseq.runtime.errors import UnsupportedError
from autoseq.runtime.layout import Layout
from autoseq.runtime.output_shard import OutputShard, Watch
from autoseq.runtime.whole_value import version_of

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
    shard = OutputShard(name, tuple(shape), local, rows, watch)
    return _Defer.apply(local, shard)


class DeferredTensor(Tensor):
    """A tensor of global shape that holds this rank's rows, and gathers the rest when an operation needs values."""

    _shard: OutputShard

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def wrap(shard: OutputShard) -> DeferredTensor:
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
        elif any(whole.has_memory_of(result) for result in results):
            whole.note_shared()

    def check_aliases(self) -> None:
        """Raises UnsupportedError if something wrote to memory that this output has too, on one device."""
        self._shard.whole.check_aliases()

    def share_memory_with(self, other: Tensor, name: str) -> None:
        """On one device `other`, called `name`, has memory of this output: a write to one is refused where it would show in the other."""
        if isinstance(other, DeferredTensor):
            self._shard.whole.share_with(other._shard.whole)
        else:
            self._shard.whole.share_with_plain(other, name)

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
        return DeferredTensor.wrap(OutputShard.gathered(inner["_full"]))

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


class _Defer(Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, shard: OutputShard) -> DeferredTensor:
        ctx.rows, ctx.watch = shard.rows, shard.watch
        return DeferredTensor.wrap(shard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.watch is not None:
            ctx.watch.gradient(grad)
        return own_rows(grad, ctx.rows), None
