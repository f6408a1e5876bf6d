"""What programs do with a sequence between its attentions that needs no gather: nothing is gathered, and the numbers are one device's."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from autoseq.inspection import inspect_model
from inspected_models import OneAttention
from ranks import run_ranks

LENGTH = 24
TOLERANCE = 1e-5  # relative L2; float32 sums in another order


class Between(nn.Module):
    """A causal attention, and then what a test asks for: each thing with a projection and a table of its own."""

    def __init__(self, *then: str) -> None:
        super().__init__()
        self.qkv, self.then = nn.Linear(8, 24), then
        self.outs = nn.ModuleList(nn.Linear(8, 8) for _ in then)
        self.tables = nn.ModuleList(nn.Embedding(64, 8) for _ in then)

    def forward(self, x: Tensor) -> list[Tensor]:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return [THEN[name](out(y), table) for name, out, table in zip(self.then, self.outs, self.tables, strict=True)]  # type: ignore


def written_in_parts(y: Tensor, table: nn.Embedding) -> Tensor:
    """As DeepSeek-V3 puts its keys together."""
    whole = y.new_empty(*y.shape[:-1], 12)
    whole[..., :8].copy_(y)
    whole[..., 8:].copy_(y[..., :1].sin())
    return whole


def next_ids(y: Tensor, table: nn.Embedding) -> Tensor:
    """As T5 makes its decoder's inputs."""
    ids = (y.detach() > 0).sum(-1)
    shifted = ids.new_zeros(ids.shape)
    shifted[..., 1:] = ids[..., :-1].clone()
    return y + table(shifted)


def smooth_differences(y: Tensor, table: nn.Embedding) -> Tensor:
    """Scaled, so that the sine of a sum of many numbers keeps its digits."""
    return F.smooth_l1_loss(y, y.detach().sin()) + F.kl_div(y, y.detach().cos().exp(), reduction="sum") / 999


THEN: dict[str, Callable[[Tensor, nn.Embedding], Tensor]] = {
    "the first token": lambda y, table: y[:, 0].sin(),
    "the last tokens": lambda y, table: y[:, -2:].sin(),
    "a number where it is negative": lambda y, table: torch.where(y > 0, y, 0.5),
    "the dtype of another value": lambda y, table: y.double().type_as(y) * y.type_as(y.double()).float(),
    "zeros and ones of its shape": lambda y, table: y * torch.ones_like(y) + torch.zeros_like(y) + y.new_full(y.shape, 2.0),
    "noise of its shape": lambda y, table: y * torch.rand_like(y) + torch.randn_like(y),
    "positions counted up": lambda y, table: y + table(torch.ones(y.shape[:2], dtype=torch.int64).cumsum(1)),
    "the largest channel": lambda y, table: y + F.one_hot(y.argmax(-1), 8),
    "rows of a table": lambda y, table: y + table.weight[(y.detach() * 8).long().abs()[..., 0].clamp(max=63)],
    "rows repeated": lambda y, table: y.repeat_interleave(2, 1).unflatten(1, (-1, 2)).prod(2),
    "channels scattered": lambda y, table: torch.zeros_like(y).scatter(-1, y.topk(2, -1).indices, 1.0) * y,
    "channels reversed": lambda y, table: y.flip(-1) + y.roll(1, -1),
    "the mean of squares": lambda y, table: F.mse_loss(y, torch.zeros_like(y)),
    "the likelihood of labels": lambda y, table: F.nll_loss(y.log_softmax(-1).flatten(0, 1), y.detach().argmin(-1).flatten()),
    "smooth differences": smooth_differences,
    "written in parts": written_in_parts,
    "ids shifted by one": next_ids,
    "a token behind": lambda y, table: y + F.pad(y, (0, 0, 1, -1)),
    "a token ahead": lambda y, table: torch.cat([y[:, 1:], y[:, :1]], 1) * y,
    "two halves swapped": lambda y, table: torch.cat([y[:, 14:].sin(), y[:, :14]], 1) * y,
    "the tail joined with itself": lambda y, table: torch.cat([y[:, 12:], y[:, 12:].cos()], 1),
}


def make(*then: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Between(*then), {"x": torch.randn(2, 29, 8)}


@pytest.mark.parametrize("then", THEN)
def test_nothing_is_gathered(then: str) -> None:
    assert inspect_model(lambda: make(then), seq_len=29, world_size=2).fallbacks == []


def train(rank: int, world_size: int) -> dict[str, float]:
    """All of them in one program."""
    model, batch = make(*THEN)
    oracle = copy.deepcopy(model)
    results = []
    for one in (torch.compile(model, backend="autoseq", options={"inner": "eager", "layout": "zigzag"}), oracle):
        torch.manual_seed(3)  # noise is drawn whole, from the same generator
        results.append(one(**batch))
        sum(result.sin().sum() for result in results[-1]).backward()
    pairs: dict[str, tuple[Any, Any]] = {name: (a.detach() + 0, e.detach()) for name, a, e in zip(THEN, *results, strict=True)}
    pairs |= {name: (p.grad, e.grad) for (name, p), e in zip(model.named_parameters(), oracle.parameters(), strict=True)}
    return {name: ((a - e).norm() / e.norm()).item() for name, (a, e) in pairs.items() if e is not None}


def test_the_numbers_are_one_devices() -> None:
    for differences in run_ranks(train, 2):
        assert {name: error for name, error in differences.items() if not error <= TOLERANCE} == {}


# Rows that lie elsewhere ----------------------------------------------------------------------------------------------


def test_labels_that_are_the_inputs_themselves_need_no_gather() -> None:
    """Padded by one and cut again they are no sequence of another length that the logits would have to follow."""

    def language_model() -> tuple[nn.Module, dict[str, Any]]:
        ids = torch.zeros(1, LENGTH, dtype=torch.long)
        return models.make("llama").train(), {"input_ids": ids, "labels": ids}

    found = inspect_model(language_model, seq_len=LENGTH, world_size=2)
    assert "all_gather" not in found.collectives
    assert found.fallbacks == []


class Pairs(nn.Module):
    """Attention over rows, then over pairs of them: both halves of a pair have to be on the same rank."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.join, self.b = OneAttention(), nn.Linear(16, 8), OneAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.join(self.a(x).unflatten(1, (-1, 2)).flatten(2)))


def test_rows_that_are_gathered_to_be_cut_up_otherwise_are_a_fallback() -> None:
    found = inspect_model(lambda: (Pairs(), {"x": torch.randn(1, 18, 8)}), seq_len=18, world_size=2, layout="contiguous")
    (fallback,) = found.fallbacks
    assert "cut up as those of another sequence" in fallback.reason
    assert fallback.bytes_per_rank == 9 * 8 * 4
