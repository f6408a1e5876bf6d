"""What TORCH_LOGS and TORCH_TRACE show: the plan, its reasons, each fallback, and artifacts for tlparse."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import models
from autoseq.planning.presets import load_topology
from autoseq.runtime.strategies import STRATEGIES

SCRIPT = """
import sys
sys.path[:0] = ["tests"]
import torch, models
torch.compile(models.make("plain", layers=1), backend="autoseq", options={"inner": "eager"})(
    **models.batch("plain", batch_size=1, length=16)
)
"""


def test_torch_logs_prints_the_plan() -> None:
    """As users set it: before torch is imported."""
    environment = {**os.environ, "TORCH_LOGS": "+autoseq"}
    shown = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True)
    for expected in ("layout contiguous", "topology found", "blocks.0: local, mask k <= q", "s of attention a step", "not ring: "):
        assert expected in shown.stderr
    assert shown.stdout == ""


@pytest.fixture
def traced() -> Iterator[list[logging.LogRecord]]:
    """Records of torch's structured trace, as TORCH_TRACE would write them."""
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    log, handler = logging.getLogger("torch.__trace"), Keep()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield records
    log.removeHandler(handler)
    log.setLevel(before)


def test_tlparse_gets_the_graphs_and_the_plan(traced: list[logging.LogRecord]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(models.make("plain", layers=2), backend="autoseq", options={"inner": "eager"})
    compiled(**models.batch("plain", batch_size=1, length=16))
    artifacts = {r.metadata["artifact"]["name"]: r.payload for r in traced if "artifact" in r.metadata}
    assert [name for name in artifacts if name.startswith("autoseq_")] == ["autoseq_graph_before", "autoseq_plan", "autoseq_graph_after"]
    assert "attention" in artifacts["autoseq_graph_before"]
    assert "local.attention(" in artifacts["autoseq_graph_after"]
    plan = json.loads(artifacts["autoseq_plan"])
    assert [site["strategy"] for site in plan["sites"]] == ["local", "local"]
    assert set(plan["sites"][0]["losers"]) == set(STRATEGIES) - {"local"}


def test_a_topology_whose_memory_nothing_fits_in_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tiny = replace(load_topology("8xH100"), memory_bytes=1000)
    torch._dynamo.reset()
    compiled = torch.compile(models.make("plain", layers=1), backend="autoseq", options={"inner": "eager", "topology": tiny})
    compiled(**models.batch("plain", batch_size=1, length=16))
    assert "no choice of strategies fits in the memory of topology 8xH100, 1,000 bytes a rank: attention holds" in caplog.text
