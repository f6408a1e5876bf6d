"""What each node of a local graph sends: together it is what a step sends, and each message has the node that sends it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoseq.dry_run import Counts, add_counts, step_traffic
from autoseq.inspection import with_programs
from autoseq.node_traffic import NodeTraffic, node_traffic
from autoseq.options import Options
from autoseq.program import Program
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site
from autoseq.runtime.timeline import WAYS
from autoseq.runtime.traffic import Traffic
from inspected_models import OneAttention, make_model

P, NODES = 4, 2
SITE = Site(
    batch=1, q_len=37, k_len=37, heads=4, kv_heads=4, head_dim=8, value_dim=8, element_bytes=4, max_ahead=0, mesh=(NODES, P // NODES)
)  # fmt: skip
ABLE = [name for name, strategy in STRATEGIES.items() if strategy.cannot_serve(SITE, P) is None]


def look(programs: Sequence[Program]) -> list[tuple[NodeTraffic, Counts]]:
    return [(node_traffic(program, P), step_traffic(program, P)) for program in programs]


def names(traffic: NodeTraffic) -> dict[str, tuple[set[str], set[str]]]:
    """What is sent in either pass by the kinds of nodes."""
    found = {}
    for node, sent in traffic.items():
        assert node is not None
        found["attention" if "attention" in node.meta else node.target.__name__] = set(sent.forward), set(sent.backward)
    return found


@pytest.mark.parametrize("strategy", ABLE)
def test_all_nodes_together_send_what_a_step_sends(strategy: str) -> None:
    options = Options(strategy=strategy, ranks_per_node=P // NODES)
    ((traffic, counted),) = with_programs(partial(make_model, "plain", 1, 37), look, world_size=P, options=options)
    total: Counts = {}
    for sent in traffic.values():
        total = add_counts(total, sent.step)
    assert total == counted
    assert None not in traffic
    assert {"attention", "cross_entropy", "vary_many"} <= set(names(traffic))
    assert names(traffic)["vary_many"] == (set(), {"all_reduce"})


def frozen_but_for_the_last() -> tuple[nn.Module, dict[str, Any]]:
    model, batch = make_model("plain", 1, 37)
    model.requires_grad_(False)
    model.blocks[-1].requires_grad_(True)  # type: ignore[index]
    return model, batch


@pytest.mark.parametrize("strategy", ["ulysses", "ring", "gather_kv", "hybrid", "hybrid_gather"])
def test_attention_without_a_gradient_sends_nothing_backward(strategy: str) -> None:
    def look_at_sites(programs: Sequence[Program]) -> list[tuple[NodeTraffic, Counts]]:
        assert [planned.site.ways for planned in programs[0].plan.sites] == [("forward",), WAYS]
        return look(programs)

    options = Options(strategy=strategy, ranks_per_node=P // NODES)
    ((traffic, counted),) = with_programs(frozen_but_for_the_last, look_at_sites, world_size=P, options=options)
    total: Counts = {}
    for sent in traffic.values():
        total = add_counts(total, sent.step)
    assert total == counted
    frozen, last = (sent for node, sent in traffic.items() if node is not None and "attention" in node.meta)
    assert not frozen.backward and last.backward


@pytest.mark.parametrize("strategy", ["ulysses", "ring", "gather_kv"])
def test_an_attention_sends_in_each_pass_what_its_formulas_say(strategy: str) -> None:
    def costs(programs: Sequence[Program]) -> list[tuple[Traffic, Traffic, Any]]:
        ((traffic, _),) = look(programs)
        sites = {planned.site.name: planned for planned in programs[0].plan.sites}
        return [
            (sum(sent.forward.values(), Traffic()), sum(sent.backward.values(), Traffic()), sites[node.meta["attention"]["name"]].cost)
            for node, sent in traffic.items() if node is not None and "attention" in node.meta
        ]  # fmt: skip

    found = with_programs(partial(make_model, "plain", 1, 37), costs, world_size=P, options=Options(strategy=strategy))
    assert found
    for forward, backward, cost in found:
        assert forward == Traffic(cost.forward_messages, cost.forward_bytes)
        assert backward == Traffic(cost.backward_messages, cost.backward_bytes)


def test_a_gather_that_the_compiler_put_in_is_found_at_its_own_node() -> None:
    def sort(y: Tensor) -> Tensor:
        return torch.sort(y, dim=1).values

    def make() -> tuple[nn.Module, dict[str, Any]]:
        return OneAttention(sort), {"x": torch.randn(1, 16, 8)}

    ((traffic, counted),) = with_programs(make, look, world_size=P, options=Options(strategy="ring"))
    assert names(traffic)["all_gather"][0] == {"all_gather"}
    assert counted["all_gather"] == Traffic(1, 12 * 8 * 4)  # the other ranks' 12 rows of 8 float32


def test_one_rank_sends_nothing() -> None:
    make = partial(make_model, "plain", 1, 8)
    assert with_programs(make, lambda programs: node_traffic(programs[0], 1), world_size=1, options=Options()) == {}
