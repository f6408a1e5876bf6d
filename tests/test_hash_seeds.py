"""Ranks whose Pythons hash strings differently trace one program in different orders: they run one order, or refuse by name."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from training_job import GRADIENT_TOLERANCE

JOB = Path(__file__).with_name("hash_seed_job.py")

DIFFERENT = "compiled different programs. First difference:"
REFUSED = {"draws": DIFFERENT, "sums": DIFFERENT, "alike": DIFFERENT, "gathers": "must use the model's outputs in the same order"}


def run(seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """What each rank printed; each is started as a process of its own, with a seed of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(seeds)), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(JOB)], env={**common, "RANK": str(rank), "PYTHONHASHSEED": str(seed)}, stdout=subprocess.PIPE, text=True
        )
        for rank, seed in enumerate(seeds)
    ]  # fmt: skip
    try:
        return [json.loads(rank.communicate(timeout=240)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_ranks_that_hash_strings_differently_run_one_program() -> None:
    found = run((0, 1))
    assert found[0]["names"] != found[1]["names"]
    for rank in found:
        for case, result in rank["found"].items():
            refusal = next((text for name, text in REFUSED.items() if case.startswith(name)), None)
            if refusal is not None:
                assert result["error"].startswith("RankMismatchError: ") and refusal in result["error"], (case, result)
                continue
            assert "error" not in result, (case, result)
            assert result["outputs"] <= GRADIENT_TOLERANCE and result["gradients"] <= GRADIENT_TOLERANCE, (case, result)
            assert result["kind"] == ("Tensor" if case.startswith(("breaks", "whole")) else "DeferredTensor"), (case, result)
