"""Meshes of two dims: what a program takes them from, what it makes of them, and the plans and layouts that follow."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import nn
from typer.testing import CliRunner

import autoseq
import models
from attention_job import LEVELS
from autoseq.cli import app
from autoseq.inspection import inspect_model
from autoseq.planner import NamedSite, Plan, make_plan
from autoseq.planning.presets import load_topology
from autoseq.planning.topology import KernelRates, Link, Rate, Topology
from autoseq.runtime.counting import counters, reset_counters
from autoseq.runtime.groups import SequenceGroup, group_from_mesh, process_group
from autoseq.runtime.layout import Layout
from autoseq.runtime.nodes import check_nodes, found_nodes, make_nodes
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site
from inspected_models import OneAttention
from ranks import run_ranks

OPTIONS: dict[str, Any] = {"inner": "eager"}
TOLERANCE = 1e-5  # relative L2 of a float32 gradient, whose sums run in another order


def worst_gradient(model: nn.Module, oracle: nn.Module) -> float:
    """Relative L2 error of the gradient that is off the most."""
    pairs = zip(model.parameters(), oracle.parameters(), strict=True)
    grads = [(p.grad, q.grad) for p, q in pairs if p.grad is not None and q.grad is not None]
    return max(((mine - theirs).norm() / theirs.norm()).item() for mine, theirs in grads if theirs.norm() > 0)


def num_groups() -> int:
    """Process groups in this process."""
    return len(dist.distributed_c10d._world.pg_map)


def models_on_meshes(rank: int, P: int) -> tuple[list[float], list[int]]:
    """Two models in one process, on a mesh and on nodes; then the second is compiled again for another length."""
    mesh = dist.init_device_mesh("cpu", (2, 2))
    meshes: list[dict[str, Any]] = [{"mesh": mesh, "strategy": "hybrid"}, {"ranks_per_node": 2, "strategy": "double_ring"}]
    split, oracles = [models.make("plain", layers=1) for _ in meshes], [models.make("plain", layers=1) for _ in meshes]
    for model, oracle in zip(split, oracles, strict=True):
        oracle.load_state_dict(copy.deepcopy(model.state_dict()))
    compiled = [torch.compile(m, backend="autoseq", options={**OPTIONS, **o}) for m, o in zip(split, meshes, strict=True)]
    groups = []
    for length, calls in ((21, (*compiled, *oracles)), (34, (compiled[1], oracles[1]))):
        batch = models.batch("plain", batch_size=2, length=length)
        for call in calls:
            call(**batch)[0].backward()
        groups.append(num_groups())
    return [worst_gradient(*pair) for pair in zip(split, oracles, strict=True)], groups


def test_models_with_different_meshes_live_in_one_process() -> None:
    """Gradients are those of one device; a recompilation makes no groups."""
    for errors, (first, second) in run_ranks(models_on_meshes, 4):
        assert max(errors) <= TOLERANCE
        assert first == second


def replicas_of_nodes(rank: int, P: int) -> float:
    """Two replicas of two nodes of two ranks, each with its own batch."""
    mesh = dist.init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicas", "nodes", "ranks"))
    model = models.make("plain", layers=1)
    oracle = copy.deepcopy(model)
    torch.manual_seed(7)
    ids = torch.randint(0, models.VOCABULARY, (2, 2, 23))[mesh.get_local_rank("replicas")]
    options = {**OPTIONS, "mesh": mesh["nodes", "ranks"], "strategy": "hybrid_outer"}
    torch.compile(model, backend="autoseq", options=options)(ids, ids)[0].backward()
    oracle(ids, ids)[0].backward()
    assert group_from_mesh(mesh["nodes", "ranks"]) == group_from_mesh(mesh["nodes", "ranks"])
    return worst_gradient(model, oracle)


def test_a_part_of_a_mesh_of_all_ranks_may_have_two_dims() -> None:
    assert max(run_ranks(replicas_of_nodes, 8)) <= TOLERANCE


def count_steps(rank: int, P: int, strategies: list[str]) -> list[dict[str, tuple[int, int]]]:
    """What this rank really sends in a training step with each strategy."""
    counted = []
    for strategy in strategies:
        torch._dynamo.reset()
        model, kwargs = make_attention()
        compiled = torch.compile(model, backend="autoseq", options={"inner": "aot_eager", "strategy": strategy, "ranks_per_node": 2})
        compiled(**kwargs).backward()
        reset_counters()
        compiled(**kwargs).backward()
        counted.append(counters())
    return counted


class Loss(OneAttention):
    """Little beside an attention: what else a model sends has nothing to do with levels."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, mask).square().mean()


def make_attention() -> tuple[nn.Module, dict[str, Any]]:
    return Loss(), {"x": torch.ones(1, 37, 8)}


def test_inspect_knows_what_each_strategy_of_two_levels_sends() -> None:
    counted = run_ranks(count_steps, 4, LEVELS, backend="autoseq_counted")[0]
    for strategy, real in zip(LEVELS, counted, strict=True):
        found = inspect_model(make_attention, seq_len=37, world_size=4, ranks_per_node=2, strategy=strategy)
        assert {op: (count.messages, count.bytes) for op, count in found.collectives.items()} == real, strategy


def test_inspect_takes_ranks_per_node_and_says_what_is_wrong_with_it() -> None:
    arguments = ["inspect", "examples/plain_gpt.py:tiny", "--seq-len", "32", "--world-size", "6"]
    shown = CliRunner().invoke(app, [*arguments, "--ranks-per-node", "3", "--strategy", "hybrid"])
    assert shown.exit_code == 0
    assert "hybrid.ring_across(" in shown.stdout
    refused = CliRunner().invoke(app, [*arguments, "--ranks-per-node", "4"])
    assert refused.exit_code == 2
    assert "ranks_per_node=4 does not divide the 6 ranks of the sequence; nodes are equally large: 1, 2, 3, 6" in refused.stderr
    flat = CliRunner().invoke(app, [*arguments, "--strategy", "double_ring"])
    assert flat.exit_code == 1
    assert "or set ranks_per_node" in flat.stderr


# What is wrong with a mesh ---------------------------------------------------------------------------------------------


def _compile(**options: Any) -> None:
    torch.compile(models.make("plain", layers=1), backend="autoseq", options={**OPTIONS, **options})(
        **models.batch("plain", batch_size=1, length=16)
    )


def _named(*shape: int) -> Any:
    return dist.init_device_mesh("cpu", shape, mesh_dim_names=("data", "nodes", "ranks")[-len(shape) :])


MISTAKES: dict[str, tuple[Callable[[int], None], str]] = {
    "nodes that leave ranks over": (
        lambda _: _compile(ranks_per_node=3), r"OptionError: ranks_per_node=3 does not divide the 4 ranks.*equally large: 1, 2, 4"
    ),
    "two meshes": (
        lambda _: _compile(mesh=_named(2, 2), ranks_per_node=2),
        "OptionError: ranks_per_node=2 and a mesh of 2 nodes of 2 ranks.*give one of them",
    ),
    "nodes of some of the ranks": (
        lambda _: _compile(mesh=_named(1, 2, 2)["nodes"], ranks_per_node=2),
        r"OptionError: ranks_per_node cuts all 4 ranks.*the mesh has 2.*\(replicas, nodes, 2\).*\['nodes', 'ranks'\]",
    ),
    "ranks in columns": (
        lambda _: _compile(mesh=dist.DeviceMesh("cpu", [[0, 2], [1, 3]])), r"MeshError: .*must ascend row by row.*\[\[0, 2\], \[1, 3\]\]"
    ),
    "other nodes on each rank": (
        lambda rank: _compile(ranks_per_node=[2, 4, 4, 4][rank]), "RankMismatchError: .*rank 0: ranks_per_node=2"
    ),
    "two levels on all ranks alike": (
        lambda _: _compile(strategy="hybrid"),
        "StrategyError: strategy 'hybrid' cannot serve.*needs several nodes of several ranks: give option mesh.*or set ranks_per_node",
    ),
}  # fmt: skip


def refuse(rank: int, P: int, kinds: list[str]) -> list[str]:
    """The message of each mistake on this rank."""
    said = []
    for kind in kinds:
        torch._dynamo.reset()
        with pytest.raises(autoseq.AutoSeqError) as caught:
            MISTAKES[kind][0](rank)
        said.append(f"{type(caught.value).__name__}: {caught.value}")
    return said


def test_a_wrong_mesh_is_an_error_on_every_rank() -> None:
    for said in run_ranks(refuse, 4, list(MISTAKES)):
        for (kind, (_, message)), text in zip(MISTAKES.items(), said, strict=True):
            assert re.search(f"(?s){message}", text), f"{kind}: {text}"


@pytest.mark.parametrize("given", [0, -1, 2.0, "2", True], ids=repr)
def test_ranks_per_node_is_a_number_of_ranks(given: object) -> None:
    with pytest.raises(autoseq.OptionError, match="option 'ranks_per_node' is a number of ranks, 1 or more, or None, not"):
        autoseq.parallelize(nn.Linear(2, 2), ranks_per_node=given)


def nodes_of_six(rank: int, P: int) -> tuple[SequenceGroup, list[list[int]]]:
    world = group_from_mesh(None)
    check_nodes(world, 3)
    assert found_nodes(world, 3) is None
    made = make_nodes(world, 3)
    assert made == found_nodes(world, 3)
    ranks = [dist.get_process_group_ranks(process_group(name)) for name in made.axes]
    ours, all_ranks = (process_group(name)._get_backend(torch.device("cpu")) for name in (made.axes[0], world.name))
    assert ours.options._timeout == all_ranks.options._timeout
    return made, ranks


def test_nodes_are_made_once_of_ranks_beside_each_other_and_wait_as_long() -> None:
    for rank, (group, (across, inside)) in enumerate(run_ranks(nodes_of_six, 6)):
        assert (group.rank, group.size) == (rank, 6)
        assert across == [rank % 3, rank % 3 + 3]
        assert inside == [rank // 3 * 3 + i for i in range(3)]


# Plans ----------------------------------------------------------------------------------------------------------------


TOPOLOGY = load_topology("8xH100")


def plan(strategy: str = "auto", layout: str = "auto", P: int = 4, topology: Topology = TOPOLOGY, **site: Any) -> Plan:
    sizes = dict(batch=1, q_len=65536, k_len=65536, heads=8, kv_heads=8, head_dim=64, value_dim=64, element_bytes=2, max_ahead=0)
    named = NamedSite("attention", "model.py:1", "a mask", Site(**sizes | site))  # type: ignore[arg-type]
    return make_plan([named], group_size=P, strategy=strategy, layout=layout, topology=topology)


LAYOUTS = {
    "a causal ring is balanced": (dict(strategy="ring"), "zigzag"),
    "one that is asked for stays": (dict(strategy="ring", layout="contiguous"), "contiguous"),
    "without a mask there is nothing to balance": (dict(strategy="ring", max_ahead=None), "contiguous"),
    "a window is narrow everywhere": (dict(strategy="ring", max_behind=64), "contiguous"),
    "whole rows are always balanced": (dict(strategy="ulysses"), "contiguous"),
    "one that takes no other": (dict(strategy="balanced"), "contiguous"),
    "one rank": (dict(strategy="ring", P=1), "contiguous"),
    "two levels": (dict(strategy="hybrid", mesh=(2, 2)), "zigzag"),
}


@pytest.mark.parametrize(("asked", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_which_layout(asked: dict[str, Any], layout: str) -> None:
    assert plan(**asked).layout == layout


def test_auto_takes_the_fastest_and_says_why_others_lost() -> None:
    chosen = plan()
    (site,) = chosen.sites
    for layout in ("contiguous", "zigzag"):
        for name, strategy in STRATEGIES.items():
            if strategy.cannot_serve(site.site.site, 4) is None and strategy.cannot_lay_out(layout) is None:
                assert chosen.seconds() <= plan(name, layout).seconds(), name
    reasons = dict(site.losers)
    assert set(reasons) | {site.strategy} == set(STRATEGIES)
    assert "needs several nodes" in reasons["hybrid"]
    assert "whole sequence on one rank" in reasons["local"]
    able = {offer.strategy for offer in site.offers} - {site.strategy}
    assert all(re.fullmatch(rf"\S+ m?s a step( with zigzag rows)?, {site.strategy} \S+ m?s", reasons[name]) for name in able)


def test_where_nothing_but_bytes_takes_time_auto_takes_the_fewest() -> None:
    kernels = KernelRates(*[1e30] * 4)
    only_bytes = Topology("bytes", 4, 1, Link(*[Rate(0.0, 1.0)] * 5), None, {"bfloat16": kernels}, 1 << 60, 1e30, 0.0)
    for kv_heads in (8, 1):
        chosen = plan(topology=only_bytes, kv_heads=kv_heads, max_ahead=None)  # all ranks alike, so that none waits for another
        site = chosen.sites[0].site.site
        sent = {
            (name, layout): max(strategy.cost(site, 4, layout, rank).step_bytes for rank in range(4))
            for name, strategy in STRATEGIES.items()
            for layout in get_args(Layout)
            if strategy.cannot_serve(site, 4) is None and strategy.cannot_lay_out(layout) is None
        }
        assert sent[chosen.sites[0].strategy, chosen.layout] == min(sent.values())


def test_a_limit_of_memory_makes_way_for_a_slower_strategy() -> None:
    free = plan()
    by_size = sorted(free.sites[0].offers, key=lambda offer: offer.kept_bytes + offer.buffer_bytes)
    tight = plan(topology=replace(TOPOLOGY, memory_bytes=by_size[0].kept_bytes + by_size[0].buffer_bytes))
    assert tight.memory_bytes() <= by_size[0].kept_bytes + by_size[0].buffer_bytes
    assert tight.seconds() >= free.seconds()
    if tight.strategies() != free.strategies():
        assert "but it holds" in dict(tight.sites[0].losers)[free.sites[0].strategy]
    least = plan(topology=replace(TOPOLOGY, memory_bytes=1))
    assert least.memory_bytes() <= tight.memory_bytes()


def test_a_layout_that_a_strategy_does_not_take_is_an_error_that_says_why() -> None:
    with pytest.raises(autoseq.StrategyError, match=r"layout 'zigzag' does not suit the attention at model\.py:1 .*: balanced: "):
        plan(strategy="balanced", layout="zigzag")


def test_ranks_compare_no_predicted_seconds() -> None:
    ours, theirs = plan("ring", "contiguous"), plan("ring", "contiguous", topology=replace(TOPOLOGY, launch_s=1.0))
    assert ours.lines() != theirs.lines()
    assert ours.lines(seconds=False) == theirs.lines(seconds=False)


def test_ranks_compare_the_mesh() -> None:
    assert plan(strategy="hybrid", mesh=(2, 2)).lines()[0] == "layout zigzag, a mesh of 2 nodes of 2 ranks"
    assert plan(strategy="ring").lines()[0] == "layout zigzag"
