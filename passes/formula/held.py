"""Tensors whose content is known when a program is compiled: a registered buffer that holds a triangle reads as `k <= q`.

The content of a module's buffer is looked at once. A node that was read so is marked, and the compiled program compares the buffer
with what it was whenever it may have changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from autoseq.passes.formula.movement import choose
from autoseq.passes.formula.values import Index, Unreadable, const

if TYPE_CHECKING:
    from autoseq.passes.formula.reader import Reader

CONTENT = "content"
"""The key in a buffer's metadata for the tensor itself."""

READ = "content_was_read"
"""The key in a buffer's metadata that says: the program is compiled for this content."""


def content_of(node: fx.Node) -> Tensor | None:
    """The tensor that an input or attribute of the graph holds, if its content is known."""
    content = getattr(node.graph.owning_module, str(node.target)) if node.op == "get_attr" else node.meta.get(CONTENT)
    return content if isinstance(content, Tensor) and not isinstance(content, FakeTensor) and content.device.type != "meta" else None


def held(reader: Reader, node: fx.Node, index: Index) -> Any:
    """The value of a number, or of a matrix of two values, one of them on a band of diagonals. Unreadable for any other."""
    content, dtype = content_of(node), node.meta["val"].dtype
    if content is None or content.requires_grad:
        raise Unreadable(node)
    if not content.dim() and node.op == "get_attr":  # a constant of the graph; a buffer of one number is looked up, since it may change
        return _typed(content.item(), dtype)
    if content.dim() < 2 or min(content.shape[-2:]) < 2 or content.numel() != content.shape[-1] * content.shape[-2]:
        raise Unreadable(node)
    matrix = content.reshape(content.shape[-2:])
    for value in (matrix[0, 0], matrix[-1, 0], matrix[0, -1]):
        diagonals, others = _diagonals(matrix == value), matrix[matrix != value]
        if diagonals is not None and others.numel() and bool((others == others[0]).all()):
            node.meta[READ] = True
            return choose(_between(diagonals, index, matrix.shape), _typed(value.item(), dtype), _typed(others[0].item(), dtype), dtype)
    raise Unreadable(node)


def _typed(value: Any, dtype: torch.dtype) -> Any:
    return const(float(value)) if dtype.is_floating_point else sympy.sympify(value)


def _diagonals(inside: Tensor) -> tuple[int, int] | None:
    """The lowest and highest diagonal k - q of a mask that is exactly the band between them."""
    rows, columns = inside.shape
    ahead = torch.arange(columns, device=inside.device) - torch.arange(rows, device=inside.device)[:, None]
    found = ahead[inside]
    low, high = int(found.min()), int(found.max())
    return (low, high) if bool(torch.equal(inside, (ahead >= low) & (ahead <= high))) else None


def _between(diagonals: tuple[int, int], index: Index, shape: torch.Size) -> Any:
    """A bound that no element of the matrix can break is none."""
    (low, high), (rows, columns), ahead = diagonals, shape, index[-1] - index[-2]
    above = ahead >= low if low > 1 - rows else sympy.true
    return sympy.And(above, ahead <= high if high < columns - 1 else sympy.true)
