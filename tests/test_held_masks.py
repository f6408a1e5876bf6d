"""Buffers that hold a mask are read by their content, once, and are held to it at every call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoseq

B, H, S, D, N = 2, 2, 7, 4, 12


class Held(nn.Module):
    """As nanoGPT does it: a triangle as large as the longest input, cut to the length at hand."""

    def __init__(self, mask: Tensor, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask: Tensor
        self.register_buffer("mask", mask.view(1, 1, *mask.shape))
        self.use, self.qkv = use, nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        scores = self.use(q @ k.mT, self.mask[:, :, : x.shape[1], : x.shape[1]])
        return torch.softmax(scores, -1) @ v


def triangle(**options: object) -> Tensor:
    return torch.ones(N, N, **options).tril()  # type: ignore[call-overload]


READ = [
    pytest.param(triangle(), lambda s, m: s.masked_fill(m == 0, -torch.inf), "k <= q", id="a float triangle compared with 0"),
    pytest.param(triangle(dtype=torch.bool), lambda s, m: s.masked_fill(~m, -torch.inf), "k <= q", id="a bool triangle"),
    pytest.param(triangle(dtype=torch.uint8), lambda s, m: s.masked_fill(~m.bool(), -1e9), "k <= q", id="a uint8 triangle"),
    pytest.param(torch.full((N, N), -torch.inf).triu(1), lambda s, m: s + m, "k <= q", id="an additive triangle"),
    pytest.param(triangle().triu(-2), lambda s, m: s.masked_fill(m == 0, -torch.inf), "(k <= q) & (k > q - 3)", id="a band"),
    pytest.param(torch.ones(N, N).triu(1), lambda s, m: s.masked_fill(m.bool(), -torch.inf), "k <= q", id="what is forbidden"),
]


def compiled(model: Held) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="autoseq", options={"inner": "eager"})  # type: ignore[return-value]


@pytest.mark.parametrize(("mask", "use", "text"), READ)
def test_a_buffer_reads_as_what_it_holds(mask: Tensor, use: Callable[..., Tensor], text: str, programs: list[Any]) -> None:
    model, x = Held(mask, use), torch.randn(B, S, D)
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert [planned.site.mask for planned in programs[0].plan.sites] == [text]
    assert not programs[0].dense_masks and len(programs[0].contents) == 1


def test_other_contents_are_looked_up(programs: list[Any]) -> None:
    model, x = Held(torch.rand(N, N) > 0.3, lambda s, m: s.masked_fill(~m, -1e9)), torch.randn(B, S, D)
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert programs[0].dense_masks and not programs[0].contents


def test_a_buffer_that_was_read_may_be_written_to_only_with_the_same_values() -> None:
    model, x = Held(triangle(), lambda s, m: s.masked_fill(m == 0, -torch.inf)), torch.randn(B, S, D)
    run = compiled(model)
    run(x)
    model.mask.copy_(model.mask.clone())
    torch.testing.assert_close(run(x), model(x))
    model.mask[..., 0, 1] = 1.0
    with pytest.raises(autoseq.UnsupportedError, match=r"the buffer mask was read as a mask .* holds other values now"):
        run(x)


def test_a_buffer_of_one_number_may_change() -> None:
    model, x = Held(torch.ones(1, 1), lambda s, m: s * m[..., 0, 0].squeeze()), torch.randn(B, S, D)
    run = compiled(model)
    run(x)
    model.mask.fill_(3.0)
    torch.testing.assert_close(run(x), model(x))
