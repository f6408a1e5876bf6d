"""What a plan for other lengths is made of: calculated where nothing but the length differs, looked at again elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoseq import plan_model
from autoseq.plan_model import looks_at

LENGTH = 256


class Windowed(nn.Module):
    """Attention to as many keys as `window` says of the length."""

    def __init__(self, window: Callable[[int], int]) -> None:
        super().__init__()
        self.qkv, self.window = nn.Linear(8, 24), window

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        rows = torch.arange(x.shape[1], device=x.device)
        behind = rows[:, None] - rows
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(behind >= 0) & (behind < self.window(x.shape[1])))


def up_to(longest: int) -> Callable[[int], int]:
    """A window of 16 in a model that has no longer sequences."""

    def window(length: int) -> int:
        if length > longest:
            raise ValueError("too long")
        return 16

    return window


WINDOWS: dict[str, tuple[Callable[[int], int], dict[int, int], set[int]]] = {
    "the same everywhere": (lambda n: 16, {32: 16, 512: 16}, set()),
    "a share of the length": (lambda n: n // 8, {32: 4, 512: 64}, {32, 512}),
    "a share of long sequences": (lambda n: max(16, n // 32), {32: 16, 512: 16, 1024: 32}, {512, 1024}),
    "a model that fails at a length far off": (up_to(512), {32: 16, 512: 16}, {512}),
}
"""The window, what it is at some lengths, and those of them at which the model has to be looked at."""


@pytest.mark.parametrize(("window", "expected", "looked_at"), WINDOWS.values(), ids=WINDOWS)
def test_windows_at_other_lengths(
    window: Callable[[int], int], expected: dict[int, int], looked_at: set[int], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    looks: list[int] = []
    look_at = plan_model.look_at

    def counted(*args: Any, seq_len: int, **kwargs: Any) -> Any:
        looks.append(seq_len)
        return look_at(*args, seq_len=seq_len, **kwargs)

    def make(length: int) -> tuple[nn.Module, dict[str, Any]]:
        return Windowed(window), {"x": torch.randn(1, length, 8)}

    monkeypatch.setattr(plan_model, "look_at", counted)
    at = looks_at(make, batch=1, seq_len=LENGTH)
    at(LENGTH, 2)
    for length, keys in expected.items():
        (named,) = at(length, 2).sites
        assert (named.site.q_len, named.site.max_ahead, named.site.max_behind) == (length, 0, keys - 1)
    assert looks[0] == LENGTH and set(looks[1:]) == looked_at
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
