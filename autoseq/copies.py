"""Copies of a parallelized model are parallelized too: `copy.deepcopy`, an EMA's copy, a pickle.

`nn.Module` leaves the compiled call out of what is copied, and a copy would run whole without a word. A model keeps its options, and is
copied by way of a function that compiles the copy with them. No pickle keeps a device mesh: a model that had one says so when it is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from autoseq.backend import autoseq

log = logging.getLogger("autoseq")

_REDUCE = "__reduce_ex__"


class _Options:
    """The options of a model and its copies."""

    def __init__(self, given: Mapping[str, Any], *, lost_mesh: bool = False) -> None:
        self.given, self.lost_mesh = dict(given), lost_mesh

    def __deepcopy__(self, memo: dict[int, Any]) -> _Options:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        kept = {name: value for name, value in self.given.items() if name != "mesh"}
        return _unpickled_options, (kept, self.lost_mesh or self.given.get("mesh") is not None)


def _unpickled_options(given: Mapping[str, Any], lost_mesh: bool) -> _Options:
    return _Options(given, lost_mesh=lost_mesh)


def compile_with_copies(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Compile `model` in place for this backend, and every copy that is made of it."""
    _compile(model, _Options(options))


def _compile(model: nn.Module, options: _Options) -> None:
    # Into the instance's dict: a copy has no parameters yet, with which __setattr__ of a model's own may not get along.
    model.__dict__["_compiled_call_impl"] = torch.compile(model._call_impl, backend=autoseq, options=dict(options.given))

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        make, arguments, state, *rest = type(self).__reduce_ex__(self, protocol)
        return _copied, (options, make, arguments), _without_reduce(state), *rest

    model.__dict__[_REDUCE] = MethodType(reduce, model)


def _without_reduce(state: Any) -> Any:
    """The state of a model of which a copy makes this part anew; of any form, as a class may define its own."""
    return {name: value for name, value in state.items() if name != _REDUCE} if isinstance(state, dict) else state


def _copied(options: _Options, make: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    model = make(*arguments)
    if options.lost_mesh:
        log.warning(
            "an unpickled %s had been parallelized over a device mesh, which a pickle does not keep: it runs whole until "
            "autoseq.parallelize(model, mesh=...) is called", type(model).__qualname__,
        )  # fmt: skip
    else:
        _compile(model, options)
    return model
