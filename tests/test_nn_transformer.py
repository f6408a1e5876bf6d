"""torch's own transformer modules are split however they are called, in training and on the fused paths of eval."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from autoseq.passes.find_attention import find_attention, is_attention
from autoseq.passes.normalize import drop_noops
from autoseq.passes.open_encoder_layer import encoder_layer, self_attention
from autoseq.passes.read_masks import read_masks
from graphs import trace
from ranks import run_ranks

B, S, E, H = 2, 9, 16, 4
TOLERANCE = 1e-5  # relative L2 in float32; sums over rows run in another order
OPTIONS = {"inner": "eager"}


def padding(length: int = S) -> Tensor:
    """True where a key is to be ignored: the last of the second row."""
    ignored = torch.zeros(B, length, dtype=torch.bool)
    ignored[1, -2:] = True
    return ignored


def causal(length: int = S, dtype: torch.dtype = torch.float32) -> Tensor:
    if dtype == torch.bool:
        return torch.ones(length, length, dtype=torch.bool).triu(1)
    return nn.Transformer.generate_square_subsequent_mask(length)


def layer(cls: Any = nn.TransformerEncoderLayer, **kwargs: Any) -> Any:
    return cls(E, H, 24, dropout=0.0, batch_first=True, **kwargs)


class Called(nn.Module):
    """A module and the way a test calls it; sequence first if it wants it so."""

    def __init__(self, make: Callable[[], nn.Module], call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.call = make(), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


def attention(**kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(E, H, **{"batch_first": True, **kwargs})


def encoder(layers: int = 2, **kwargs: Any) -> Callable[[], nn.Module]:
    # With nested tensors, eager gives 0 for padding rows in eval mode. torch.compile gives what the layers make of them, on one device too.
    return lambda: nn.TransformerEncoder(layer(**kwargs), layers, enable_nested_tensor=False)


def decoder(**kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.TransformerDecoder(layer(nn.TransformerDecoderLayer, **kwargs), 1)


def across(m: Any, x: Tensor) -> Tensor:
    memory = x[:, :5].sin()
    return m(x, memory, tgt_mask=causal(), tgt_is_causal=True, memory_key_padding_mask=padding(5))


def sequence_first(m: Any, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return m(x, x, x, need_weights=False)[0].transpose(0, 1)


def other_dims(m: Any, x: Tensor) -> Tensor:
    return m(x, x[..., :6], x[..., :10], need_weights=False)[0]


# How a module is made, how it is called, and the mask of each attention that is found.
CAUSAL = "k <= q"
CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], list[str | None]]] = {
    "self-attention": (attention(), lambda m, x: m(x, x, x, need_weights=False)[0], ["all"]),
    "its weights are not used": (attention(), lambda m, x: m(x, x, x)[0], ["all"]),
    "sequence first": (attention(batch_first=False), sequence_first, ["all"]),
    "key padding": (attention(), lambda m, x: m(x, x, x, key_padding_mask=padding(), need_weights=False)[0], [None]),
    "key padding, weights not used": (attention(), lambda m, x: m(x, x, x, key_padding_mask=padding())[0], [None]),
    "a float mask": (attention(), lambda m, x: m(x, x, x, attn_mask=causal(), need_weights=False)[0], [CAUSAL]),
    "a bool mask": (attention(), lambda m, x: m(x, x, x, attn_mask=causal(dtype=torch.bool), need_weights=False)[0], [CAUSAL]),
    "is_causal": (attention(), lambda m, x: m(x, x, x, attn_mask=causal(), is_causal=True, need_weights=False)[0], [CAUSAL]),
    "a mask for each head": (attention(), lambda m, x: m(x, x, x, attn_mask=causal().expand(B * H, S, S), need_weights=False)[0], [None]),
    "a mask and key padding": (attention(), lambda m, x: m(x, x, x, padding().float() * -1e9, attn_mask=causal())[0], [None]),
    "keys and values of other dims": (attention(kdim=6, vdim=10), other_dims, ["all"]),
    "a learned key": (attention(add_bias_kv=True), lambda m, x: m(x, x, x, need_weights=False)[0], [None]),
    "a key of zeros": (attention(add_zero_attn=True), lambda m, x: m(x, x, x, need_weights=False)[0], [None]),
    "an encoder": (encoder(), lambda m, x: m(x), ["all"] * 2),
    "an encoder with a mask": (encoder(), lambda m, x: m(x, mask=causal()), [CAUSAL] * 2),
    "a causal encoder": (encoder(), lambda m, x: m(x, mask=causal(), is_causal=True), [CAUSAL] * 2),
    "an encoder with key padding": (encoder(), lambda m, x: m(x, src_key_padding_mask=padding()), [None] * 2),
    "an encoder with both": (encoder(), lambda m, x: m(x, causal(dtype=torch.bool), padding()), [None] * 2),
    "norm first, gelu": (encoder(norm_first=True, activation="gelu"), lambda m, x: m(x), ["all"] * 2),
    "a decoder": (decoder(), across, [CAUSAL, None]),
    "a decoder, norm first": (decoder(norm_first=True), across, [CAUSAL, None]),
}


def make(name: str, eval_mode: bool = False) -> Called:
    torch.manual_seed(0)
    model = Called(*CALLS[name][:2])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval() if eval_mode else model


@pytest.mark.parametrize("grad", [True, False], ids=["training", "eval under no_grad"])
@pytest.mark.parametrize("name", list(CALLS))
def test_each_attention_is_found_with_its_mask(name: str, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        model, x = make(name, eval_mode=not grad), torch.randn(B, S, E)
        traced = trace(model, x)
        expected, actual = model(x), fx.Interpreter(traced.normal).run(*traced.inputs)[0]
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
    gm = traced.normal
    drop_noops(gm)
    gm.graph.eliminate_dead_code()
    found, left = find_attention(gm)
    read_masks(gm)
    masks = [node.meta["attention"]["mask"] for node in gm.graph.nodes if is_attention(node)]
    assert not left and found == len(CALLS[name][2])
    assert all(wanted in (None, mask) for wanted, mask in zip(CALLS[name][2], masks, strict=True)), masks


# Fused operators ------------------------------------------------------------------------------------------------------


def hidden(kind: str) -> tuple[Tensor | None, int | None]:
    no_keys = padding()
    no_keys[0] = True
    masks = {
        "none": (None, None), "queries and keys": (causal(dtype=torch.bool), 0), "a float mask": (causal(), 0), "keys": (padding(), 1),
        "rows without a key": (no_keys, 1), "all four": (causal(dtype=torch.bool) | padding()[:, None, None].expand(B, H, 1, S), 2),
    }  # fmt: skip
    return masks[kind]


@pytest.mark.parametrize("weights", [None, "averaged", "each"])
@pytest.mark.parametrize("kind", ["none", "queries and keys", "a float mask", "keys", "rows without a key", "all four"])
def test_the_open_self_attention_is_the_fused_one(kind: str, weights: str | None) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(B, S, E), hidden(kind)
    rest = torch.randn(3 * E, E), torch.randn(3 * E), torch.randn(E, E), torch.randn(E)
    arguments = (x, x, x, E, H, *rest, mask[0], weights is not None, weights == "averaged", mask[1])
    fused, opened = torch._native_multi_head_attention(*arguments), self_attention(*arguments)
    assert (fused[1] is None) == (opened[1] is None)
    for a, e in zip(opened, fused, strict=True):
        torch.testing.assert_close(a, e, rtol=TOLERANCE, atol=1e-4, equal_nan=True)  # weights of size 1: values of up to 100


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("kind", ["none", "queries and keys", "keys"])
def test_the_open_encoder_layer_is_the_fused_one(kind: str, gelu: bool, norm_first: bool) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(B, S, E), hidden(kind)
    attending = 0.3 * torch.randn(3 * E, E), torch.randn(3 * E), 0.3 * torch.randn(E, E), torch.randn(E)
    norms = [torch.randn(E) for _ in range(4)]
    feeding = 0.3 * torch.randn(24, E), torch.randn(24), 0.3 * torch.randn(E, 24), torch.randn(E)
    arguments = (x, E, H, *attending, gelu, norm_first, 1e-3, *norms, *feeding, *mask)
    torch.testing.assert_close(encoder_layer(*arguments), torch._transformer_encoder_layer_fwd(*arguments), rtol=1e-5, atol=1e-5)


# Ranks ----------------------------------------------------------------------------------------------------------------


def run(rank: int, P: int, name: str, grad: bool) -> list[float]:
    model = make(name, eval_mode=not grad)
    oracle, x = copy.deepcopy(model), torch.randn(B, S, E)
    weights = torch.randn(B, S, E)
    with torch.set_grad_enabled(grad):
        outs = [m(x) for m in (torch.compile(model, backend="autoseq", options=OPTIONS), oracle)]
    pairs = [(outs[0].detach() + 0, outs[1].detach())]
    if grad:
        for out in outs:
            (out * weights).sum().backward()
        pairs += [(a.grad, e.grad) for a, e in zip(model.parameters(), oracle.parameters(), strict=True)]
    return [((a - e).norm() / e.norm().clamp(min=0.1)).item() for a, e in pairs]


EVERY_CALL = [pytest.param(name, True, id=f"{name}, training") for name in CALLS] + [
    pytest.param(name, False, id=f"{name}, eval under no_grad") for name in CALLS if "encoder" in name
]


@pytest.mark.parametrize(("name", "grad"), EVERY_CALL)
def test_a_module_on_ranks_has_one_devices_numbers(name: str, grad: bool) -> None:
    for errors in run_ranks(run, 2, name, grad):
        assert max(errors) <= TOLERANCE, errors


def with_weights(m: Any, x: Tensor) -> Tensor:
    out, weights = m(x, x, x)
    return out + weights @ x


CALLS["weights that are used"] = (attention(), with_weights, [])


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run_with_weights(rank: int, P: int) -> tuple[list[float], list[str]]:
    heard = Messages()
    logging.getLogger("autoseq").addHandler(heard)
    CALLS["weights that are used"] = (lambda: nn.ModuleList([attention()(), attention()()]), twice, [])
    try:
        return run(rank, P, "weights that are used", True), heard.lines
    finally:
        logging.getLogger("autoseq").removeHandler(heard)


def twice(m: Any, x: Tensor) -> Tensor:
    return with_weights(m[1], m[0](x, x, x, need_weights=False)[0])


def test_weights_that_are_used_are_computed_whole() -> None:
    (first, lines), (second, silent) = run_ranks(run_with_weights, 2)
    assert max(*first, *second) <= TOLERANCE, (first, second)
    assert not silent  # the first rank speaks for all
    assert any("runs on gathered values" in line and "test_nn_transformer.py" in line for line in lines), lines
