"""Runs a model on local ranks and on one device, and measures how far apart they are: for `autoseq verify`.

Rank 0 first runs the model alone, without torch.compile, and leaves outputs and gradients in a file; then every rank compares
what it got with that file, so a result that is right on one rank only does not pass.

A gradient may be zero but for rounding: that of a bias of keys, which moves all scores of a row alike. Its own size says nothing then.
Where a gradient is that small beside all others, float64 tells how much of it is rounding, and an error of that size counts beside all.
"""

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoseq.launch import Rank, run_ranks
from autoseq.model_report import Report, report
from autoseq.returned_names import named_tensors
from autoseq.runtime.errors import AutoSeqError, TargetError
from autoseq.target import brief, load_target

log = logging.getLogger("autoseq")

_SEED = 0
Kind = Literal["output", "gradient"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_Results = dict[Kind, dict[str, Tensor | None]]
"""Kind -> name -> value."""

_SMALL, _AS_MUCH = 10, 8
"""A gradient of so few roundings of all gradients is looked at again. Ranks add up in another order, and may round that much more."""


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

    kind: Kind
    name: str
    error: float


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared, largest error first, and what the model has become on rank 0."""

    differences: list[Difference]
    report: Report

    def beyond(self, tolerance: float) -> list[Difference]:
        """What differs by more than `tolerance`, NaN among it."""
        return [each for each in self.differences if not each.error <= tolerance]


def verify_target(case: Case, world_size: int) -> Verification:
    """Every output and gradient of the target on `world_size` ranks against one device.

    Raises what the ranks raise, as `launch.run_ranks` says.
    """
    with tempfile.TemporaryDirectory(prefix="autoseq-verify-") as folder:
        by_rank = run_ranks(_compare, world_size, case, str(Path(folder) / "one-device.pt"))
    worst = [max(same, key=_badness) for same in zip(*(found for found, _ in by_rank), strict=True)]
    return Verification(sorted(worst, key=_badness, reverse=True), by_rank[0][1])


def _badness(difference: Difference) -> float:
    return difference.error if difference.error == difference.error else float("inf")  # NaN is as bad as it gets


def _compare(rank: Rank, case: Case, path: str) -> tuple[list[Difference], Report]:
    if rank.index == 0:
        _run_one_device(rank, case, path)
    dist.barrier()
    model, kwargs = _make(rank, case)
    compiled = torch.compile(model, backend="autoseq", options=case.options)
    actual = _step(compiled, model, kwargs)
    found = _errors(actual, *torch.load(path, mmap=True, weights_only=True))
    return [Difference(kind, name, error) for (kind, name), error in found.items()], report(compiled)


def _errors(actual: _Results, expected: _Results, rounding: Mapping[str, float]) -> dict[tuple[Kind, str], float]:
    """By kind and name; `rounding` is `_rounding` of the expected gradients."""
    found: dict[tuple[Kind, str], float] = {
        (kind, name): _relative(actual[kind].get(name), expected[kind].get(name))
        for kind in KINDS for name in sorted(expected[kind].keys() | actual[kind].keys())
    }  # fmt: skip
    whole = _norm(expected["gradient"].values())
    for name, size in rounding.items():
        ours, theirs = actual["gradient"].get(name), expected["gradient"][name]
        if ours is not None and theirs is not None and found["gradient", name] < float("inf"):
            apart = _norm([ours.double() - theirs.double()])
            if apart <= _AS_MUCH * size:
                found["gradient", name] = apart / whole
    return found


def _run_one_device(rank: Rank, case: Case, path: str) -> None:
    model, kwargs = _make(rank, case)
    results = _step(model, model, kwargs)
    torch.save((results, _rounding(rank, case, results["gradient"])), path)


def _rounding(rank: Rank, case: Case, gradients: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Of gradients that are tiny beside all others: how far they are from those in float64."""
    whole = _norm(gradients.values())
    real = {name: x for name, x in gradients.items() if x is not None and x.is_floating_point()}
    tiny = {name: x for name, x in real.items() if 0 < _norm([x]) < _SMALL * torch.finfo(x.dtype).eps * whole}
    if not tiny:
        return {}
    model, kwargs = _make(rank, case)
    wide = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in kwargs.items()}
    try:
        exact = _step(model.double(), model, wide)["gradient"]
    except TargetError as error:
        log.warning("gradients that may be nothing but rounding are held to their own size, because in float64 %s", error)
        return {}
    return {name: _norm([x.double() - exact[name]]) for name, x in tiny.items() if exact[name] is not None}


def _norm(tensors: Iterable[Tensor | None]) -> float:
    """Of all values of some tensors."""
    return sum(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in tensors if x is not None) ** 0.5


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
        outputs = dict(named_tensors(returned, model))
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
