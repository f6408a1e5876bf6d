"""Collectives that are posted now and waited for later, so that what stands between runs while they travel.

They are functional collectives: AOTAutograd and Inductor see them, order them on all ranks alike and free what they held. Run
eagerly, a failure says which group it was on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autoseq.runtime.groups import SequenceGroup
from autoseq.runtime.messages import Described

# The functional forms keep their names from one torch release to the next.
_ops = torch.ops._c10d_functional


def arrived(group: SequenceGroup, posted: Tensor) -> Tensor:
    """Wait for what was posted (on CUDA: make the current stream wait). Raises MessageError."""
    if group.size == 1:
        return posted
    with Described("waiting for a collective", group):
        return _ops.wait_tensor(posted)


def post_all_to_all(group: SequenceGroup, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Tensor:
    """Rank i gets the i-th piece of the flat x; what the ranks send here comes in rank order. Sizes are in elements."""
    if group.size == 1:
        return x
    with Described("all-to-all", group):
        return _ops.all_to_all_single(x, list(recv_sizes), list(send_sizes), group.name)


def post_all_gather(group: SequenceGroup, shard: Tensor) -> Tensor:
    """Every rank's flat shard, in rank order. Sends P-1 shards."""
    if group.size == 1:
        return shard
    with Described("all-gather", group):
        return _ops.all_gather_into_tensor(shard, group.size, group.name)


def post_reduce_scatter(group: SequenceGroup, shards: Tensor) -> Tensor:
    """The sum over ranks of this rank's P-th of the flat shards. Sends P-1 of them."""
    if group.size == 1:
        return shards
    with Described("reduce-scatter", group):
        return _ops.reduce_scatter_tensor(shards, "sum", group.size, group.name)

