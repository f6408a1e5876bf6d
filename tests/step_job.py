"""What ranks do in the tests of a step's comparison: take steps of a tiny model, and mistakes, one after the other in one job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from autoseq.runtime.errors import AutoSeqError

LENGTH, VOCABULARY, WIDTH = 8, 11, 8
RIGHT = "right"


class Tiny(nn.Module):
    """One attention between an embedding and a head; a loss inside if there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        x = self.tokens(ids)
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        logits = self.head(F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2))
        return None if labels is None else loss_of(logits, labels), logits


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def batch(number: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(number))


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="autoseq", options={"inner": "eager", "strategy": "ulysses", **options})


def told(step: Callable[[], Any]) -> str:
    """The error of a step, if there is one."""
    try:
        step()
    except AutoSeqError as error:
        return f"{type(error).__name__}: {error}"
    return RIGHT


class Trainer:
    """A tiny model, and steps of it that ranks may take differently."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model, self.mesh = Tiny(), options.get("mesh")
        self.call = compiled(self.model, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def inside(self, ids: Tensor, labels: Tensor) -> None:
        """Forward and backward, the loss inside the model."""
        self.optimizer.zero_grad()
        self.call(ids, labels)[0].backward()

    def outside(self, ids: Tensor, labels: Tensor) -> None:
        """Forward and backward, the loss outside."""
        self.optimizer.zero_grad()
        loss_of(self.call(ids)[1], labels).backward()

    def step(self, number: int) -> None:
        """A step of training."""
        self.inside(batch(number), batch(number))
        self.optimizer.step()

    def score(self, ids: Tensor) -> Tensor:
        """A call without gradients."""
        with torch.no_grad():
            return self.call(ids, ids)[1]

    def try_each(self, mistakes: dict[str, Callable[[], Any]]) -> dict[str, str]:
        """What this rank is told of each; the weights are equal again after it, and a right step stands between."""
        outcomes = {}
        for name, mistake in mistakes.items():
            kept = {key: value.clone() for key, value in self.model.state_dict().items()}
            outcomes[name] = told(mistake)
            dist.barrier()
            self.model.load_state_dict(kept)
            assert told(lambda: self.inside(batch(1), batch(1))) == RIGHT, (name, outcomes[name])
        return outcomes
