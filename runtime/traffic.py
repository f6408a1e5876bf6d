"""What a collective sends, counted one way everywhere.

The dry run of a graph, the costs of strategies, and the backend that counts real messages all use these conventions, so a
formula and a measurement can be compared as integers. Bytes are those one rank sends, by the
bandwidth-optimal algorithm (Chan et al., "Collective communication", 2007); a collective is one message, and so is one send.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Traffic:
    """Messages posted and bytes sent by one rank."""

    messages: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.messages + other.messages, self.bytes + other.bytes)


SILENT = Traffic()


def all_gather_traffic(shard_bytes: int, P: int) -> Traffic:
    """Each rank's shard visits the P-1 others."""
    return Traffic(1, (P - 1) * shard_bytes) if P > 1 else SILENT


def reduce_scatter_traffic(full_bytes: int, P: int) -> Traffic:
    """All but the own P-th of the full buffer leaves."""
    return Traffic(1, (P - 1) * full_bytes // P) if P > 1 else SILENT


def all_reduce_traffic(full_bytes: int, P: int) -> Traffic:
    """A reduce-scatter and an all-gather of the same buffer, in one message."""
    return Traffic(1, 2 * (P - 1) * full_bytes // P) if P > 1 else SILENT


def all_to_all_traffic(send_bytes: list[int], rank: int) -> Traffic:
    """What is addressed to ranks other than `rank`."""
    return Traffic(1, sum(send_bytes) - send_bytes[rank]) if len(send_bytes) > 1 else SILENT


def send_traffic(message_bytes: int) -> Traffic:
    """One point-to-point message."""
    return Traffic(1, message_bytes)
