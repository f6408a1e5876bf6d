"""Messages between ranks inside an attention op, with errors that say which op, hop and peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from autoseq.runtime.errors import MessageError
from autoseq.runtime.groups import SequenceGroup, process_group


@dataclass(frozen=True, slots=True)
class Pending:
    """Messages that were posted; `wait` before reading what arrives or writing to what leaves."""

    works: list[dist.Work]
    what: str

    def wait(self) -> None:
        """Block for at most the group's timeout (on CUDA: make the current stream wait). Raises MessageError."""
        for work in self.works:
            try:
                work.wait()
            except RuntimeError as error:
                raise _lost(self.what, error) from error
        self.works.clear()  # a work holds its tensors


@dataclass(frozen=True, slots=True)
class Message:
    """What leaves for one rank of the group and what comes from one, flat and contiguous; None or empty is left out.

    Messages between the same two ranks that are in flight together need different tags.
    """

    to: int
    leaving: Tensor | None
    source: int
    arriving: Tensor | None
    tag: int = 0


def post(op: str, group: SequenceGroup, when: str, messages: Sequence[Message]) -> Pending:
    """Post point-to-point messages in one batch; the same messages, in the same order, between any two ranks. Sends what leaves."""
    process, sends, receives, peers = None, [], [], []
    for message in messages:
        ends = (
            (sends, dist.isend, message.leaving, message.to, "to"),
            (receives, dist.irecv, message.arriving, message.source, "from"),
        )
        for batch, kind, tensor, peer, word in ends:
            if tensor is not None and tensor.numel() > 0:
                process = process or process_group(group.name)
                batch.append(dist.P2POp(kind, tensor, group=process, group_peer=peer, tag=message.tag))
                peers.append(f"{word} rank {peer}")
    what = f"{op} on group {group.name!r}, {when}, rank {group.rank} of {group.size}, {' and '.join(dict.fromkeys(peers))}"
    # gloo tells a sender that a receive is posted behind the data that already leaves for it. Receives that come first let two ranks
    # that exchange use both directions of their link at once: measured, 24 MB/s each way where they had 12.
    batch = receives + sends
    if not batch:
        return Pending([], what)
    try:
        return Pending(dist.batch_isend_irecv(batch), what)
    except RuntimeError as error:
        raise _lost(what, error) from error


def connect(group: SequenceGroup, tensors: Sequence[object]) -> None:
    """Have all ranks of a group, and of its axes, meet once on a GPU, where one of the tensors is.

    NCCL connects ranks at a group's first call, and then waits for all of them; a ring leaves out messages that nobody needs.
    """
    device = next((x.device for x in tensors if isinstance(x, Tensor) and x.is_cuda), None)
    if device is None:
        return
    for name in (group.name, *group.axes):
        if name:
            dist.all_reduce(torch.zeros(1, device=device), group=process_group(name))


@dataclass(frozen=True, slots=True)
class Described:
    """Within it a failing collective raises a MessageError that names `op` and the group."""

    op: str
    group: SequenceGroup

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        named = failed_collective(error, self.op, self.group) if isinstance(error, RuntimeError) else None
        if named is not None:
            raise named from error


def failed_collective(error: RuntimeError, op: str, group: SequenceGroup) -> MessageError | None:
    """The error to raise for one that comes from a backend of torch.distributed; None for any other, which is not about peers."""
    # gloo's are plain RuntimeErrors that begin with the place in its source.
    if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
        return None
    return _lost(f"{op} on group {group.name!r}, rank {group.rank} of {group.size}", error)


def _lost(what: str, error: RuntimeError) -> MessageError:
    return MessageError(
        f"{what}: {error}. A rank of the group has failed, or runs a different program: look for the first error among all ranks. "
        "If a rank is only slow, raise the timeout of init_process_group."
    )
