"""Activation checkpointing: what is recomputed, what selective policies keep, and that nothing is sent a second time."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from autoseq.passes.checkpoint_policy import policy_of
from autoseq.runtime.counting import counters, reset_counters
from graphs import trace
from ranks import run_ranks

aten = torch.ops.aten
TOLERANCE = 1e-5  # relative L2 in float32; sums over rows run in another order
W = 16

# What a region computes beside its attention, and what of it needs other ranks.
INSIDE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "attention alone": lambda m, x: m.attend(x),
    "a sum over the sequence": lambda m, x: m.attend(x) * m.lin(x).mean(1, keepdim=True).sigmoid(),
    "a product over the sequence": lambda m, x: m.attend(x) @ torch.einsum("bsd,bse->bde", m.lin(x), x).tanh(),
    "a step on gathered values": lambda m, x: m.attend(x) + m.lin(x).sort(1).values,
    "two attentions": lambda m, x: m.attend(m.attend(x).tanh()),
}


class Layers(nn.Module):
    """Two layers, each a checkpointed region or not."""

    def __init__(self, inside: str, checkpointed: bool) -> None:
        super().__init__()
        self.inside, self.checkpointed = inside, checkpointed
        self.qkv, self.lin = nn.Linear(W, 3 * W), nn.Linear(W, W)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            region = INSIDE[self.inside]
            x = x + (checkpoint(region, self, x, use_reentrant=False) if self.checkpointed else region(self, x))
        return x


def worst(model: nn.Module, oracle: nn.Module) -> float:
    """The largest relative error of a gradient."""
    errors = []
    for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        if ours.grad is not None and theirs.grad is not None:
            errors.append(((ours.grad - theirs.grad).norm() / theirs.grad.norm()).item())
    return max(errors)


def train(rank: int, P: int, inside: str, checkpointed: bool, strategy: str) -> tuple[float, dict[str, Any]]:
    torch.manual_seed(0)
    model, x, weights = Layers(inside, checkpointed), torch.randn(2, 11, W), torch.randn(2, 11, W)
    oracle = copy.deepcopy(model)
    compiled = torch.compile(model, backend="autoseq", options={"inner": "aot_eager", "strategy": strategy})
    compiled(x)  # the first call also compares inputs and compiles
    reset_counters()
    (compiled(x) * weights).sum().backward()
    sent = dict(counters())
    (oracle(x) * weights).sum().backward()
    return worst(model, oracle), sent


@pytest.mark.parametrize("strategy", ["ulysses", "ring"])
@pytest.mark.parametrize("inside", list(INSIDE))
def test_a_checkpointed_region_sends_nothing_twice(inside: str, strategy: str) -> None:
    without, within = (run_ranks(train, 2, inside, on, strategy, backend="autoseq_counted") for on in (False, True))
    for (_, sent), (error, sent_again) in zip(without, within, strict=True):
        assert error <= TOLERANCE
        assert sent_again == sent


# Policies -------------------------------------------------------------------------------------------------------------


def products_are_saved(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = op in (aten.mm.default, aten.addmm.default, aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def every_second_product() -> Any:
    seen = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
        seen.extend([op] if op is aten.mm.default else [])
        return op is aten.mm.default and len(seen) % 2 == 0

    return create_selective_checkpoint_contexts(policy)


def selective(policy: Any, fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`fn` as a region with a policy: a list of operators to save, a function, or what makes the contexts."""

    def context_fn() -> Any:
        return policy() if policy is every_second_product else create_selective_checkpoint_contexts(policy)

    return lambda *args: checkpoint(fn, *args, use_reentrant=False, context_fn=context_fn)


def layer(x: Tensor, w: Tensor) -> Tensor:
    return torch.sin(F.linear(torch.cos(x @ w), w))


def vmapped(x: Tensor, w: Tensor) -> Tensor:
    return torch.vmap(torch.cos)(x @ w) @ w


POLICIES = [
    pytest.param(products_are_saved, layer, ["aten.matmul.default", "aten.linear.default"], id="a function"),
    pytest.param([aten.sin.default], layer, ["aten.sin.default"], id="a list of operators"),
    pytest.param([aten.mm.default], layer, ["aten.matmul.default", "aten.linear.default"], id="operators that are made of the listed one"),
    pytest.param(every_second_product, layer, ["aten.linear.default"], id="a policy that counts"),
    pytest.param([aten.tanh.default], layer, [], id="nothing"),
    pytest.param(products_are_saved, vmapped, ["aten.matmul.default"] * 2, id="a vmap inside"),
]


@pytest.mark.parametrize(("policy", "fn", "saved"), POLICIES)
def test_what_a_policy_saves_is_tagged_so(policy: Any, fn: Any, saved: list[str]) -> None:
    traced = trace(selective(policy, fn), torch.randn(4, 4).requires_grad_(), torch.randn(4, 4).requires_grad_())
    tags = {node: node.meta.get("recompute") for node in traced.normal.graph.nodes if node.op == "call_function"}
    assert [str(node.target) for node, tag in tags.items() if tag is CheckpointPolicy.MUST_SAVE] == saved
    assert set(tags.values()) <= {CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE}


def test_contexts_of_another_kind_are_refused() -> None:
    def context_fn() -> Any:
        return torch.no_grad(), torch.no_grad()

    assert policy_of(context_fn) is None
    message = r"UnsupportedError: the activation checkpointing at .*test_checkpointing\.py:\d+ .* has a context_fn of its own"
    with pytest.raises(Exception, match=message):
        trace(lambda x: checkpoint(torch.sin, x, use_reentrant=False, context_fn=context_fn), torch.randn(3).requires_grad_())


def train_selectively(rank: int, P: int, products: bool) -> tuple[float, int, Any]:
    """One step of a checkpointed region; the largest error of a gradient, how many products the step computes, what it sends."""
    torch.manual_seed(0)
    model, x = Layers("two attentions", False), torch.randn(2, 11, W)
    policy = products_are_saved if products else [aten.tanh.default]
    oracle = copy.deepcopy(model)
    region = selective(policy, model)
    compiled = torch.compile(lambda x: region(x).square().mean(), backend="autoseq", options={"inner": "aot_eager"})
    compiled(x)
    reset_counters()
    with Counted() as counted:
        compiled(x).backward()
    oracle(x).square().mean().backward()
    return worst(model, oracle), counted.products, dict(counters())


class Counted(TorchDispatchMode):
    """Counts products with a weight."""

    products = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # it only watches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in (aten.mm.default, aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_what_a_policy_saves_is_not_computed_again() -> None:
    for all_again, saved in zip(run_ranks(train_selectively, 2, False, backend="autoseq_counted"),
                                run_ranks(train_selectively, 2, True, backend="autoseq_counted"), strict=True):  # fmt: skip
        assert max(all_again[0], saved[0]) <= TOLERANCE
        assert saved[1] < all_again[1], "products of the forward are saved"
        assert saved[2] == all_again[2], "and nothing is sent for it"
