"""Collectives that are posted now and waited for later, so that what stands between runs while they travel.

They are functional collectives: AOTAutograd and Inductor see them, order them on all ranks alike and free what they held. Run
eagerly, a failure says which group it was on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoseq.runtime.groups import SequenceGroup
from autoseq.runtime.messages import Described

# The functional forms keep their names from one torch release to the next.
_ops = torch.ops._c10d_functional


@dataclass(frozen=True, slots=True)
class Posted:
    """What a collective will have brought to this rank; `op` is its name in errors."""

    op: str
    group: SequenceGroup
    coming: Tensor

    def arrived(self) -> Tensor:
        """Wait for it (on CUDA: make the current stream wait). Raises MessageError."""
        if self.group.size == 1:
            return self.coming
        with Described(f"waiting for {self.op}", self.group):
            return _ops.wait_tensor(self.coming)


def post_all_to_all(group: SequenceGroup, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Posted:
    """Rank i gets the i-th piece of the flat x; what the ranks send here comes in rank order. Sizes are in elements."""
    return _post("all-to-all", group, x, lambda: _ops.all_to_all_single(x, list(recv_sizes), list(send_sizes), group.name))


def post_all_gather(group: SequenceGroup, shard: Tensor) -> Posted:
    """Every rank's flat shard, in rank order. Sends P-1 shards."""
    return _post("all-gather", group, shard, lambda: _ops.all_gather_into_tensor(shard, group.size, group.name))


def post_reduce_scatter(group: SequenceGroup, shards: Tensor) -> Posted:
    """The sum over ranks of this rank's P-th of the flat shards. Sends P-1 of them."""
    return _post("reduce-scatter", group, shards, lambda: _ops.reduce_scatter_tensor(shards, "sum", group.size, group.name))


def _post(op: str, group: SequenceGroup, alone: Tensor, call: Callable[[], Tensor]) -> Posted:
    """`alone` is what it brings to a group of one."""
    if group.size == 1:
        return Posted(op, group, alone)
    with Described(op, group):
        return Posted(op, group, call())

