"""Programs that every rank runs whole, with one device's numbers: too few tokens, no attention, a size that a tensor's value tells."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import autoseq
import models
from autoseq import backend
from autoseq.program import Program
from autoseq.runtime.deferred import DeferredTensor
from inspected_models import OneAttention
from ranks import run_ranks

TOLERANCE = 1e-5  # relative L2; float32 sums in another order
Numbers = dict[str, float]


@contextmanager
def heard() -> Iterator[list[str]]:
    """autoseq's warnings."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("autoseq").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("autoseq").removeHandler(handler)


@contextmanager
def recorded() -> Iterator[list[Program]]:
    """The programs that are compiled."""
    made: list[Program] = []
    build = backend.build_program

    def record(*args: Any, **kwargs: Any) -> Program:
        made.append(build(*args, **kwargs))
        return made[-1]

    with mock.patch.object(backend, "build_program", record):
        yield made


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def compared(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Numbers:
    """The errors of one step: of the output, each gradient and each buffer; with grad_sync="none" of the ranks' gradients together."""
    oracle = copy.deepcopy(model)
    compiled = torch.compile(model, backend="autoseq", options={"inner": "eager", **options})
    torch.manual_seed(7)
    out = compiled(**batch)
    torch.manual_seed(7)
    expected = oracle(**batch)
    for y in (out, expected):
        y.square().mean().backward()
    errors = {"output": relative(out.detach() + 0, expected.detach())}
    for (name, p), (_, e) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
        grad = p.grad
        assert grad is not None and e.grad is not None
        if options.get("grad_sync") == "none":
            dist.all_reduce(grad := grad.clone())
        errors[f"gradient of {name}"] = relative(grad, e.grad)
        errors[name] = relative(p.detach(), e.detach())
    errors |= {name: relative(b, e) for (name, b), (_, e) in zip(model.named_buffers(), oracle.named_buffers(), strict=True)}
    return errors


# No attention ---------------------------------------------------------------------------------------------------------


class NoAttention(nn.Module):
    """Dropout, a buffer that is counted up, and a weight that is clamped before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        with torch.no_grad():
            self.a.weight.clamp_(-0.1, 0.1)
        return self.b(F.dropout(self.a(x), 0.5).relu())


def run_without_attention(rank: int, P: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for inner in ("eager", "aot_eager"):
        for grad_sync in ("sequence", "none"):
            torch.manual_seed(0)
            with heard() as said:
                errors = compared(NoAttention(), {"x": torch.randn(1, 5, 8)}, inner=inner, grad_sync=grad_sync)
            found[f"{inner}, {grad_sync}"] = errors, said
            torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(1, 5, 8) + rank
    try:
        torch.compile(nn.Linear(8, 8), backend="autoseq", options={"inner": "eager"})(x)
    except autoseq.RankMismatchError as error:
        found["other inputs"] = str(error)
    return found


def test_a_program_without_attention_runs_whole_and_says_why() -> None:
    by_rank = run_ranks(run_without_attention, 2)
    for found in by_rank:
        assert re.search(r"ranks 0 and 1 .* called the model with different values of", found.pop("other inputs"))
        (_, said), *again = found.values()
        assert found is not by_rank[0] or (len(said) == 1 and re.search(
            r"the program at tests/test_whole_programs.py:\d+ in forward: .* runs whole on every rank \(no attention was found in "
            r"the program that ends at .*test_whole_programs.py:\d+ in forward\. autoseq reads .*docs/attention.md\)\)$", said[0]
        )), said  # fmt: skip
        assert not any(said for _, said in again), "said once"
        for errors, _ in found.values():
            assert max(errors.values()) <= TOLERANCE, errors


def refuse_under_strict(rank: int, P: int) -> list[str]:
    said = []
    for length, model in ((5, NoAttention()), (1, OneAttention())):
        try:
            torch.compile(model, backend="autoseq", options={"inner": "eager", "strict": True})(torch.ones(1, length, 8))
        except autoseq.FallbackError as error:
            said.append(str(error))
    return said


def test_under_strict_it_is_an_error() -> None:
    for none, short in run_ranks(refuse_under_strict, 2):
        assert re.search(r"strict=True forbids fallbacks.*\n.*the program at .* runs whole on every rank \(no attention was found", none)
        assert re.search(r"strict=True forbids fallbacks.*\n.*runs whole on every rank .*it has only 1 query for 2 ranks", short)


# Too few tokens -------------------------------------------------------------------------------------------------------


def run_short(rank: int, P: int, lengths: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """One model at many lengths, one after the other."""
    torch.manual_seed(0)
    model, found = OneAttention(), dict[str, Any]()
    with recorded() as programs, heard() as said:
        for length in lengths:
            model.zero_grad()
            errors = compared(model, {"x": torch.randn(1, length, 8, generator=torch.Generator().manual_seed(length))}, **options)
            found[f"{length}"] = max(errors.values())
    return {"errors": found, "whole": [bool(program.whole) for program in programs], "said": said}


@pytest.mark.parametrize(
    ("P", "lengths", "options", "whole"),
    [
        # A first length, a length of 1 and one of a row a rank are programs of their own; one of any length is made for each side of P.
        pytest.param(2, [8, 1, 2, 9, 1, 3], {}, [False, True, False, False], id="two ranks"),
        pytest.param(3, [8, 1, 2, 3, 10, 2], {"grad_sync": "none"}, [False, True, True, False, False], id="three ranks"),
        pytest.param(4, [12, 9, 3, 2, 4, 3, 7], {"inner": "aot_eager"}, [False, False, True, False], id="four ranks, lengths that change"),
    ],
)
def test_fewer_tokens_than_ranks(P: int, lengths: list[int], options: dict[str, Any], whole: list[bool]) -> None:
    by_rank = run_ranks(run_short, P, lengths, options)
    for found in by_rank:
        assert max(found["errors"].values()) <= TOLERANCE, found
        assert found["whole"] == whole, found
    (said,) = by_rank[0]["said"]  # once, by the rank that speaks for all
    assert re.search(rf"it has only \d quer(y|ies) for {P} ranks; the same program with longer", said)


def keep_own_rows(rank: int, P: int) -> list[str]:
    torch.manual_seed(0)
    compiled = torch.compile(OneAttention(), backend="autoseq", options={"inner": "eager", "outputs": "local", "layout": "contiguous"})
    shapes = [str(tuple(compiled(torch.ones(1, length, 8)).shape)) for length in (6, 2)]
    try:
        compiled(torch.ones(1, 1, 8))
    except autoseq.NoSequenceError as error:
        return [*shapes, str(error)]
    return shapes


def test_a_rank_has_no_rows_of_its_own_where_there_are_fewer_rows_than_ranks() -> None:
    for found in run_ranks(keep_own_rows, 2):
        assert found[:2] == ["(1, 3, 8)", "(1, 1, 8)"]
        assert re.search(r"outputs='local' gives each rank its own rows, and the attention at .* has only 1 query for 2 ranks", found[2])


# One short attention among long ones ----------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Some attention over the sequence, then one query that pools it; `probe` says with what."""

    def __init__(self, probe: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.kv, self.out, self.probe = OneAttention(), nn.Linear(8, 16), nn.Linear(4, 4), probe
        self.query = nn.Parameter(torch.randn(1, 2, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.body(x)
        k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.kv(y).chunk(2, -1))
        return self.out(self.probe(self.query.expand(len(x), -1, -1, -1), k, v))


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.5).softmax(-1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every second key, by index arithmetic."""
    return F.scaled_dot_product_attention(q, k, v, (torch.arange(k.shape[2]) % 2 == 0)[None])


class OneTokenDecoder(nn.Module):
    """An encoder's sequence, and a decoder of one token that attends to itself and to the sequence.

    The decoder's norms come first: behind a last LayerNorm the mean of squares is constant, and its gradients are rounding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.start = OneAttention(), nn.Parameter(torch.randn(1, 1, 8))
        self.decoder = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.start.expand(len(x), -1, -1), x + self.encoder(x))


SHORT: dict[str, Callable[[], nn.Module]] = {
    "SDPA": partial(Pooled, F.scaled_dot_product_attention), "written out": partial(Pooled, written_out),
    "with a mask": partial(Pooled, masked), "a decoder of one token": OneTokenDecoder,
    "few keys for many queries": lambda: Pooled(lambda q, k, v: F.scaled_dot_product_attention(k, q, q)),
}  # fmt: skip


def pool(rank: int, P: int, names: list[str], options: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        torch.manual_seed(0)
        with recorded() as programs, heard() as said:
            errors = compared(SHORT[name](), {"x": torch.randn(2, 13, 8)}, **options)
        found[name] = max(errors.values()), [len(program.plan.sites) for program in programs], said
        torch._dynamo.reset()
    return found


@pytest.mark.parametrize(
    ("P", "names", "options"),
    [
        pytest.param(2, list(SHORT), {}, id="two ranks"),
        pytest.param(3, ["SDPA", "few keys for many queries"], {"inner": "aot_eager", "grad_sync": "none"}, id="three ranks"),
    ],
)
def test_a_pooling_head_is_left_whole_and_the_rest_is_split(P: int, names: list[str], options: dict[str, Any]) -> None:
    by_rank = run_ranks(pool, P, names, options)
    for found in by_rank:
        for name, (error, sites, said) in found.items():
            assert error <= TOLERANCE and sites == [1], (name, found[name])
            told = rf"attention at tests/test_whole_programs.py:.* \(it has only 1 \w+ for {P} ranks\)"
            assert found is not by_rank[0] or any(re.search(told, line) for line in said), said


# A size that a tensor's value tells -----------------------------------------------------------------------------------


class Patches(nn.Module):
    """As a vision model splits its patches by a grid that is data, behind a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = OneAttention(), nn.Linear(8, 8)

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        sizes = [(row[0] // 2, row[1] // 2) for row in grid]
        parts = self.body(x)[0].split([h * w for h, w in sizes])
        return self.out(torch.cat([t.view(h, w, 8).permute(2, 0, 1).flatten(1).T for t, (h, w) in zip(parts, sizes, strict=True)]))


def split_by_value(rank: int, P: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for inner, grad_sync in (("eager", "sequence"), ("aot_eager", "none")):
        torch.manual_seed(0)
        batch = {"x": torch.randn(1, 14, 8), "grid": torch.tensor([[4, 6], [4, 8]])}
        with heard() as said:
            errors = compared(Patches(), batch, inner=inner, grad_sync=grad_sync)
        found[inner] = max(errors.values()), said
        torch._dynamo.reset()
    return found


def test_a_part_that_needs_a_value_for_a_size_runs_as_it_was_traced() -> None:
    by_rank = run_ranks(split_by_value, 2)
    for found in by_rank:
        assert max(error for error, _ in found.values()) <= TOLERANCE, found
    told = r"a part of the program at .* runs whole .*a size in it depends on the values of a tensor"
    assert any(re.search(told, line) for line in by_rank[0]["eager"][1]), by_rank[0]


# Generation -----------------------------------------------------------------------------------------------------------


def generate(rank: int, P: int, kind: str, cache: str, inner: str) -> dict[str, Any]:
    """Two texts after one another, token by token; and what the prefill of the second hands on."""
    torch.manual_seed(0)
    model = models.make(kind).eval()
    oracle, found = copy.deepcopy(model), dict[str, Any]()
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 1}
    if cache == "static":
        options["cache_implementation"] = "static"
    autoseq.parallelize(model, inner=inner)
    with recorded() as programs, heard() as said:
        for length in (7, 6):
            ids = torch.randint(2, models.VOCABULARY, (1, length))
            texts = [each.generate(ids, attention_mask=torch.ones_like(ids), **options) for each in (model, oracle)]
            found[f"{length}"] = type(texts[0]) is Tensor and torch.equal(*texts)
        if cache == "dynamic":
            found["the cache is sharded"] = isinstance(model(ids).past_key_values.layers[0].keys, DeferredTensor)
    whole = [bool(program.whole) for program in programs]
    return {**found, "whole": whole, "said": [line for line in said if "runs whole" in line]}


@pytest.mark.parametrize(
    ("P", "kind", "cache", "inner"),
    [
        pytest.param(2, "llama", "dynamic", "eager", id="a cache that grows"),
        pytest.param(2, "llama", "static", "eager", id="a static cache"),
        pytest.param(3, "gpt2", "dynamic", "aot_eager", id="GPT-2 on three ranks"),
    ],
)
def test_generation_gives_one_devices_tokens(P: int, kind: str, cache: str, inner: str) -> None:
    by_rank = run_ranks(generate, P, kind, cache, inner, timeout_s=300)
    for found in by_rank:
        assert all(value for name, value in found.items() if name not in ("whole", "said")), found
        assert found["whole"].count(False) <= 3 and found["whole"].count(True) <= 3, "compiled anew for every length"
    (said,) = by_rank[0]["said"]  # once, by the rank that speaks for all
    assert "it has only 1 query" in said
