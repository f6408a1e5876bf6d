"""Collectives that are waited for later: an error says which one it was."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from autoseq.runtime import posted
from autoseq.runtime.errors import MessageError
from autoseq.runtime.groups import ALONE, SequenceGroup
from autoseq.runtime.posted import Posted, post_all_gather, post_all_to_all, post_reduce_scatter

POSTS: dict[str, Callable[[SequenceGroup, Tensor], Posted]] = {
    "all-to-all": lambda group, x: post_all_to_all(group, x, [2, 2], [2, 2]),
    "all-gather": post_all_gather,
    "reduce-scatter": post_reduce_scatter,
}


@pytest.mark.parametrize("op", POSTS)
def test_a_failed_wait_names_its_collective(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: Tensor) -> Tensor:
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Connection closed by peer")

    def sent(x: Tensor, *_: object) -> Tensor:
        return x

    names = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
    monkeypatch.setattr(posted, "_ops", SimpleNamespace(wait_tensor=lost, **dict.fromkeys(names, sent)))
    under_way = POSTS[op](SequenceGroup("rows", 2, 1), torch.zeros(4))
    with pytest.raises(MessageError, match=f"waiting for {op} on group 'rows', rank 1 of 2"):
        under_way.arrived()


@pytest.mark.parametrize("op", POSTS)
def test_one_rank_waits_for_nothing(op: str) -> None:
    x = torch.arange(4.0)
    assert POSTS[op](ALONE, x).arrived() is x
