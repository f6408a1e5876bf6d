"""Keys and values as one flat buffer, so that they travel in one message."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(*tensors: Tensor) -> Tensor:
    """The tensors one after the other, flat. Always a fresh buffer."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unpack(buffer: Tensor, *likes: Tensor) -> list[Tensor]:
    """Views of a flat buffer in the shapes of `likes`."""
    pieces = buffer.split([like.numel() for like in likes])
    return [piece.view(like.shape) for piece, like in zip(pieces, likes, strict=True)]
