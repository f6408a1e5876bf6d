"""`autoseq inspect`: what it says is what happens, and it says it without peers, weights or time."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import models
from autoseq.cli import app
from autoseq.inspection import inspect_model
from autoseq.printing import inspection_json
from autoseq.runtime.counting import counters, reset_counters
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site
from inspected_models import EXAMPLE, OneAttention, break_graph, make_model, make_one
from ranks import run_ranks


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *arguments])


# The counts -----------------------------------------------------------------------------------------------------------


def count_one_step(rank: int, world_size: int, name: str, batch_size: int, length: int, strategy: str) -> dict[str, tuple[int, int]]:
    """What this rank really sends in a training step."""
    model, kwargs = make_model(name, batch_size, length)
    compiled = torch.compile(model, backend="autoseq", options={"strategy": strategy, "inner": "aot_eager"})
    models.loss_and_logits(compiled(**kwargs))[0].backward()
    reset_counters()
    models.loss_and_logits(compiled(**kwargs))[0].backward()
    return counters()


SITE = Site(batch=1, q_len=37, k_len=37, heads=4, kv_heads=4, head_dim=8, value_dim=8, element_bytes=4, max_ahead=0)
CAUSAL = [name for name, strategy in STRATEGIES.items() if strategy.cannot_serve(SITE, 3) is None]


@pytest.mark.parametrize(
    ("name", "world_size", "batch_size", "length", "strategy"),
    [
        pytest.param("llama", 2, 2, 32, "ulysses", id="llama, ulysses"),
        *(pytest.param("plain", 3, 1, 37, name, id=f"37 tokens on 3 ranks, {name}") for name in CAUSAL),
    ],
)
def test_the_collectives_are_those_of_a_real_step(name: str, world_size: int, batch_size: int, length: int, strategy: str) -> None:
    found = inspect_model(partial(make_model, name, batch_size, length), seq_len=length, world_size=world_size, strategy=strategy)
    counted = run_ranks(count_one_step, world_size, name, batch_size, length, strategy, backend="autoseq_counted")
    assert {op: (count.messages, count.bytes) for op, count in found.collectives.items()} == counted[0]


# The report -----------------------------------------------------------------------------------------------------------


def test_json_is_the_documented_object() -> None:
    found = inspect_model(partial(make_model, "mistral", 1, 32), seq_len=32, world_size=2, strategy="gather_kv", layout="contiguous")
    shown = json.loads(inspection_json(found))
    names = ["world_size", "sequence_length", "attention", "collectives", "fallbacks", "largest_intermediate", "beside_one_device"]
    assert list(shown) == names
    assert (shown["world_size"], shown["sequence_length"], len(shown["attention"])) == (2, 32, 2)
    site = shown["attention"][0]
    # K and V, 2 heads of 8 in float32, of those 7 rows that the window lets rank 1 see: sent twice. Rank 0 itself sees none of rank 1's.
    assert site | {"source": ""} == {
        "name": "model.layers.0.self_attn", "source": "", "heads": 4, "kv_heads": 2, "mask": "(k <= q) & (k > q - 8)",
        "strategy": "gather_kv", "bytes_per_rank": 2 * 2 * 7 * 2 * 8 * 4, "messages_per_rank": 3,
        "bytes_of_busiest_rank": 2 * 2 * 7 * 2 * 8 * 4,
    }  # fmt: skip
    assert "sdpa_attention.py" in site["source"]
    assert {tuple(entry) for entry in shown["collectives"]} == {("op", "count", "bytes_per_rank")}
    # Logits of 16 local rows.
    assert shown["largest_intermediate"] == {"shape": [1, 16, models.VOCABULARY], "bytes": 16 * models.VOCABULARY * 4}
    assert shown["fallbacks"] == []


def test_a_fallback_is_reported_with_its_source_reason_and_bytes() -> None:
    found = inspect_model(partial(make_one, lambda y: torch.sort(y, dim=1).values), seq_len=16, world_size=2)
    (fallback,) = json.loads(inspection_json(found))["fallbacks"]
    assert fallback["op"] == "aten.sort.default"
    assert "torch.sort(y, dim=1)" in fallback["source"]
    assert fallback["reason"]
    assert fallback["bytes_per_rank"] == 8 * 8 * 4  # the other rank's 8 rows of 8 float32


def test_the_command_prints_sites_collectives_and_the_graph_and_nothing_on_stderr() -> None:
    result = run(EXAMPLE, "--seq-len", "37", "--world-size", "3", "--strategy", "ring", "--layout", "zigzag", "--graph", "both")
    assert (result.exit_code, result.stderr) == (0, "")
    for expected in ("37 tokens on 3 ranks, layout zigzag", "blocks.0 … blocks.1 (2 ×)", "plain_gpt.py:23", "k <= q", "Fallbacks: none"):
        assert expected in result.stdout
    before, after = result.stdout.split("Graph after")
    assert "head.weight: f32[256, 64] = input" in before
    assert "f32[1, 37, 256] = aten.linear(" in before  # the global logits
    assert "f32[1, 14, 256] Shard(1) = aten.linear(" in after  # 13 of 37 rows, padded to zigzag's grain
    assert "vary(head.weight)" in after
    assert "ring.attention(" in after


@pytest.mark.parametrize("graph", ["before", "after"])
def test_only_the_graph_asked_for_is_printed(graph: str) -> None:
    shown = run(EXAMPLE, "--seq-len", "8", "--world-size", "2", "--graph", graph).stdout
    assert [f"Graph {name}" in shown for name in ("before", "after")] == [graph == "before", graph == "after"]


def test_a_mask_that_stays_dense_is_shown_with_its_bytes() -> None:
    found = inspect_model(partial(make_one, with_mask=True), seq_len=16, world_size=2)
    assert [mask.num_bytes for mask in found.dense_masks] == [16 * 16]


def test_one_rank_sends_nothing_and_holds_everything() -> None:
    result = run(EXAMPLE, "--seq-len", "16", "--world-size", "1", "--json")
    shown = json.loads(result.stdout)
    assert shown["collectives"] == []
    assert shown["attention"][0]["strategy"] == "local"
    assert shown["largest_intermediate"]["shape"] == [1, 16, 256]


# Models that do not trace in one piece or without data ----------------------------------------------------------------


def test_a_model_traced_in_several_parts_is_seen_whole() -> None:
    two = lambda: (nn.Sequential(OneAttention(break_graph), OneAttention()), {"input": torch.randn(1, 16, 8)})  # noqa: E731
    found = inspect_model(two, seq_len=16, world_size=2)
    assert len(found.sites) == 2


def test_a_factory_that_needs_values_gets_them_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        if torch.ones(1).item() != 1:  # raises on the meta device
            raise AssertionError
        return make_one()

    assert len(inspect_model(make, seq_len=16, world_size=2).sites) == 1
    assert "the model was made with real weights" in caplog.text


def test_a_model_without_attention_is_whole() -> None:
    found = inspect_model(lambda: (nn.Linear(8, 8), {"input": torch.randn(1, 16, 8)}), seq_len=16, world_size=2)
    assert found.whole.startswith("no attention was found in the program") and not found.sites and not found.collectives


# Large models ---------------------------------------------------------------------------------------------------------

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
}  # fmt: skip


# `autoseq inspect`, which also tells the processor time of what Dynamo does by itself.
TIMED = """
import sys, time
from autoseq import cli, inspection

class Timed(inspection._CapturingBackend):
    spent = 0.0

    def __call__(self, *args):
        start = time.process_time()
        try:
            return super().__call__(*args)
        finally:
            Timed.spent += time.process_time() - start

def timed(*args, capture=inspection._capture):
    start = time.process_time()
    try:
        return capture(*args)
    finally:
        print(time.process_time() - start - Timed.spent, file=sys.stderr)

inspection._CapturingBackend, inspection._capture = Timed, timed
cli.main()
"""
DYNAMO_S = 6.5
"""What Dynamo takes for that model on the machine that the limit is meant for, with nothing else running."""


def test_llama_3_8b_at_131072_tokens_takes_under_30_seconds_and_2_gb(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    command = [sys.executable, "-c", TIMED, "inspect", f"hf:{tmp_path}", "--seq-len", "131072", "--world-size", "8", "--json"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None and process.stderr is not None
    with process.stdout as printed, process.stderr as told:
        shown, dynamo_s = json.loads(printed.read()), float(told.read())
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    # Processor time, not the clock's, and cores that others share do less in it: Dynamo, which is not ours, tells how much less.
    assert used.ru_utime + used.ru_stime < 30 * max(1.0, dynamo_s / DYNAMO_S)
    assert used.ru_maxrss < 2_000_000  # kB
    assert {site["mask"] for site in shown["attention"]} == {"k <= q"}
    assert len(shown["attention"]) == 32
    assert shown["fallbacks"] == []
    assert shown["largest_intermediate"] == {"shape": [1, 16384, 128256], "bytes": 16384 * 128256 * 4}
