"""`benchmarks/strategies.py` at tiny sizes: it runs, its numbers are of the right things, and it refuses what makes no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from autoseq.runtime.strategies import STRATEGIES
from measuring import peak_bytes
from peers import PEERS
from results import compare
from strategies import main
from work import Work


def test_every_strategy_is_measured_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    main(seq_len=[64], heads=4, kv_heads=2, head_dim=16, rounds=1, json_file=file)
    (found,) = json.loads(file.read_text())["lengths"]
    results = {result["name"]: result for result in found["results"]}
    work, printed = Work(64, heads=4, kv_heads=2, head_dim=16), capsys.readouterr().out
    assert found["compute_s"] > 0
    for name in (*(name for name in STRATEGIES if name != "local"), *PEERS):
        result = results[name]
        assert name in printed
        if result["why_not"]:
            assert name in PEERS or result["why_not"] == STRATEGIES[name].cannot_serve(work.site(), 2)
            continue
        assert result["error"] < 1e-5 and result["step_s"] > 0 and result["over_floor"] > 0
        # Its output and the gradients of q, k and v, at the least: 64 rows of 4 + 4 + 2 + 2 heads of 16 float32 numbers, over 2 ranks.
        assert result["peak_bytes"] >= 64 * 12 * 16 * 4 // 2
        if name in STRATEGIES:
            costs = [STRATEGIES[name].cost(work.site(), 2, result["layout"], rank) for rank in range(2)]
            assert result["bytes"] == max(cost.forward_bytes + cost.backward_bytes for cost in costs)
            assert result["messages"] == max(cost.forward_messages + cost.backward_messages for cost in costs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(seq_len=[62]), "--seq-len must be a multiple of 4 on 2 ranks, so that peers can take part; 62 is not"),
        (dict(heads=8, kv_heads=3), "--heads 8 is not a multiple of --kv-heads 3"),
        (dict(dtype="int8"), "--dtype is one of float32, float64, bfloat16, float16, not 'int8'"),
        (dict(only=["rings"]), "there is nothing called 'rings' to measure; there are ulysses, "),
        (dict(network="fast"), "a rate is written as in 200mbit or 1.5gbit, not 'fast'"),
    ],
)
def test_misuse(arguments: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(**arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def record(name: str, kind: str, seconds: list[float], **more: int | None) -> dict[str, Any]:
    defaults = dict(scale=1.0, layout=None, why_not=None, bytes=0, messages=0, peak_bytes=0, link_bytes=None, error=None)
    return {"name": name, "kind": kind, "seconds": seconds} | defaults | more


def test_floors_and_ratios() -> None:
    """Two ranks on two nodes; the link carries 100 bytes a second, computing takes 2 s."""
    link = record("link", "link", [1.0, 1.0, 1.0], bytes=100, link_bytes=104)
    shares = [record("a", "compute", [3.0, 2.0, 9.0]), record("b", "compute", [2.0, 4.0, 2.0])]
    ring = record("ring", "autoseq", [3.0, 3.0, 9.0], bytes=300, link_bytes=312)
    slower = record("ring", "autoseq", [2.0, 6.0, 3.0], bytes=200, link_bytes=208)
    peers = [record("deepspeed", "peer", [1.5, 2.0, 3.0], bytes=100), record("yunchang", "peer", [9.0, 9.0, 9.0], bytes=100)]
    found = compare(Work(8, 1, 1, 1), 2, 2, [[link, *shares, ring, *peers], [link, *shares, slower, *peers]])
    assert found.link_bytes_per_s == 100 and found.compute_s == 2.0
    ours, peer, _ = found.results
    assert (ours.step_s, ours.transfer_s, ours.floor_s) == (6.0, 3.0, 3.0)
    assert ours.over_floor == 2.0  # rounds of 3, 6 and 9 s over 3 s
    assert ours.over_peer == 3.0  # over rounds of 1.5, 2 and 3 s: 2, 3 and 3
    assert (peer.floor_s, peer.over_floor) == (2.0, 1.0)


def test_peak_memory_is_what_tensors_hold() -> None:
    def step() -> torch.Tensor:
        first = torch.zeros(1000)
        second = first + first
        del first
        return second + second

    assert peak_bytes(step) == 8000


def test_peak_memory_sees_what_an_op_holds_for_itself() -> None:
    held = torch.ones(1, 2, 128, 16)
    one = peak_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(held, held, held))
    assert one >= held.numel() * 4
