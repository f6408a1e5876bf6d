"""What a user would pick instead of autoseq, made to run on CPUs over gloo. Each is optional: what is not installed is named so.

DeepSpeed's `DistributedAttention` and yunchang's `UlyssesAttention` exchange heads for rows; the attention between is the caller's,
and here that of torch. Both take [B,s,H,D] of consecutive rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from work import Work

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Absent(Exception):
    """The peer is not installed, or does not serve the work; the message says which."""


def deepspeed(work: Work, group: dist.ProcessGroup | None) -> Attention:
    """`deepspeed.sequence.layer.DistributedAttention` around torch's SDPA."""
    logging.disable(logging.WARNING)  # it announces its choice of accelerator on every rank
    try:
        import deepspeed.comm  # pyright: ignore[reportMissingImports] (optional)
        from deepspeed.sequence.layer import DistributedAttention  # pyright: ignore[reportMissingImports] (optional)
    except ImportError as error:
        raise Absent(_missing("deepspeed", error)) from error
    finally:
        logging.disable(logging.NOTSET)
    if work.kv_heads < dist.get_world_size(group):
        raise Absent(f"needs at least as many KV heads as ranks, and there are {work.kv_heads}")
    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(dist_backend="gloo", verbose=False)
    module = DistributedAttention(_on_whole_rows(work), group)
    return lambda q, k, v: module(q, k, v, 0)  # 0: the batch comes first


def yunchang(work: Work, group: dist.ProcessGroup | None) -> Attention:
    """`yunchang.UlyssesAttention`, whose own attention has no CPU path, around torch's SDPA."""
    try:
        from yunchang import UlyssesAttention  # pyright: ignore[reportMissingImports] (optional)
        from yunchang.kernels import AttnType  # pyright: ignore[reportMissingImports] (optional)
    except ImportError as error:
        raise Absent(_missing("yunchang", error)) from error
    P = dist.get_world_size(group)
    if work.heads % P or work.kv_heads % P:
        raise Absent(f"needs heads and KV heads divisible by {P}, and there are {work.heads} and {work.kv_heads}")
    module = UlyssesAttention(group, attn_type=AttnType.TORCH_FLASH)
    module.attn_fn = _on_whole_rows(work)
    return lambda q, k, v: module(q, k, v)


PEERS: dict[str, Callable[[Work, dist.ProcessGroup | None], Attention]] = {
    "deepspeed": deepspeed,
    "yunchang": yunchang,
}


def _on_whole_rows(work: Work) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        """[B,S,h,D], as both hand it over."""
        return work.sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return attention


def _missing(package: str, error: ImportError) -> str:
    return f"not installed: pip install --no-deps {package} ({error})"
