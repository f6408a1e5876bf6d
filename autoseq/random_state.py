"""Where a program draws random numbers, and the state of what it draws from: ranks that draw alike have the same."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from autoseq.passes.autograd_functions import AUTOGRAD_FUNCTION, FUNCTIONS
from autoseq.program import Program

Draws = frozenset[torch.device]
"""The devices whose generators a program draws from."""


def drawing_devices(program: Program) -> Draws:
    """The devices of what it draws: data that a loader shuffles on the host is nothing to a program that draws on a GPU."""
    if program.is_untraced:  # what its operators do is not known
        return _devices(program.inputs) | {torch.device("cpu")}
    return _devices([node.meta.get("val") for node in program.before.nodes if _draws(node)])


def random_state(draws: Draws) -> tuple[int, ...]:
    """Numbers that change when this process draws random ones there. Nothing waits for a device."""
    return tuple(number for device in sorted(draws, key=str) for number in _state(device))


def _draws(node: fx.Node) -> bool:
    if node.target is AUTOGRAD_FUNCTION:
        return FUNCTIONS[str(node.args[3])].draws
    seeded = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return seeded or node.target is torch.ops.aten.dropout.default


def _devices(values: Sequence[object]) -> Draws:
    return frozenset(x.device for x in tree_leaves(list(values)) if isinstance(x, Tensor))


def _state(device: torch.device) -> tuple[int, ...]:
    if device.type != "cuda":
        return (zlib.crc32(torch.get_rng_state().numpy().tobytes()),)
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    return generator.initial_seed(), generator.get_offset()
