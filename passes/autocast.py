"""Which autocast is on where a node of Dynamo's graph stands: an opened operator must cast as it did itself."""

import torch
from torch import fx

ENTER, EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


def autocast_dtype(node: fx.Node, device: str) -> torch.dtype | None:
    """The dtype that autocast on `device` casts to at `node`; None where it is off."""
    open_regions: list[fx.Node] = []
    for other in node.graph.nodes:
        if other is node:
            break
        if other.target is ENTER and other.args[0] == device:
            open_regions.append(other)
        elif other.target is EXIT and other.args[0] in open_regions:
            open_regions.remove(other.args[0])
    if open_regions:
        _, dtype, enabled, *_ = (*open_regions[-1].args, None, True)
        return (dtype or torch.get_autocast_dtype(device)) if enabled else None  # type: ignore[return-value]
    ambient = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if ambient else None
