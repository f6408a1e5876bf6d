"""Bytes on the wire: what a whole training step sends is what the formulas say, to the byte."""

from typing import Any

import pytest
import torch

import models
from autoseq.runtime.counting import counters, reset_counters
from autoseq.runtime.layout import local_length
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site
from ranks import run_ranks

B, S, H, K, D, WIDTH, LAYERS = 2, 37, 4, 2, 8, 32, 2


def count_a_step(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    model = models.make("llama")
    compiled = torch.compile(model, backend="autoseq", options={"inner": "aot_eager", **options})
    batch = models.batch("llama", batch_size=B, length=S)
    compiled(**batch).loss.backward()  # the first call also compares inputs and compiles
    model.zero_grad(set_to_none=True)
    reset_counters()
    loss = compiled(**batch).loss
    forward = dict(counters())
    loss.backward()
    return {"forward": forward, "step": dict(counters()), "parameters": sum(p.numel() for p in model.parameters())}


def total(counted: dict[str, tuple[int, int]]) -> tuple[int, int]:
    return sum(m for m, _ in counted.values()), sum(b for _, b in counted.values())


@pytest.mark.parametrize(("P", "layout"), [(2, "contiguous"), (3, "zigzag")])
@pytest.mark.parametrize("strategy", ["ulysses", "ring", "gather_kv"])
def test_a_training_step_sends_what_the_formulas_say(strategy: str, P: int, layout: Any) -> None:
    site = Site(batch=B, q_len=S, k_len=S, heads=H, kv_heads=K, head_dim=D, value_dim=D, element_bytes=4, max_ahead=0)
    for rank, counted in enumerate(run_ranks(count_a_step, P, {"strategy": strategy, "layout": layout}, backend="autoseq_counted")):
        cost = STRATEGIES[strategy].cost(site, P, layout, rank)
        loss = 2 * (P - 1) * 8 // P  # one all-reduce of the pair (sum, count)
        messages, sent = total(counted["forward"])
        assert messages == LAYERS * cost.forward_messages + 1
        assert sent == LAYERS * cost.forward_bytes + loss
        gradients = 2 * (P - 1) * counted["parameters"] * 4 // P  # one bucket for the whole model
        messages, sent = total(counted["step"])
        assert messages == LAYERS * (cost.forward_messages + cost.backward_messages) + 2
        assert sent == LAYERS * (cost.forward_bytes + cost.backward_bytes) + loss + gradients


def gather_logits(rank: int, world_size: int) -> dict[str, Any]:
    model = models.make("llama")
    compiled = torch.compile(model, backend="autoseq", options={"inner": "eager"})
    batch = models.batch("llama", batch_size=B, length=S)
    compiled(**batch)
    output = compiled(**batch)
    reset_counters()
    silent = [repr(output.logits), output.logits.shape, output.logits.dtype, output.logits.requires_grad, output.logits.local.shape]
    before = total(counters())
    for _ in range(2):
        output.logits.argmax(-1)
    return {"before": before, "after": total(counters()), "silent": len(silent)}


def test_logits_are_gathered_once_and_only_when_their_values_are_needed() -> None:
    P = 2
    rows = local_length(S, P, "contiguous")
    for counted in run_ranks(gather_logits, P, backend="autoseq_counted"):
        assert counted["before"] == (0, 0)
        assert counted["after"] == (1, (P - 1) * B * rows * models.VOCABULARY * 4)
