"""examples/lightning_module.py on ranks, beside Lightning on one device: every logged number and the final weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from ranks import run_ranks

EXAMPLES = Path(__file__).parent.parent / "examples"
TOLERANCE = 1e-6  # relative L2 of a weight after SGD in float32, whose sums run in another order


def fit(rank: int, data: int, sequence: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """What Lightning logs at each step and at the end, and the weights. Its processes are told of each other as torchrun does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        ranks = data * sequence
        told = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        for name, value in (told | {"TORCHELASTIC_RUN_ID": "tests"}).items() if ranks > 1 else ():
            patch.setenv(name, str(value))
        import lightning
        from lightning_module import LitGPT  # type: ignore[import-not-found]
        from lightning_module import fit as fit_module  # type: ignore[import-not-found]

        history: list[dict[str, float]] = []

        class Record(lightning.Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                history.append({"loss": trainer.callback_metrics["loss"].item()})

        torch.manual_seed(0)
        model = LitGPT(seq_len=32, inner="eager")
        trainer = fit_module(model, batch=4 // data, seq_len=32, data=data, sequence=sequence, callbacks=[Record()])
        history.append({name: value.item() for name, value in trainer.callback_metrics.items()})
        weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}
        for name in ("lightning_module", "plain_gpt"):
            sys.modules.pop(name)
        return history, {name: value.detach().clone() for name, value in weights.items()}


def fit_on_ranks(rank: int, world_size: int, data: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    return fit(rank, data, world_size // data)


@pytest.fixture(scope="module")
def alone() -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    return run_ranks(fit_on_ranks, 1, 1)[0]


@pytest.mark.parametrize(("ranks", "data"), [(2, 1), (4, 2)], ids=["two ranks of a sequence", "2 × 2, with FSDP over the copies"])
def test_lightning_on_ranks_is_lightning_on_one_device(alone: tuple[Any, Any], ranks: int, data: int) -> None:
    history, weights = alone
    assert len(history) == 4 and set(history[-1]) == {"loss", "validation_loss"}
    for ours, split in run_ranks(fit_on_ranks, ranks, data):
        for mine, theirs in zip(ours, history, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
        for name, weight in weights.items():
            assert (split[name] - weight).norm() <= TOLERANCE * weight.norm(), name
