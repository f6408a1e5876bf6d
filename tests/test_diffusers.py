"""examples/diffusers_pipeline.py on ranks beside one device: the images, and the gradients of a training step of the transformer."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import autoseq
from autoseq.model_report import Report
from ranks import run_ranks

EXAMPLES = Path(__file__).parent.parent / "examples"
TOLERANCE = 1e-5  # relative L2 in float32, whose sums run in another order


class Found(NamedTuple):
    """Of one device and of ranks, with the same weights; the report is of drawing alone."""

    images: tuple[Tensor, Tensor]
    report: Report
    gradients: tuple[dict[str, Tensor], dict[str, Tensor]]


def draw_and_train(rank: int, P: int, name: str, inner: str) -> Found:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import diffusers_pipeline as example  # type: ignore[import-not-found]

        torch.manual_seed(0)
        pipe = example.PIPELINES[name]()
        sys.modules.pop("diffusers_pipeline")
    roughen(pipe.transformer)
    calls: list[tuple[Any, dict[str, Any]]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    alone = example.draw(pipe)
    hook.remove()
    oracle = copy.deepcopy(pipe.transformer)
    autoseq.parallelize(pipe.transformer, inner=inner)
    images, report = example.draw(pipe), autoseq.report(pipe.transformer)
    return Found((alone, images), report, (gradients(oracle, *calls[-1]), gradients(pipe.transformer, *calls[-1])))


def roughen(model: nn.Module) -> None:
    """A new DiT is a function that is zero: without this, neither images nor gradients would show what is in it."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))


def gradients(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Of a squared error against noise, at a denoising step's inputs."""
    (predicted,) = model(*args, **kwargs | {"return_dict": False})
    noise = torch.randn(predicted.shape, generator=torch.Generator().manual_seed(1))
    (predicted - noise).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "inner", "size", "rows"),
    [
        pytest.param("dit", "aot_eager", 16, 64 // 2, id="self-attention over patches"),
        pytest.param("flux", "eager", 32, (256 + 7 + 1) // 2, id="joint attention over text and patches"),
    ],
)
def test_images_and_gradients_are_those_of_one_device(name: str, inner: str, size: int, rows: int) -> None:
    of_ranks: list[Found] = run_ranks(draw_and_train, 2, name, inner)
    for (alone, images), report, (expected, gradients) in of_ranks:
        assert images.shape == (2, 3, size, size) and alone.std() > 0.05
        assert (images - alone).norm() <= TOLERANCE * alone.norm()
        assert (report.ranks, sum(count for _, count in report.strategies), report.num_programs) == (2, 2, 1)
        assert next(each.rank for each in report.figures if each.what == "rows of a sequence") == rows
        check_gradients(gradients, expected)
    assert torch.equal(of_ranks[0].images[1], of_ranks[1].images[1]), "the next call draws from the same images on all ranks"


def check_gradients(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert gradients.keys() == expected.keys() and len(expected) > 20
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        # A bias that all keys have in common changes no weight of a softmax: its gradient is zero but for rounding.
        scale = largest if gradient.norm() < 1e-6 * largest else gradient.norm()
        assert (gradients[name] - gradient).norm() <= TOLERANCE * scale, name
