"""Tiny models and data for trainers, and one rank's part in comparing a trainer on one device with one whose sequence is split."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

VOCABULARY = 128
SGD_TOLERANCE, ADAMW_TOLERANCE = 1e-6, 1e-5
BFLOAT16_TOLERANCE = 2e-2
"""Relative L2 errors of float32 weights after a few steps. AdamW divides by the root of tiny second moments, which magnifies rounding.
bfloat16 has 8 bits: a rounding is 4e-3, and matrix products of half the rows round elsewhere."""


def llama(seed: int = 0, **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def rows(count: int, length: int = 32, seed: int = 1, labels: bool = True) -> list[dict[str, Any]]:
    """Token ids; the labels of some are masked, so that batches have different numbers of targets."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        targets = ids.clone()
        targets[: index % 7] = -100
        made.append({"input_ids": ids, **({"labels": targets} if labels else {})})
    return made


def python(code: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def forget_accelerator() -> None:
    """accelerate keeps its state for a process's life."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@contextmanager
def processes(rank: int | None, world_size: int) -> Iterator[None]:
    """accelerate's state as in a process that torchrun started as one of several; with no rank, in one that was started alone."""
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
    kept = {name: os.environ.pop(name, None) for name in names}
    if rank is not None:
        os.environ |= dict(zip(names, map(str, (rank, rank, world_size, world_size)), strict=True))
    try:
        forget_accelerator()
        yield
    finally:
        forget_accelerator()
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def warnings_of(logger: str) -> Iterator[list[str]]:
    """What a logger warns of within it, in this process."""
    seen: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())
    logging.getLogger(logger).addHandler(handler)
    try:
        yield seen
    finally:
        logging.getLogger(logger).removeHandler(handler)


_TIMES = "runtime", "per_second", "_time", "autoseq/"


def logged(trainer: Any) -> list[dict[str, float]]:
    """Every logged number but times."""
    return [{key: value for key, value in entry.items() if not any(t in key for t in _TIMES)} for entry in trainer.state.log_history]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def error(ours: Any, theirs: Any) -> float:
    """Relative L2 error, in float64."""
    a, b = (torch.as_tensor(np.asarray(x)).double() for x in (ours, theirs))
    assert a.shape == b.shape, (a.shape, b.shape)
    norm = torch.linalg.vector_norm(b)
    distance = torch.linalg.vector_norm(a - b)
    return float(distance / norm if norm > 0 else distance)


def check_alike(ours: Any, theirs: Any, tolerance: float, path: str = "") -> None:
    """The same structure, the same integers and texts, and floats within the tolerance."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), (path, sorted(ours.keys() ^ theirs.keys()))
        for key in theirs:
            check_alike(ours[key], theirs[key], tolerance, f"{path}/{key}")
    elif isinstance(theirs, list | tuple) and not all(isinstance(x, int | float) for x in theirs):
        assert len(ours) == len(theirs), (path, len(ours), len(theirs))
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            check_alike(a, b, tolerance, f"{path}/{index}")
    elif isinstance(theirs, str | int | type(None)):
        assert ours == theirs, (path, ours, theirs)
    else:
        assert error(ours, theirs) <= tolerance, (path, error(ours, theirs), ours, theirs)


Scenario = Callable[[Path, Callable[..., None]], Any]
"""Makes trainers that write to a folder, gives each to the function, runs them, and returns what is compared."""


def compare(rank: int, world_size: int, scenario: Scenario, folder: str, tolerance: float, **options: Any) -> None:
    """One device on rank 0, then all ranks on one sequence: all have what the one had."""
    import autoseq

    path = Path(folder)
    if rank == 0:
        with processes(None, 1):
            torch.save(scenario(path / "alone", lambda *target: None), path / "alone.pt")
    dist.barrier()
    expected = torch.load(path / "alone.pt", weights_only=False)
    torch._dynamo.reset()
    with processes(rank, world_size):
        found = scenario(path / "split", lambda *target: autoseq.hf.attach(*target, sequence=world_size, **{"inner": "eager"} | options))
    check_alike(found, expected, tolerance)


def compare_accumulated(rank: int, world_size: int, scenario: Callable[[Path, Callable[..., None], int], Any], folder: str) -> None:
    """2 × 2 ranks beside one process that accumulates the two copies' batches, in float64."""
    import autoseq

    with processes(None, 1):
        expected = scenario(Path(folder) / "alone", lambda *target: None, 2)
    torch._dynamo.reset()
    with processes(rank, world_size):
        found = scenario(Path(folder) / "split", lambda *target: autoseq.hf.attach(*target, sequence=2, inner="eager"), 1)
    check_alike(found, expected, 1e-12)
