"""What one compiled program is given, call by call, for its group's comparison (`step_check`), and the hooks on what it returns."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from autoseq.apart import apart
from autoseq.dynamo_stack import Part
from autoseq.optimizer_steps import count_steps_of
from autoseq.random_state import Draws, random_state
from autoseq.runtime.deferred import DeferredTensor
from autoseq.runtime.errors import OptionError
from autoseq.runtime.fingerprint import compressed
from autoseq.runtime.groups import SequenceGroup
from autoseq.seen_weights import Weights
from autoseq.step_check import StepCheck, step_check
from autoseq.steps_at_exit import read_at_exit

EVERY_VARIABLE = "AUTOSEQ_CHECK_EVERY"
DEFAULT_EVERY = 100
"""Steps after which whole parameters are compared again: a few microseconds a parameter and one reading of the weights, over 100 steps."""

Noting = Callable[[str, int], None]
"""Hears the name of an output and the bytes that a rank sends."""

_calls = count(1)
_made: WeakIdKeyDictionary = WeakIdKeyDictionary()  # outputs of parts of models: their version, and whether a later part took them in


def check_every() -> int:
    """Steps from one comparison of the weights to the next; 0 for never again. Raises OptionError."""
    text = os.environ.get(EVERY_VARIABLE, str(DEFAULT_EVERY))
    if not text.isdecimal():
        raise OptionError(f"{EVERY_VARIABLE} must be a number of steps, or 0 to compare weights at the first call only; got {text!r}.")
    return int(text)


@dataclass(frozen=True, slots=True)
class _Kinds:
    """The places of a program's inputs by how they are compared."""

    integers: Sequence[int]
    floats: Sequence[int]
    numbers: Sequence[int]
    weights: Sequence[int]
    parameters: Sequence[int]  # of the weights
    differentiable: Sequence[int]
    owner: int | None  # the weight that stands for all: a parameter if there is one, for a forward may make its buffers anew
    device: torch.device  # the message travels from there

    @staticmethod
    def of(values: Sequence[object], owned: frozenset[int]) -> _Kinds:
        tensors = [i for i, x in enumerate(values) if isinstance(x, Tensor)]
        weights = [i for i in tensors if (i in owned or isinstance(values[i], nn.Parameter))]
        whole = [i for i in weights if type(values[i]) in (Tensor, nn.Parameter)]
        given = [i for i in tensors if i not in weights]
        floats = [i for i in given if values[i].is_floating_point() or values[i].is_complex()]  # type: ignore[attr-defined]
        numbers = [i for i, x in enumerate(values) if isinstance(x, int | float)]
        parameters = [i for i in whole if isinstance(values[i], nn.Parameter) and not values[i].is_inference()]  # type: ignore[attr-defined]
        owner = next((i for i in whole if isinstance(values[i], nn.Parameter)), next(iter(whole), None))
        devices: list[torch.device] = [values[i].device for i in tensors]  # type: ignore[attr-defined]
        device = next((each for each in devices if each.type != "cpu"), torch.device("cpu"))
        integers = [i for i in given if i not in floats]
        return _Kinds(integers, floats, numbers, whole, parameters, [*weights, *floats], owner, device)


class OutputWatch:
    """What a deferred output tells its group's comparison; `noting` hears of its reads outside the parts of the program."""

    def __init__(self, check: StepCheck, name: str, noting: Noting) -> None:
        self._check, self._name, self._noting = check, name, noting
        self.is_read = False

    def before_read(self, sent_bytes: int) -> None:
        """An operation is about to have its values gathered."""
        if not _in_backward():
            self._noting(self._name, sent_bytes)

    def before_gather(self) -> None:
        """Its values are about to be read."""
        if not _in_backward():
            self._check.read()

    def gradient(self, grad: Tensor) -> None:
        """A gradient came back to the whole value."""
        whole = grad.gathered if isinstance(grad, DeferredTensor) else grad  # another compiler wraps it again
        if self.is_read and whole is not None:
            with apart():
                self._check.sketch_floats(f"the gradient that comes back into the output {self._name}", whole, whole.dtype)
            self._check.read_after_backward()


class GivenInputs:
    """One compiled program's."""

    def __init__(self, group: SequenceGroup, names: Sequence[str], digest: str, owned: frozenset[int], *, draws: Draws, part: Part) -> None:
        """`owned` are the places of parameters and buffers."""
        self._group, self._names, self._owned, self.draws, self._part = group, names, owned, draws, part
        self._program, self._label = zlib.crc32(digest.encode()), f"program {digest[:12]}"
        self._kinds: _Kinds | None = None
        self._weight_names: Sequence[str] = ()
        self._integer_names: Sequence[str] = ()
        self._every, self._call = DEFAULT_EVERY, 0

    def agreed(self, values: Sequence[Any]) -> None:
        """The ranks have compared all inputs, weights too, through the store."""
        if self._group.size > 1:
            kinds = self._sort(values)
            step_check(self._group).have_weights(self._weights(kinds, values), every=0, agreed=True)

    def take(self, given: Sequence[Any], values: Sequence[Any]) -> None:
        """A call; `given` are its inputs as they came, `values` the same with deferred outputs gathered."""
        if self._group.size == 1:
            return
        check = step_check(self._group)
        if _in_backward():  # a checkpoint computes again what was compared
            check.read_after_backward()
            return
        kinds = self._kinds or self._sort(values)
        with_gradients = torch.is_grad_enabled() and any(values[i].requires_grad for i in kinds.differentiable)
        with apart():
            self._note(check, kinds, given, values, with_gradients)
        self._call = next(_calls)
        if not with_gradients and self._part != "later":
            check.post()

    def watch(self, locals_: Mapping[int, Tensor], results: Sequence[Any]) -> None:
        """What a call returns; `locals_` are this rank's shards of the outputs that are sharded, by their numbers."""
        if self._group.size == 1 or not torch.is_grad_enabled() or _in_backward():
            return
        returning: dict[Any, list[tuple[int, str, list[bool]]]] = {}
        for number, result in enumerate(results):
            output = locals_.get(number, result)
            if not isinstance(output, Tensor) or output.grad_fn is None:
                continue
            places = returning.setdefault(output.grad_fn, [])
            if number not in locals_:
                places.append((output.output_nr, f"the gradient that comes back into output {number}", self._mark(result)))
        if returning:
            step_check(self._group).expect_backward(self._call)
        for node, places in returning.items():
            node.register_prehook(_Returned(step_check(self._group), self._call, places))

    def output(self, name: str, noting: Noting) -> OutputWatch | None:
        """For a deferred output."""
        return OutputWatch(step_check(self._group), name, noting) if self._group.size > 1 else None

    def _sort(self, values: Sequence[Any]) -> _Kinds:
        kinds = self._kinds = _Kinds.of(values, self._owned)
        self._weight_names, self._integer_names = ([self._names[i] for i in places] for places in (kinds.weights, kinds.integers))
        self._every = check_every()
        count_steps_of([values[i] for i in kinds.parameters])
        read_at_exit()
        return kinds

    def _note(self, check: StepCheck, kinds: _Kinds, given: Sequence[Any], values: Sequence[Any], with_gradients: bool) -> None:
        drawn = random_state(self.draws)
        check.note(self._label, kinds.device, self._program, with_gradients, *(values[i] for i in kinds.numbers), *drawn)
        if kinds.integers:
            check.hash_integers(self._integer_names, [values[i] for i in kinds.integers])
        for i in kinds.floats:
            if not _is_made(given[i]):
                check.sketch_floats(self._names[i], compressed(values[i].detach()), values[i].dtype)
        check.have_weights(self._weights(kinds, values), every=self._every)

    def _weights(self, kinds: _Kinds, values: Sequence[Any]) -> Weights:
        weights = [values[i] for i in kinds.weights]
        owner = None if kinds.owner is None else values[kinds.owner]
        return Weights(self._program, owner, self._weight_names, weights, sum([values[i]._version for i in kinds.parameters]))

    def _mark(self, output: Tensor) -> list[bool]:
        """Whether a later part of the model takes this output in; then its gradient is no user's."""
        taken = [False]
        if self._part != "whole":
            _made[output] = output._version, taken
        return taken


@dataclass(frozen=True, slots=True)
class _Returned:
    """The hook of one node of a call: which of its gradients are compared."""

    check: StepCheck
    call: int
    places: Sequence[tuple[int, str, list[bool]]]

    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        with apart():
            for place, name, taken in self.places:
                gradient = gradients[place]
                if gradient is not None and not taken[0]:
                    self.check.sketch_floats(name, gradient, gradient.dtype)
        self.check.backward_of(self.call)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_made(value: Tensor) -> bool:
    """Whether an input is an output of an earlier part, and still what that returned."""
    if isinstance(value, DeferredTensor):
        return not value.may_be_written
    made: tuple[int, list[bool]] | None = _made.get(value)
    if made is None or made[0] != value._version:
        return False
    made[1][:] = [True]
    return True
