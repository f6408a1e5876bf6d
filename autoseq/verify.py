"""Runs a model on local ranks and on one device, and measures how far apart they are: for `autoseq verify`.

Rank 0 first runs the model alone, without torch.compile, and leaves outputs and gradients in a file; then every rank compares
what it got with that file, so a result that is right on one rank only does not pass.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from autoseq.launch import Rank, run_ranks
from autoseq.runtime.errors import AutoSeqError, TargetError
from autoseq.target import brief, load_target

_SEED = 0
_Results = dict[str, dict[str, Tensor | None]]
"""Kind ("output", "gradient") -> name -> value."""


@dataclass(frozen=True, slots=True)
class Case:
    """What to verify: a TARGET, the sizes of its inputs, the backend's options."""

    target: str
    batch: int
    seq_len: int
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Difference:
    """Relative L2 error of one output or gradient, the largest of all ranks. Infinite if it is missing or has another shape."""

    kind: Literal["output", "gradient"]
    name: str
    error: float


def verify_target(case: Case, world_size: int) -> list[Difference]:
    """Every output and gradient of the target on `world_size` ranks against one device, largest error first.

    Raises what the ranks raise, as `launch.run_ranks` says.
    """
    with tempfile.TemporaryDirectory(prefix="autoseq-verify-") as folder:
        by_rank = run_ranks(_compare, world_size, case, str(Path(folder) / "one-device.pt"))
    worst = [max(same, key=_badness) for same in zip(*by_rank, strict=True)]
    return sorted(worst, key=_badness, reverse=True)


def _badness(difference: Difference) -> float:
    return difference.error if difference.error == difference.error else float("inf")  # NaN is as bad as it gets


def _compare(rank: Rank, case: Case, path: str) -> list[Difference]:
    if rank.index == 0:
        _run_one_device(rank, case, path)
    dist.barrier()
    model, kwargs = _make(rank, case)
    actual = _step(torch.compile(model, backend="autoseq", options=case.options), model, kwargs)
    expected: _Results = torch.load(path, mmap=True, weights_only=True)
    return [
        Difference(kind, name, _relative(actual[kind].get(name), expected[kind].get(name)))  # type: ignore[arg-type]
        for kind in expected
        for name in sorted(expected[kind].keys() | actual[kind].keys())
    ]


def _run_one_device(rank: Rank, case: Case, path: str) -> None:
    model, kwargs = _make(rank, case)
    torch.save(_step(model, model, kwargs), path)


def _make(rank: Rank, case: Case) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(_SEED)
    model, kwargs = load_target(case.target).make(batch=case.batch, seq_len=case.seq_len)
    if _draws(model):
        model.eval()  # dropout on shards is not the dropout of one device, by design
    torch.manual_seed(_SEED)
    moved = {name: x.to(rank.device) if isinstance(x, Tensor) else x for name, x in kwargs.items()}
    return model.to(rank.device), moved


def _draws(model: nn.Module) -> bool:
    """Whether a model in training mode would drop anything out."""
    rates = [getattr(m, name, 0) for m in model.modules() for name in ("p", "dropout", "attention_dropout", "dropout_p") if m.training]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _step(call: Any, model: nn.Module, kwargs: Mapping[str, Any]) -> _Results:
    """One forward and backward: what came out, and each parameter's gradient."""
    try:
        returned = call(**kwargs)
        outputs = dict(_tensors(returned))
        loss = _loss(returned, list(outputs.values()))
        if loss.requires_grad:
            loss.backward()
    except AutoSeqError:
        raise
    except Exception as error:
        raise TargetError(f"the model failed when it was called: {brief(error)}") from error
    gradients = {name: None if p.grad is None else p.grad.cpu() for name, p in model.named_parameters()}
    # A deferred output gathers here: a plain copy, as the user of the output would see it.
    return {"output": {name: x.detach().clone().cpu() for name, x in outputs.items()}, "gradient": gradients}


def _tensors(returned: Any) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in tree_flatten_with_path(returned)[0]:
        if isinstance(leaf, Tensor):
            yield re.sub(r"^\['?(\w+)'?\]$", r"\1", keystr(path)).strip(".") or "result", leaf


def _loss(returned: Any, outputs: Sequence[Tensor]) -> Tensor:
    """The model's own loss: `.loss`, or its first scalar; else a fixed random projection of everything it returns."""
    named = getattr(returned, "loss", None)
    scalars = [x for x in (named, *outputs) if isinstance(x, Tensor) and x.dim() == 0 and x.is_floating_point()]
    if scalars:
        return scalars[0]
    floats = [x for x in outputs if x.is_floating_point() and x.requires_grad]
    if not floats:
        return torch.zeros(())
    return torch.stack([(x * _projection(x, index)).sum() for index, x in enumerate(floats)]).sum()


def _projection(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator).to(x)


def _relative(actual: Tensor | None, expected: Tensor | None) -> float:
    """|actual - expected| / |expected| in float64; the error itself where 0 was expected."""
    if actual is None or expected is None:
        return 0.0 if actual is expected else float("inf")
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(actual, expected) else float("inf")
    wide = torch.complex128 if expected.is_complex() else torch.float64
    norm = torch.linalg.vector_norm(expected.to(wide))
    error = torch.linalg.vector_norm(actual.to(wide) - expected.to(wide))
    return (error / norm if norm > 0 else error).item()
