"""Calls that few models make: they are split like the usual spelling, with one device's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan

from ranks import run_ranks

TOLERANCE = 1e-5  # relative L2; float32 sums in another order
attend = F.scaled_dot_product_attention
aten = torch.ops.aten


class Model(nn.Module):
    """Queries of four heads, keys and values of as many as a test asks for, and what follows."""

    def __init__(self, call: Callable[[Tensor, Tensor, Tensor], Tensor], kv_heads: int) -> None:
        super().__init__()
        self.q, self.kv, self.out, self.call = nn.Linear(16, 16), nn.Linear(16, 8 * kv_heads), nn.Linear(4, 4), call

    def forward(self, x: Tensor) -> Tensor:
        k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        return self.out(self.call(self.q(x).unflatten(-1, (-1, 4)).transpose(1, 2), k, v)).square().mean()


CALLS: dict[str, tuple[int, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "one head of keys and values": (1, lambda q, k, v: attend(q, k, v, is_causal=True)),
    "one head of values": (4, lambda q, k, v: attend(q, k, v[:, :1], is_causal=True)),
    "one batch of keys and values": (2, lambda q, k, v: attend(q, k[:1], v[:1], enable_gqa=True)),
    "one batch of queries": (4, lambda q, k, v: attend(q[:1], k, v, is_causal=True)),
    "a packet without a default overload": (4, lambda q, k, v: aten.slice(attend(q, k, v, is_causal=True), 1, 1, 3)),
    "an associative scan": (
        4, lambda q, k, v: associative_scan(lambda a, b: a + b / 2, attend(q, k, v), dim=2, combine_mode="generic"),
    ),
}  # fmt: skip


def train(rank: int, P: int, name: str) -> list[float]:
    """The relative errors of the loss and the gradients."""
    kv_heads, call = CALLS[name]
    torch.manual_seed(0)
    model, x = Model(call, kv_heads), torch.randn(2, 13, 16)
    oracle = copy.deepcopy(model)
    options = {"inner": "eager", "strict": "scan" not in name}  # a scan over the sequence is gathered
    loss, expected = torch.compile(model, backend="autoseq", options=options)(x), oracle(x)
    loss.backward()
    expected.backward()
    pairs = [(loss.detach(), expected.detach()), *((p.grad, e.grad) for p, e in zip(model.parameters(), oracle.parameters(), strict=True))]
    return [((a - e).norm() / e.norm()).item() for a, e in pairs]


def train_all(rank: int, P: int, names: list[str]) -> dict[str, float]:
    return {name: max(train(rank, P, name)) for name in names}


@pytest.mark.parametrize(("P", "names"), [(2, list(CALLS)), (3, ["one head of keys and values", "one batch of queries"])])
def test_one_devices_numbers_and_nothing_gathered(P: int, names: list[str]) -> None:
    for errors in run_ranks(train_all, P, names):
        assert max(errors.values()) <= TOLERANCE, errors
