"""The whole path: unmodified models train on split sequences with one device's loss and gradients."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import models
from ranks import run_ranks
from training_job import GRADIENT_TOLERANCE, LOSS_TOLERANCE, check_same_numbers, relative, train_once

STRATEGIES = ["ulysses", "ring", "gather_kv"]


# The zoo trains models of transformers with the others.
@pytest.mark.parametrize(
    ("model", "strategy"), [("llama", "gather_kv"), ("mistral", "ring"), ("gpt2", "ulysses"), *(("plain", each) for each in STRATEGIES)]
)
def test_a_model_trains_with_one_devices_numbers(model: str, strategy: str) -> None:
    case = {"model": model, "batch": {"batch_size": 2, "length": 32}, "options": {"strategy": strategy, "inner": "aot_eager"}}
    results = check_same_numbers(case, 2)
    assert results[0]["type"] == "DeferredTensor"


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_37_tokens_on_3_ranks_with_a_rank_whose_labels_are_all_ignored(strategy: str, layout: str) -> None:
    batch = {"batch_size": 1, "length": 37, "ignored_until": 26}
    check_same_numbers({"model": "plain", "batch": batch, "options": {"strategy": strategy, "layout": layout}}, 3)


@pytest.mark.parametrize(
    ("case", "world_size"),
    [
        pytest.param({"model": "llama", "options": {"strategy": "ulysses"}}, 4, id="more ranks than KV heads"),
        pytest.param({"model": "llama", "options": {"strategy": "ring", "layout": "zigzag"}}, 4, id="zigzag ring on four ranks"),
        pytest.param({"model": "mistral", "options": {"strategy": "gather_kv"}}, 4, id="a window smaller than a shard"),
        pytest.param({"model": "llama", "changes": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}}, 4,
                     id="heads that the ranks do not divide"),
        pytest.param({"model": "llama", "changes": {"num_attention_heads": 4, "num_key_value_heads": 1}}, 3, id="one KV head"),
        pytest.param({"model": "plain", "options": {"strategy": "ring"}}, 8, id="eight ranks"),
        pytest.param({"model": "gpt2", "changes": {"loss_type": None}}, 2, id="a graph break between the model and its loss"),
        pytest.param({"model": "llama", "options": {"outputs": "full"}}, 2, id="outputs gathered at once"),
    ],
)  # fmt: skip
def test_other_shapes_have_one_devices_numbers(case: dict[str, Any], world_size: int) -> None:
    check_same_numbers({"batch": {"batch_size": 2, "length": 37}, **case}, world_size)


def test_one_rank_without_torch_distributed_has_one_devices_numbers() -> None:
    result = train_once(0, 1, {"model": "llama", "batch": {"batch_size": 2, "length": 21}})
    assert result["loss"] <= LOSS_TOLERANCE
    assert max(result["gradients"].values()) <= GRADIENT_TOLERANCE
    assert result["type"] == "Tensor"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ulysses", "ring"])
def test_inductor_compiles_the_rewritten_graph(strategy: str) -> None:
    case = {
        "model": "llama", "changes": {"num_hidden_layers": 1}, "batch": {"batch_size": 1, "length": 21},
        "options": {"strategy": strategy, "inner": "inductor"},
    }  # fmt: skip
    check_same_numbers(case, 2)


# Inputs that change the mask ------------------------------------------------------------------------------------------


def padded(case: dict[str, Any]) -> dict[str, Any]:
    B, S = case["batch"]["batch_size"], case["batch"]["length"]
    attention_mask = torch.ones(B, S, dtype=torch.int64)
    attention_mask[0, : S // 3] = 0
    attention_mask[-1, S - S // 4 :] = 0
    return {**case, "extra": {"attention_mask": attention_mask}}


def packed(case: dict[str, Any]) -> dict[str, Any]:
    B, S = case["batch"]["batch_size"], case["batch"]["length"]
    lengths = (S // 3, S // 5, S - S // 3 - S // 5)  # a border inside a shard, a document over a border
    return {**case, "extra": {"position_ids": torch.cat([torch.arange(n) for n in lengths]).expand(B, S)}}


@pytest.mark.parametrize(("change", "strategy"), [(padded, "ring"), (padded, "gather_kv"), (packed, "ring"), (packed, "ulysses")])
def test_padding_and_packed_documents_keep_their_masks(change: Callable[..., dict[str, Any]], strategy: str) -> None:
    case = {"model": "llama", "batch": {"batch_size": 2, "length": 31}, "options": {"strategy": strategy}}
    check_same_numbers(change(case), 2)


# Lengths that change --------------------------------------------------------------------------------------------------


def train_on_lengths(rank: int, world_size: int, lengths: list[int], dynamic: bool | None) -> dict[str, Any]:
    model = models.make("plain", layers=1)
    oracle = copy.deepcopy(model)
    compiled = torch.compile(model, backend="autoseq", options={"inner": "aot_eager", "strict": True}, dynamic=dynamic)
    torch._dynamo.utils.counters.clear()
    worst = 0.0
    for length in lengths:
        kwargs = models.batch("plain", batch_size=1 if dynamic else 2, length=length)
        loss, logits = models.loss_and_logits(compiled(**kwargs))
        expected, expected_logits = models.loss_and_logits(oracle(**kwargs))
        loss.backward()
        expected.backward()
        pairs = [(p.grad, e.grad) for p, e in zip(model.parameters(), oracle.parameters(), strict=True)]
        pairs.append((logits.detach() + 0, expected_logits.detach()))
        worst = max(worst, *(relative(a, e) for a, e in pairs))
    return {"worst": worst, "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


@pytest.mark.parametrize(
    ("dynamic", "graphs"), [(None, 2), (True, 1)], ids=["the second length makes it symbolic", "symbolic from the start"]
)
def test_new_lengths_do_not_recompile(dynamic: bool | None, graphs: int) -> None:
    for result in run_ranks(train_on_lengths, 2, [21, 24, 37, 50], dynamic):
        assert result["worst"] <= GRADIENT_TOLERANCE
        assert result["graphs"] == graphs


# Regions: gradient checkpointing, no_grad, inputs that need a gradient --------------------------------------------------


def train_checkpointed(rank: int, world_size: int) -> float:
    model = models.make("llama", num_hidden_layers=1)
    model.gradient_checkpointing_enable()
    oracle = copy.deepcopy(model)
    kwargs = models.batch("llama", batch_size=2, length=21)
    torch.compile(model, backend="autoseq", options={"inner": "aot_eager"})(**kwargs).loss.backward()
    oracle(**kwargs).loss.backward()
    return max(relative(p.grad, e.grad) for p, e in zip(model.parameters(), oracle.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_attention_inside_activation_checkpoints_is_split_too() -> None:
    assert max(run_ranks(train_checkpointed, 2)) <= GRADIENT_TOLERANCE


def infer_and_differentiate_inputs(rank: int, world_size: int) -> tuple[float, float]:
    model = models.make("llama").eval()
    oracle = copy.deepcopy(model)
    compiled = torch.compile(model, backend="autoseq", options={"inner": "eager"})
    ids = torch.randint(0, models.VOCABULARY, (2, 21))
    with torch.no_grad():
        inferred = relative(compiled(input_ids=ids).logits + 0, oracle(input_ids=ids).logits)
    ours = torch.randn(2, 21, 32).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    compiled(inputs_embeds=ours).logits.square().mean().backward()
    oracle(inputs_embeds=theirs).logits.square().mean().backward()
    assert ours.grad is not None and theirs.grad is not None
    return inferred, relative(ours.grad, theirs.grad)


def test_inference_and_gradients_of_inputs_are_exact() -> None:
    for inferred, gradient in run_ranks(infer_and_differentiate_inputs, 2):
        assert max(inferred, gradient) <= GRADIENT_TOLERANCE


# Attention that is written unusually ------------------------------------------------------------------------------------


class Unusual(nn.Module):
    """A projection and one attention, called in a way that a test chooses."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.call = call
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(CALLS[self.call](q, k, v).transpose(1, 2).flatten(2))


def _under_autocast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return attend(q, k, v).float()


attend = nn.functional.scaled_dot_product_attention
CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "keys of one batch element": lambda q, k, v: attend(q, k[:1], v),
    "queries of one batch element": lambda q, k, v: attend(q[:1], k, v),
    "one value head": lambda q, k, v: attend(q, k, v[:, :1]),
    "one key head with enable_gqa": lambda q, k, v: attend(q, k[:, :1], v[:, :1], enable_gqa=True),
    "fewer queries than keys, causal from the top left": lambda q, k, v: torch.cat([attend(q[:, :, :5], k, v, is_causal=True)] * 2, 2),
    "heads folded into the batch": lambda q, k, v: attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), is_causal=True).unflatten(
        0, (2, 2)
    ),
    "heads repeated the other way round": lambda q, k, v: attend(q, k[:, None].expand(-1, 2, -1, -1, -1)[:, :, 0], v),
    "under autocast": _under_autocast,
}


def run_unusual(rank: int, world_size: int, call: str) -> float:
    torch.manual_seed(0)
    model = Unusual(call)
    oracle = copy.deepcopy(model)
    x = torch.randn(2, 11, 8)
    # One ordinary attention, so that a call which is left whole does not leave the program without any.
    actual = torch.compile(lambda x: model(x) + attend(x[:, None], x[:, None], x[:, None])[:, 0, : model(x).shape[1]], backend="autoseq",
                           options={"inner": "eager"})(x)  # fmt: skip
    expected = oracle(x) + attend(x[:, None], x[:, None], x[:, None])[:, 0, : oracle(x).shape[1]]
    actual.square().sum().backward()
    expected.square().sum().backward()
    pairs = [
        (actual.detach() + 0, expected.detach()),
        *((p.grad, e.grad) for p, e in zip(model.parameters(), oracle.parameters(), strict=True)),
    ]
    return max(((a - e).norm() / e.norm().clamp(min=0.1)).item() for a, e in pairs)  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("call", list(CALLS))
def test_unusual_calls_have_one_devices_numbers(call: str) -> None:
    tolerance = 1e-2 if "autocast" in call else GRADIENT_TOLERANCE  # bfloat16 has 8 bits, and both sides round to it
    assert max(run_ranks(run_unusual, 2, call)) <= tolerance
