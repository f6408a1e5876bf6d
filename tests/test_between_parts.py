"""Python between the parts of a model that reads a part's output: warned of once, with its line and bytes; an error under `strict`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import autoseq
from autoseq.inspection import inspect_programs
from autoseq.options import Options
from autoseq.runtime.errors import FallbackError
from hf_job import warnings_of
from inspected_models import OneAttention
from ranks import run_ranks
from test_broken_models import LENGTH, EagerBetween, make

SENT = f"{LENGTH // 2 * 8 * 4:,} bytes a rank"


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="autoseq", options={"inner": "eager", **options})


def warned(rank: int, world_size: int) -> tuple[list[str], str]:
    """In two steps of a model, and a step of another whose output is read after it has returned."""
    module, kwargs = make(EagerBetween)
    with warnings_of("autoseq") as found:
        model = compiled(module)
        model(**kwargs).backward()
        model(**kwargs).backward()
        compiled(OneAttention())(**kwargs).sum().backward()
    return found, str(autoseq.report(model))


def test_a_read_is_warned_of_once_by_one_rank() -> None:
    (first, report), (second, _) = run_ranks(warned, 2)
    (line,) = first
    assert re.match(r"Python between the parts of the program at tests/test_broken_models\.py:\d+ in _scaled: return y \* 2 runs on", line)
    assert re.search(r"this line between them reads \w+ \(tests/inspected_models\.py:\d+ in forward: ", line)
    assert line.endswith(f"TORCH_LOGS=graph_breaks names what breaks it); {SENT}")
    assert second == []
    assert ", 1 fallbacks, 2 programs" in report


def refused(rank: int, world_size: int) -> None:
    module, kwargs = make(EagerBetween)
    with pytest.raises(FallbackError, match=rf"there is one:\n  Python between the parts .* in _scaled.*; {SENT}"):
        compiled(module, strict=True)(**kwargs)


def test_a_read_is_an_error_under_strict() -> None:
    run_ranks(refused, 2)


def test_inspect_refuses_it_under_strict() -> None:
    with pytest.raises(FallbackError, match=rf"there is one:\n  Python between the parts .* in _scaled.*; {SENT}"):
        inspect_programs(lambda: make(EagerBetween), seq_len=LENGTH, world_size=2, options=Options(strict=True))
