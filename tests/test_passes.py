"""Each pass: when it fires, when it must not, and that the graph computes the same before and after."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from autoseq.passes import hidden_writes
from autoseq.passes.find_attention import find_attention
from autoseq.passes.find_sequence import MARK, find_sequence
from autoseq.passes.normalize import drop_noops
from autoseq.passes.runner import Pass, run_passes
from autoseq.passes.source import first_source, source_line
from autoseq.passes.tidy import bucket_varies, drop_idle_varies, leave_gradients_unsummed
from autoseq.runtime import collectives
from autoseq.runtime.errors import AutoSeqError, UnsupportedError
from graphs import Traced, check_same_values, count, run, targets, trace

aten = torch.ops.aten


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check_traced(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> Traced:
    """`fn` traced; Dynamo's graph, the opened and the normal one compute the same."""
    traced = trace(fn, *args, dynamic=dynamic)
    before = run(traced.dynamo, traced.inputs)
    check_same_values(before, run(traced.opened, traced.inputs))
    check_same_values(before, run(traced.normal, traced.inputs))
    return traced


# normalize -------------------------------------------------------------------------------------------------------------


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y.mul_(2)
    y[:, :1] = 0
    return y


KEPT_WHOLE = [
    pytest.param(lambda x: F.linear(x, x), "aten.linear.default", id="linear"),
    pytest.param(lambda x: F.layer_norm(x, x.shape[-1:]), "aten.layer_norm.default", id="layer_norm"),
    pytest.param(lambda x: F.scaled_dot_product_attention(x, x, x), "aten.scaled_dot_product_attention.default", id="attention"),
    pytest.param(lambda x: F.cross_entropy(x, x.argmax(-1)), "aten.cross_entropy_loss.default", id="cross_entropy"),
    pytest.param(lambda x: x.view(-1), "aten.reshape.default", id="a view asks for values only"),
]


@pytest.mark.parametrize(("fn", "target"), KEPT_WHOLE)
def test_normalize_keeps_operators_that_a_person_would_name(fn: Callable[..., Any], target: str) -> None:
    assert target in targets(check_traced(fn, floats(4, 4)).normal)


def test_normalize_makes_in_place_writes_functional() -> None:
    traced = check_traced(in_place, floats(3, 4))
    assert not any(node.target._schema.is_mutable for node in traced.normal.graph.nodes if node.op == "call_function")


def test_normalize_keeps_source_lines() -> None:
    (node,) = trace(in_place, floats(3, 4)).normal.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert source_line(node).endswith("in in_place: y.mul_(2)") and "test_passes.py:" in source_line(node)


def test_source_lines_are_the_models_and_never_a_passes() -> None:
    graph = fx.Graph()
    node, other = graph.call_function(aten.neg.default), graph.call_function(aten.sin.default)
    here = 'File "/home/me/model.py", line 3, in forward\n    y = x.sin()'
    node.meta["stack_trace"] = f'File "{hidden_writes.__file__}", line 58, in forward\n    results = histories.run(*inputs)'
    other.meta["stack_trace"] = f'{here}\n{node.meta["stack_trace"]}'
    assert source_line(node) == f"(no source line) {node.name}"
    assert source_line(other) == first_source(graph) == "me/model.py:3 in forward: y = x.sin()"


def test_normalize_names_inputs_as_the_user_does() -> None:
    (placeholder,) = trace(in_place, floats(3, 4)).normal.graph.find_nodes(op="placeholder")
    assert "x" in placeholder.meta["source_name"]


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.sum())
        return x + self.seen.mean()


def test_normalize_writes_mutated_buffers_back() -> None:
    module = Counter()
    traced = trace(module, floats(3))
    assert count(traced.normal, aten.copy_.default) == 1
    graphs_buffers = [[x.clone() for x in traced.inputs] for _ in range(2)]
    results = [fx.Interpreter(gm).run(*inputs) for gm, inputs in zip((traced.dynamo, traced.normal), graphs_buffers, strict=True)]
    check_same_values(list(results[0]), list(results[1]))
    check_same_values(*graphs_buffers)
    assert any(not torch.equal(x, y) for x, y in zip(graphs_buffers[1], traced.inputs, strict=True))


def test_normalize_keeps_symbolic_lengths() -> None:
    traced = check_traced(lambda x: x.reshape(x.shape[0] * x.shape[1], -1) + x.shape[1], floats(2, 5, 3), dynamic=True)
    assert any(isinstance(s, torch.SymInt) for n in traced.normal.graph.nodes for s in getattr(n.meta.get("val"), "shape", ()))


# drop_noops ------------------------------------------------------------------------------------------------------------

NOOPS = [
    pytest.param(lambda x: x[:, 0:4] + 1, 1, ["aten.add.Tensor"], id="fires: a slice of everything"),
    pytest.param(lambda x: x.reshape(3, 4) + 1, 1, ["aten.add.Tensor"], id="fires: a reshape to the same shape"),
    pytest.param(lambda x: x.expand(3, -1) + 1, 1, ["aten.add.Tensor"], id="fires: an expand to the same shape"),
    pytest.param(lambda x: torch.cat([x[:, :0], x], 1) + 1, 1, ["aten.add.Tensor"], id="fires: an empty part in front"),
    pytest.param(lambda x: x[:, :3] + 1, 0, ["aten.slice.Tensor", "aten.add.Tensor"], id="must not fire: a slice of less"),
    pytest.param(lambda x: x[:1][::2] + 1, 0, ["aten.slice.Tensor", "aten.slice.Tensor", "aten.add.Tensor"], id="must not fire: a step"),
    pytest.param(lambda x: torch.cat([x, x]) + 1, 0, ["aten.cat.default", "aten.add.Tensor"], id="must not fire: two parts"),
    pytest.param(lambda x: torch.cat([torch.zeros(3, 0, dtype=torch.float64), x], 1), 0, None,
                 id="must not fire: the empty part decides the dtype"),
    pytest.param(lambda x: x.reshape(4, 3) + 1, 0, ["aten.reshape.default", "aten.add.Tensor"], id="must not fire: another shape"),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "dropped", "left"), NOOPS)
def test_drop_noops(fn: Callable[..., Any], dropped: int, left: list[str] | None) -> None:
    traced = trace(fn, floats(3, 4))
    before = run(traced.normal, traced.inputs)
    assert drop_noops(traced.normal) == dropped
    traced.normal.graph.eliminate_dead_code()
    traced.normal.recompile()
    check_same_values(before, run(traced.normal, traced.inputs))
    assert left is None or targets(traced.normal) == left


# open_regions ----------------------------------------------------------------------------------------------------------


def again(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(fn, *args, use_reentrant=False, **kwargs)


REGIONS = [
    pytest.param(lambda x, w: x @ w, 0, 0, id="must not fire: no region"),
    pytest.param(lambda x, w: again(lambda y: torch.sin(y @ w), x) + 1, 1, 2, id="fires: one region, its capture too"),
    pytest.param(lambda x, w: again(lambda y: torch.cos(again(lambda z: torch.sin(z @ w), y)), x), 2, 3, id="fires: a region in a region"),
    pytest.param(lambda x, w: sum(again(lambda y: (torch.sin(y), torch.cos(y @ w)), x)), 1, 3, id="fires: two results"),
    pytest.param(lambda x, w: again(torch.sin, again(torch.cos, x @ w)), 2, 2, id="fires: one after the other"),
]


@pytest.mark.parametrize(("fn", "opened", "tagged"), REGIONS)
def test_open_regions(fn: Callable[..., Any], opened: int, tagged: int) -> None:
    traced = check_traced(fn, floats(3, 3), floats(3, 3).requires_grad_())
    assert traced.num_opened == opened
    assert not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in traced.opened.graph.nodes)
    tags = [node.meta.get("recompute") for node in traced.normal.graph.nodes]
    assert tags.count(CheckpointPolicy.PREFER_RECOMPUTE) == tagged
    regions = {node.meta["ac_graph_id"] for node in traced.normal.graph.nodes if "ac_graph_id" in node.meta}
    assert len(regions) == opened


# find_sequence ---------------------------------------------------------------------------------------------------------


attend = F.scaled_dot_product_attention


def around(before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def fn(x: Tensor) -> Tensor:
        y = before(x)
        return after(attend(y, y, y, is_causal=True))

    return fn


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


SEQUENCES = [
    pytest.param(around(heads, lambda y: y), (3, 6, 8), (1, 1, 1), (2, 1, 1), id="from [B, S, E]"),
    pytest.param(around(lambda x: heads(x.transpose(0, 1)), lambda y: y.permute(2, 0, 1, 3)), (6, 3, 8), (0, 1, 1), (0, 1, 1),
                 id="sequence first"),
    pytest.param(around(lambda x: heads(x.view(3, 6, 8)), lambda y: y.transpose(1, 2).reshape(18, 8)), (18, 8), (0, 3, 1), (0, 3, 1),
                 id="inside the rows of a matrix"),
    pytest.param(around(lambda x: heads(x.view(3, 6, 8)), lambda y: y.transpose(1, 2).flatten(1)), (3, 48), (1, 1, 8), (1, 1, 8),
                 id="before the channels in one dim"),
    pytest.param(around(lambda x: heads(x.flip(1)), lambda y: y.amax(2)), (3, 6, 8), None, None, id="ends at operators without rows"),
    pytest.param(around(heads, lambda y: y[:, :, :-1]), (3, 6, 8), (1, 1, 1), (2, 1, 1), id="a cut end is still the sequence"),
    pytest.param(around(heads, lambda y: y[:, :, 1:]), (3, 6, 8), (1, 1, 1), None, id="a cut start is not"),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "shape", "first", "last"), SEQUENCES)
def test_find_sequence(fn: Callable[..., Any], shape: Any, first: Any, last: Any) -> None:
    traced = trace(fn, floats(*shape))
    gm = traced.normal
    drop_noops(gm)
    find_attention(gm)
    before = targets(gm)
    marked = find_sequence(gm)
    assert marked == sum(MARK in node.meta for node in gm.graph.nodes) >= 2 and targets(gm) == before
    ends = (gm.graph.find_nodes(op="placeholder")[0], gm.graph.output_node().all_input_nodes[0])
    for node, expected in zip(ends, (first, last), strict=True):
        mark = node.meta.get(MARK)
        assert (None if mark is None else (mark.dim, mark.outer, mark.inner)) == expected
        assert mark is None or mark.base == 6


# tidy ------------------------------------------------------------------------------------------------------------------


def varied(*numels: int, grads: bool = True, replicated: bool = False) -> tuple[fx.GraphModule, list[Tensor]]:
    """A graph that adds up inputs, each through a `vary`; those stand at the top, where `shard` puts them."""
    graph = fx.Graph()
    inputs = [floats(n) for n in numels]
    nodes = [graph.placeholder(f"w{i}") for i in range(len(numels))]
    total: Any = 0
    for node, value in zip(nodes, inputs, strict=True):
        node.meta.update(val=value, requires_grad=grads, is_parameter=grads)
    for used in [graph.call_function(collectives.vary, (node,), {"group": ""}) for node in nodes]:
        total = graph.call_function(aten.add.Tensor, (graph.call_function(aten.sum.default, (used,)), total))
    results = (total, graph.call_function(aten.neg.default, (nodes[0],))) if replicated else (total,)
    graph.output(results)
    return fx.GraphModule({}, graph), inputs


@pytest.mark.parametrize(
    ("bucket_bytes", "buckets"),
    [
        pytest.param(1 << 20, [[4, 4, 100]], id="all in one"),
        pytest.param(40, [[4, 4], [100]], id="as many as fit"),
        pytest.param(16, [[4], [4], [100]], id="one that is too large has a bucket of its own"),
        pytest.param(0, [[4], [4], [100]], id="no room"),
    ],
)
def test_bucket_varies(bucket_bytes: int, buckets: list[list[int]]) -> None:
    gm, inputs = varied(4, 4, 100)
    before = run(gm, inputs)
    assert bucket_varies(gm, bucket_bytes=bucket_bytes) == len(buckets)
    gm.graph.lint()
    gm.recompile()
    joined = gm.graph.find_nodes(op="call_function", target=collectives.vary_many)
    assert [[n.meta["val"].numel() for n in node.all_input_nodes] for node in joined] == buckets and count(gm, collectives.vary) == 0
    check_same_values(before, run(gm, inputs))


@pytest.mark.parametrize(
    ("grads", "dropped"), [pytest.param(True, 0, id="must not fire: parameters"), pytest.param(False, 2, id="fires: buffers")]
)
def test_drop_idle_varies(grads: bool, dropped: int) -> None:
    gm, inputs = varied(4, 4, grads=grads)
    before = run(gm, inputs)
    assert drop_idle_varies(gm) == dropped and count(gm, collectives.vary) == 2 - dropped
    check_same_values(before, run(gm, inputs))


@pytest.mark.parametrize(
    ("grads", "replicated", "changed", "shared"),
    [
        pytest.param(True, False, 2, 0, id="fires: a varied parameter's gradient is a part of the sum already"),
        pytest.param(True, True, 2, 1, id="fires: a replicated use gets a P-th of its gradient"),
        pytest.param(False, True, 0, 0, id="must not fire: no gradient"),
    ],
)
def test_leave_gradients_unsummed(grads: bool, replicated: bool, changed: int, shared: int) -> None:
    gm, inputs = varied(4, 4, grads=grads, replicated=replicated)
    before = run(gm, inputs)
    assert leave_gradients_unsummed(gm, group="") == changed
    gm.graph.lint()
    gm.recompile()
    assert count(gm, collectives.vary) == 2 - changed and count(gm, collectives.share_gradient) == shared
    check_same_values(before, run(gm, inputs))


# runner ----------------------------------------------------------------------------------------------------------------


def doubled(gm: fx.GraphModule) -> int:
    """A pass: adds a dead node, and returns a count."""
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(aten.neg.default, (gm.graph.find_nodes(op="placeholder")[0],))
    return 7


def broken(gm: fx.GraphModule) -> int:
    raise KeyError("nothing here")


def refused(gm: fx.GraphModule) -> int:
    raise UnsupportedError("a user's mistake")


def test_the_runner_records_tidies_up_and_shows_each_pass() -> None:
    gm, seen = varied(4)[0], []
    nodes = len(gm.graph.nodes)
    passes = (Pass("one", doubled), Pass("two", doubled))
    records = run_passes(gm, passes, observe=lambda name, gm: seen.append((name, len(gm.graph.nodes))))
    assert seen == [("one", nodes), ("two", nodes)], "dead code is gone"
    assert [(r.name, r.result, r.num_nodes) for r in records.values()] == [("one", 7, nodes), ("two", 7, nodes)]


def test_a_pass_can_be_switched_off_by_name() -> None:
    assert set(run_passes(varied(4)[0], (Pass("one", doubled), Pass("two", broken)), skip=frozenset({"two"}))) == {"one"}


@pytest.mark.parametrize(
    ("passes", "skip", "message"),
    [
        pytest.param((Pass("one", doubled),), {"three"}, "no pass is called three; there are: one", id="an unknown name"),
        pytest.param((Pass("one", broken),), set(), "internal error in pass 'one': KeyError: 'nothing here'", id="a bug names its pass"),
        pytest.param((Pass("one", refused),), set(), "^a user's mistake$", id="a user's mistake goes through as it is"),
    ],
)
def test_errors_of_the_runner(passes: tuple[Pass, ...], skip: set[str], message: str) -> None:
    with pytest.raises(AutoSeqError, match=message):
        run_passes(copy.deepcopy(varied(4)[0]), passes, skip=frozenset(skip))
