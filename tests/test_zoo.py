"""The model zoo: every attention found and its mask read, no S×S tensor left, and one device's loss and gradients on two ranks."""

import copy
from functools import cache
from typing import Any

import pytest
import torch

import zoo
from attention_job import SPLIT
from autoseq.inspection import Inspection, inspect_model, intermediates
from autoseq.runtime.strategies import STRATEGIES
from ranks import run_ranks
from training_job import GRADIENT_TOLERANCE, LOSS_TOLERANCE

PAIRS = [(name, attention) for name, entry in zoo.ZOO.items() for attention in entry.attention]


@pytest.fixture(scope="module", params=PAIRS, ids=[", ".join(filter(None, pair)) for pair in PAIRS])
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A model and a spelling of its attention. The tests of a pair follow each other, so that it is inspected once."""
    return request.param


# BLOOM's GELU is an autograd function of its own: Dynamo makes an instance of its class, and torch warns of what Dynamo does.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@cache
def inspected(name: str, attention: str) -> Inspection:
    entry = zoo.ZOO[name]
    return inspect_model(lambda: (entry.make(attention), entry.batch()), seq_len=zoo.LENGTH, world_size=2)


def test_every_attention_is_found_and_its_mask_is_read(pair: tuple[str, str]) -> None:
    assert tuple(site.site.mask for site in inspected(*pair).sites) == zoo.ZOO[pair[0]].masks
    assert inspected(*pair).dense_masks == []


def test_nothing_of_the_size_of_the_scores_is_left(pair: tuple[str, str]) -> None:
    made = [item.shape for program in inspected(*pair).programs for item in intermediates(program.gm.graph)]
    assert [shape for shape in made if sum(size in zoo.ZOO[pair[0]].sequence_sizes for size in shape) > 1] == []


def test_nothing_else_is_gathered(pair: tuple[str, str]) -> None:
    assert tuple(fallback.op for fallback in inspected(*pair).fallbacks) == zoo.ZOO[pair[0]].gathered


def test_loss_outputs_and_gradients_are_one_devices(pair: tuple[str, str]) -> None:
    """Both spellings of a model's attention become one graph, so one goes through AOTAutograd and the other runs as it was rewritten."""
    name, attention = pair
    strategy = one_of(name, attention)
    inner = "aot_eager" if attention == zoo.ZOO[name].attention[0] else "eager"
    for differences in run_ranks(train, 2, name, attention, strategy, inner):
        loss = differences.pop("loss")
        worst = max(differences.items(), key=lambda item: item[1])
        assert loss <= LOSS_TOLERANCE and worst[1] <= GRADIENT_TOLERANCE, (strategy, loss, worst)


def one_of(name: str, attention: str) -> str:
    """One of the strategies that serve a model: another for each, so that the zoo meets them all."""
    sites = inspected(name, attention).sites
    serving = [strategy for strategy in SPLIT if all(STRATEGIES[strategy].cannot_serve(site.site.site, 2) is None for site in sites)]
    assert len(serving) >= 3
    return serving[PAIRS.index((name, attention)) % len(serving)]


def test_the_zoo_meets_every_strategy() -> None:
    missing = set(SPLIT) - {"halo"}  # which serves models in which every attention has a window
    for pair in PAIRS:
        if missing:
            missing.discard(one_of(*pair))
    assert not missing


def train(rank: int, world_size: int, name: str, attention: str, strategy: str, inner: str) -> dict[str, float]:
    """A forward and backward of the model and of the same on one device; the relative difference of the loss, outputs and gradients."""
    entry = zoo.ZOO[name]
    model, batch = entry.make(attention), entry.batch()
    oracle = copy.deepcopy(model)
    expected = oracle(**batch)
    zoo.loss_of(expected).backward()
    output = torch.compile(model, backend="autoseq", options={"strategy": strategy, "inner": inner})(**batch)
    zoo.loss_of(output).backward()
    loss = relative(zoo.loss_of(output), zoo.loss_of(expected))
    return {"loss": loss, **outputs(output, expected), **gradients(model, oracle, entry.zero_gradients)}


def outputs(actual: Any, expected: Any) -> dict[str, float]:
    """The relative difference of whatever else is returned; a shard gathers itself."""
    ours, theirs = zoo.tensors_of(actual), zoo.tensors_of(expected)
    assert ours.keys() == theirs.keys()
    return {name: relative(ours[name], theirs[name]) for name in ours}


def gradients(model: torch.nn.Module, oracle: torch.nn.Module, zero: tuple[str, ...]) -> dict[str, float]:
    """The relative difference of each parameter's gradient; of one that is zero but for rounding, its size beside all gradients'."""
    whole = sum(p.grad.norm() ** 2 for p in oracle.parameters() if p.grad is not None) ** 0.5
    found = {}
    for (name, actual), expected in zip(model.named_parameters(), oracle.parameters(), strict=True):
        assert (actual.grad is None) == (expected.grad is None), name
        if expected.grad is None:
            continue
        if name.endswith(zero) and zero:
            found[name] = (max(actual.grad.norm(), expected.grad.norm()) / whole).item()
        else:
            found[name] = relative(actual.grad, expected.grad)
    return found


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.detach() + 0 - expected.detach()).norm() / expected.detach().norm()).item()
