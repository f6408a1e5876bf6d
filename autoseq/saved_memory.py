"""How many bytes autograd keeps between a forward and its backward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of the distinct storages that `forward` saves for its backward, besides the model's parameters and buffers.

    Exact, and the same on every device and allocator: what is counted is what would be alive if the backward started now.
    A view counts as the storage that it keeps alive. The backward does not run.
    """
    kept: dict[int, Tensor] = {}  # by address; holding the tensors keeps an address from being used twice

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = forward()
    owned = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    total = sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in owned)
    del result
    return total
