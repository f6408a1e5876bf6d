"""Where nothing wants a gradient, an attention is planned for by its forward alone."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

import models
from autoseq.planner import NamedSite, Plan, make_plan
from autoseq.planning.asked_ranks import asked_ranks
from autoseq.planning.prediction import pass_seconds
from autoseq.planning.presets import load_topology
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site
from autoseq.runtime.timeline import WAYS

SITE = Site(batch=1, q_len=8192, k_len=8192, heads=8, kv_heads=2, head_dim=64, value_dim=64, element_bytes=2, max_ahead=0)
TRAINED = NamedSite("attention", "model.py:1", "k <= q", SITE)
SCORED = replace(TRAINED, ways=("forward",))
TOPOLOGY, P = load_topology("4xL20"), 4


def plan(*sites: NamedSite, strategy: str = "auto") -> Plan:
    return make_plan(sites, group_size=P, strategy=strategy, layout="auto", topology=TOPOLOGY)


@pytest.mark.parametrize("name", ["ulysses", "ring", "gather_kv", "balanced"])
def test_a_forward_counts_alone(name: str) -> None:
    (found,) = plan(SCORED, strategy=name).sites
    layout, strategy = plan(SCORED, strategy=name).layout, STRATEGIES[name]
    seconds = max(pass_seconds(strategy, SITE, P, layout, rank, TOPOLOGY, "forward") for rank in asked_ranks(P))
    assert found.seconds == pytest.approx(seconds, rel=1e-5)
    costs = [strategy.cost(SITE, P, layout, rank) for rank in asked_ranks(P)]
    assert found.offer.sent_bytes == max(cost.forward_bytes for cost in costs)
    assert (found.cost.forward_bytes, found.cost.backward_bytes) == (costs[0].forward_bytes, 0)
    assert found.offer.kept_bytes == 0
    assert found.offer.buffer_bytes == max(strategy.buffer_bytes(SITE, P, layout, rank, "forward") for rank in asked_ranks(P))


def test_sites_that_differ_in_it_alone_are_asked_apart() -> None:
    trained, scored = plan(TRAINED, SCORED).sites
    assert scored.seconds < trained.seconds
    assert trained.offer.kept_bytes > 0 == scored.offer.kept_bytes


@pytest.mark.parametrize(("context", "ways"), [(torch.no_grad, ("forward",)), (nullcontext, WAYS)], ids=["scoring", "training"])
def test_the_program_tells_which_passes_there_are(context: Any, ways: tuple[str, ...], programs: list[Any]) -> None:
    model = models.make("plain")
    compiled = torch.compile(model, backend="autoseq", options={"inner": "eager"})
    with context():
        compiled(**models.batch("plain", batch_size=1, length=32))
    assert {planned.site.ways for planned in programs[0].plan.sites} == {ways}


def test_attention_before_the_first_trained_parameter_has_no_backward(programs: list[Any]) -> None:
    model = models.make("plain")
    model.requires_grad_(False)
    model.blocks[-1].requires_grad_(True)  # type: ignore[index]
    compiled = torch.compile(model, backend="autoseq", options={"inner": "eager"})
    compiled(**models.batch("plain", batch_size=1, length=32))
    *before, last = programs[0].plan.sites
    assert before and {planned.site.ways for planned in before} == {("forward",)}
    assert last.site.ways == WAYS


def test_a_deep_model_that_wants_no_gradient_is_asked_quickly(programs: list[Any]) -> None:
    layers = torch.nn.ModuleList(torch.nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(24))

    class Deep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x, x, x, need_weights=False)[0]
            return x

    start = time.process_time()
    with torch.no_grad():
        torch.compile(Deep(), backend="autoseq", options={"inner": "eager"})(torch.randn(1, 16, 8))
    assert time.process_time() - start < 60
    assert len(programs[0].plan.sites) == 24
