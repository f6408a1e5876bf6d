"""Attention in stages of heads: the same numbers and bytes as in one, and messages travel while other heads are computed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from attention_checks import assembled, oracle
from attention_job import Run, attend_on_rank, call_keywords, runs_of, shard, site_of
from autoseq.backend import INDUCTOR
from autoseq.runtime import stages
from autoseq.runtime.strategies import STRATEGIES
from dense_attention import Case, check_close, relative_error
from ranks import run_ranks
from training_job import GRADIENT_TOLERANCE, LOSS_TOLERANCE, train_once

STAGED = ["ulysses", "gather_kv"]


@contextmanager
def as_many_stages_as_there_can_be() -> Iterator[None]:
    """However short the messages."""
    before, stages.MIN_STAGE_BYTES = stages.MIN_STAGE_BYTES, 1
    try:
        yield
    finally:
        stages.MIN_STAGE_BYTES = before


EVERYTHING = dict(has_sinks=True, score="relative bias from a table that learns", dropout_p=0.2)
CASES = {
    "multi-head attention": Case(16, 16, batch=2, heads=8, kv_heads=8),
    "grouped heads": Case(16, 16, heads=16, kv_heads=8, mask="none"),
    "few KV heads": Case(16, 16, heads=12, kv_heads=2),
    "more ranks than KV heads": Case(16, 16, batch=2, heads=8, kv_heads=1),
    "uneven heads": Case(16, 16, heads=7, kv_heads=7, mask="none"),
    "uneven groups": Case(18, 18, heads=9, kv_heads=3),
    "some ranks without heads": Case(16, 16, heads=2, kv_heads=1, mask="none"),
    "padded rows": Case(13, 13, batch=2, heads=6, kv_heads=3, mask="none"),
    "a rank without rows": Case(5, 5, heads=4),
    "cross attention, other value dim": Case(7, 21, heads=8, kv_heads=4, value_dim=5, mask="causal aligned at the end"),
    "bfloat16": Case(24, 24, heads=8, kv_heads=2, head_dim=32, value_dim=32, dtype=torch.bfloat16),
    "a window": Case(32, 32, heads=4, kv_heads=4, mask="window"),
    "chunks that no tensor decides": Case(24, 24, heads=6, kv_heads=3, mask="chunks"),
    "segments": Case(23, 23, batch=2, heads=6, kv_heads=3, mask="segments"),
    "a mask that depends on the head": Case(17, 17, heads=8, kv_heads=4, mask="head dependent"),
    "a mean of all keys in empty rows": Case(11, 11, heads=6, kv_heads=3, mask="only the future", empty_rows="uniform"),
    "sinks": Case(16, 16, heads=6, kv_heads=3, has_sinks=True),
    "slopes that learn": Case(14, 14, heads=8, kv_heads=4, score="ALiBi with slopes that learn"),
    "two captures that learn": Case(14, 14, batch=2, heads=8, kv_heads=4, score="two captures that learn"),
    "everything": Case(15, 15, batch=2, heads=8, kv_heads=4, mask="segments", **EVERYTHING),
    "everything, one KV head": Case(15, 15, heads=6, kv_heads=1, **EVERYTHING),
}
# What only the values of a tensor rule out is not sent either, and no cost knows of it.
DECIDED_BY_TENSORS = ("segments", "everything")

Counted = tuple[int, int]
"""Messages and bytes of one step."""


def attend_and_count(rank: int, P: int, runs: dict[str, Run]) -> list[tuple[tuple[Tensor, ...], Counted]]:
    from autoseq.runtime.counting import counters, reset_counters

    found = []
    with as_many_stages_as_there_can_be():
        for name, run in runs.items():
            reset_counters()
            try:
                results = attend_on_rank(rank, P, *run)
            except Exception as error:
                raise RuntimeError(f"in the run {name!r}") from error
            messages, sent = (sum(part) for part in zip(*(counters().values() or [(0, 0)]), strict=True))
            found.append((results, (messages, sent)))
    return found


@pytest.mark.parametrize("P", [2, 3, 4])
def test_numbers_and_bytes_of_several_stages(P: int) -> None:
    runs = {f"{strategy}: {name}": run for strategy in STAGED for name, run in runs_of(strategy, P, CASES).items()}
    per_rank = run_ranks(attend_and_count, P, runs, backend="autoseq_counted")
    wrong, several = [], 0
    for i, (name, (strategy, layout, case)) in enumerate(runs.items()):
        # bfloat16 rounds what goes in and out, 2^-9 each; float64 differs in the order of summation alone.
        tolerance = 3e-2 if case.dtype == torch.bfloat16 else 1e-10
        try:
            check_close(assembled([of_rank[i][0] for of_rank in per_rank], layout, case), oracle(case), tolerance)
            for rank, of_rank in enumerate(per_rank):
                several += check_counted(strategy, case, P, layout, rank, of_rank[i][1])
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)
    assert several > len(runs), "most of the table must have several stages"


def check_counted(strategy: str, case: Case, P: int, layout: str, rank: int, counted: Counted) -> bool:
    """Messages and bytes are what the cost says, as many bytes as in one stage; whether there are several."""
    site = site_of(case)
    with as_many_stages_as_there_can_be():
        cost = STRATEGIES[strategy].cost(site, P, layout, rank)
    one = STRATEGIES[strategy].cost(site, P, layout, rank)
    messages, sent = cost.forward_messages + cost.backward_messages, cost.forward_bytes + cost.backward_bytes
    if strategy == "gather_kv" and case.mask in DECIDED_BY_TENSORS:
        assert counted[0] <= messages and counted[1] <= sent
    else:
        assert counted == (messages, sent)
    if case.mask != "head dependent":
        assert sent == one.forward_bytes + one.backward_bytes
    return messages > one.forward_messages + one.backward_messages


# The order of calls ---------------------------------------------------------------------------------------------------

ROWS, HEADS, KV_HEADS = 48, 12, 6
POSTS = ("all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "send_rows", "send_gradients")
ATTENDS = ("whole_attention", "gathered_attention", "whole_attention_backward", "gathered_attention_backward")

# Of three stages. Each one's keys are posted before the attention of the stage before, and waited for after it; and so are, where
# there are any, its results before and after the attention of the next stage.
BOTH_WAYS = [
    "post 0", "post 1", "wait 0", "attend", "post 2", "post 3", "wait 1", "attend", "post 4", "wait 2", "wait 3", "attend", "post 5",
    "wait 4", "wait 5",
]  # fmt: skip
ONE_WAY = ["post 0", "post 1", "wait 0", "attend", "post 2", "wait 1", "attend", "wait 2", "attend"]
ORDERS = {
    ("ulysses", "causal"): (BOTH_WAYS, BOTH_WAYS),
    ("gather_kv", "causal"): (ONE_WAY, BOTH_WAYS),
    ("gather_kv", "none"): (ONE_WAY, BOTH_WAYS),
}


@contextmanager
def three_stages() -> Iterator[None]:
    before, stages.MAX_STAGES = stages.MAX_STAGES, 3
    try:
        with as_many_stages_as_there_can_be():
            yield
    finally:
        stages.MAX_STAGES = before


def ordered_case(mask: str) -> Case:
    return Case(ROWS, ROWS, heads=HEADS, kv_heads=KV_HEADS, mask=mask)


class Order:
    """Posts, waits and attentions as they come; what is waited for is found by the tensor that the post returned."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._posted: dict[Any, int] = {}
        self._posts = 0

    def add(self, op: str, argument: Any, result: Any) -> None:
        if op in POSTS:
            self._posted[result] = self._posts
            self.events.append(f"post {self._posts}")
            self._posts += 1
        elif op == "wait_tensor":
            self.events.append(f"wait {self._posted[argument]}")
        elif op in ATTENDS:
            self.events.append("attend")


class Watch(TorchDispatchMode):
    """The order of what is called, and the bytes of what some operators returned and is still alive, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.order = Order()
        self.most_held: dict[str, int] = {}
        self._held: dict[str, dict[int, tuple[StorageWeakRef, int]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        op, first = func.overloadpacket.__name__, args[0] if args else None
        self.order.add(op, _storage(first), _storage(result))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor) and op != "wait_tensor":
                self._hold(op, each.untyped_storage())
        return result

    def _hold(self, op: str, storage: torch.UntypedStorage) -> None:
        held = self._held.setdefault(op, {})
        held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if op in POSTS and _held_bytes(held) > self.most_held.get(op, 0):
            # gloo's thread lets go of a message's tensors only some time after the message has been waited for.
            time.sleep(0.1)
        self.most_held[op] = max(self.most_held.get(op, 0), _held_bytes(held))


def _held_bytes(held: dict[int, tuple[StorageWeakRef, int]]) -> int:
    """Of those that are still alive; the others are dropped."""
    for key, (alive, _) in list(held.items()):
        if alive.expired():
            del held[key]
    return sum(size for _, size in held.values())


def _storage(x: Any) -> int | None:
    """What does not change from a post to its wait."""
    return x.untyped_storage().data_ptr() if isinstance(x, Tensor) else None


def watch_a_step(rank: int, P: int, strategy: str, mask: str) -> list[tuple[list[str], dict[str, int]]]:
    """What a forward, and then a backward, called and held."""
    case = ordered_case(mask)
    *leaves, grad = (shard(x, rank, P, "contiguous", padding="edge") for x in case.tensors())
    keywords = call_keywords(case, "contiguous")
    with three_stages():
        with Watch() as forward:
            out = STRATEGIES[strategy].attention(*(x.requires_grad_() for x in leaves), [], **keywords)
        with Watch() as backward:
            torch.autograd.grad(out, leaves, grad)
    return [(watch.order.events, watch.most_held) for watch in (forward, backward)]


def trace_a_step(rank: int, P: int, strategy: str, mask: str) -> list[list[str]]:
    """The order in the graphs that AOTAutograd makes of a forward and a backward."""
    case = ordered_case(mask)
    *leaves, grad = (shard(x, rank, P, "contiguous", padding="edge") for x in case.tensors())
    attention: Any = torch.compiler.allow_in_graph(STRATEGIES[strategy].attention)
    keywords, orders = call_keywords(case, "contiguous"), []

    def note(gm: torch.fx.GraphModule, _: Any) -> Any:
        order = Order()
        for node in gm.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                order.add(node.target.overloadpacket.__name__, node.args[0] if node.args else None, node)
        orders.append(order.events)
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)

    @torch.compile(backend=backend, fullgraph=True)
    def step(qkv: list[Tensor]) -> Tensor:
        return attention(*(x * 1.0 for x in qkv), [], **keywords) * 1.0

    with three_stages():
        out = step([x.requires_grad_() for x in leaves])
        torch.autograd.grad(out, leaves, grad)
    return orders


@pytest.mark.parametrize(("strategy", "mask"), ORDERS)
def test_messages_travel_while_other_heads_are_computed(strategy: str, mask: str) -> None:
    forward, backward = ORDERS[strategy, mask]
    for watched in run_ranks(watch_a_step, 2, strategy, mask):
        assert [events for events, _ in watched] == [forward, backward]


@pytest.mark.parametrize(("strategy", "mask"), ORDERS)
def test_the_order_is_that_of_the_traced_graphs(strategy: str, mask: str) -> None:
    for traced in run_ranks(trace_a_step, 2, strategy, mask):
        assert traced == list(ORDERS[strategy, mask])


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_no_more_than_two_stages_of_gathered_keys_are_held(mask: str) -> None:
    P, case = 2, ordered_case(mask)
    of_a_stage = P * case.batch * KV_HEADS // 3 * (ROWS // P) * (case.head_dim + case.value_dim) * case.dtype.itemsize
    gathers, homes = ("all_gather_into_tensor", "reduce_scatter_tensor") if mask == "none" else ("send_rows", "send_gradients")
    for (_, forward), (_, backward) in run_ranks(watch_a_step, P, "gather_kv", mask):
        assert forward[gathers] == backward[gathers] == 2 * of_a_stage
        # Gradients are as large here as keys. What has come home is a rank's own share, or has room for everybody's.
        assert backward["gathered_attention_backward"] <= 2 * of_a_stage + HEADS * (ROWS // P) * case.head_dim * case.dtype.itemsize
        assert backward[homes] <= 3 * of_a_stage


# Gradients that nobody asks for ---------------------------------------------------------------------------------------


def ask_for_some(rank: int, P: int, case: Case, runs: list[tuple[str, tuple[int, ...]]]) -> list[tuple[list[Tensor], Counted]]:
    """Some of the gradients of q, k, v and a capture, and what the backward sent."""
    from autoseq.runtime.counting import counters, reset_counters

    found = []
    for strategy, wanted in runs:
        *tensors, grad = (shard(x, rank, P, "zigzag", padding="edge") for x in case.tensors())
        tensors += [capture.detach() for capture in case.captures()]
        for i in wanted:
            tensors[i].requires_grad_()
        with three_stages():
            out = STRATEGIES[strategy].attention(*tensors[:3], tensors[3:], **call_keywords(case, "zigzag"))
            reset_counters()
            grads = torch.autograd.grad(out, [tensors[i] for i in wanted], grad)
        sent = [sum(part) for part in zip(*(counters().values() or [(0, 0)]), strict=True)]
        found.append((list(grads), (sent[0], sent[1])))
    return found


ASKED = [(0, 1, 2, 3), (0,), (1,), (2,), (3,), (0, 2)]


def test_gradients_that_nobody_asks_for_are_not_sent() -> None:
    case = replace(ordered_case("causal"), score="ALiBi with slopes that learn")
    runs = [(strategy, wanted) for strategy in STAGED for wanted in ASKED]
    for of_rank in run_ranks(ask_for_some, 2, case, runs, backend="autoseq_counted"):
        found = dict(zip(runs, of_rank, strict=True))
        for strategy, wanted in runs:
            every, (messages, sent) = found[strategy, ASKED[0]]
            grads, (fewer_messages, fewer) = found[strategy, wanted]
            for i, grad in zip(wanted, grads, strict=True):
                # Not the same bits: where the capture learns nothing, a kernel computes, in another order of summation.
                assert relative_error(grad, every[i]) < 1e-12, (strategy, wanted)
            homeward = {"ulysses": 3 in wanted and len(wanted) == 1, "gather_kv": not {1, 2} & set(wanted)}[strategy]
            assert fewer_messages == messages - (3 if homeward else 0), (strategy, wanted)
            assert (fewer < sent) == (homeward or (strategy == "ulysses" and wanted != ASKED[0])), (strategy, wanted)


# Whole models ---------------------------------------------------------------------------------------------------------


def train_in_stages(rank: int, P: int, case: dict[str, Any]) -> dict[str, Any]:
    with as_many_stages_as_there_can_be():
        return train_once(rank, P, case)


@pytest.mark.parametrize("strategy", STAGED)
def test_a_model_is_trained_in_stages(strategy: str) -> None:
    """Of four heads and two KV heads: two stages on two ranks."""
    options, changes = {"strategy": strategy, "inner": "aot_eager"}, {"num_hidden_layers": 1}
    case = {"model": "llama", "changes": changes, "batch": {"batch_size": 2, "length": 37}, "options": options}
    for result in run_ranks(train_in_stages, 2, case):
        assert result["loss"] <= LOSS_TOLERANCE
        assert max(result["gradients"].values()) <= GRADIENT_TOLERANCE


def compile_a_step(rank: int, P: int, strategy: str, mask: str) -> tuple[list[list[str]], tuple[Tensor, ...]]:
    """The order in the code that Inductor makes of a forward and a backward, and their results."""
    from torch._inductor.utils import run_and_get_code

    case = ordered_case(mask)
    *leaves, grad = (shard(x, rank, P, "contiguous", padding="edge").requires_grad_() for x in case.tensors())
    attention: Any = torch.compiler.allow_in_graph(STRATEGIES[strategy].attention)
    keywords = call_keywords(case, "contiguous")

    @torch.compile(fullgraph=True, options=INDUCTOR)
    def step(qkv: list[Tensor]) -> Tensor:
        return attention(*(x * 1.0 for x in qkv), [], **keywords) * 1.0

    def both_ways() -> tuple[Tensor, ...]:
        out = step(leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad.detach()))

    with three_stages():
        results, codes = run_and_get_code(both_ways)
    return [_order_in(code) for code in codes], results


def _order_in(code: str) -> list[str]:
    order, names = Order(), {}
    for line in code.splitlines():
        if alias := re.fullmatch(r"\s*(\w+) = (\w+)(?:  #.*)?", line):
            names[alias[1]] = names.get(alias[2], alias[2])
        elif call := re.match(r"\s*(?:(\w+) = )?torch\.ops\.\w+\.(\w+)\.default\((\w*)", line):
            order.add(call[2], names.get(call[3], call[3]), call[1])
    return order.events


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "mask"), ORDERS)
def test_inductor_keeps_the_order(strategy: str, mask: str) -> None:
    compiled = run_ranks(compile_a_step, 2, strategy, mask, timeout_s=300)
    for orders, _ in compiled:
        assert orders == list(ORDERS[strategy, mask])
    case = ordered_case(mask)
    check_close(assembled([results for _, results in compiled], "contiguous", case), oracle(case), 1e-10)
