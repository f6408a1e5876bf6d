"""Copies of a split model: deep copies, pickles and averages of weights are split as the model is, with one device's numbers."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import autoseq
import models
from ranks import run_ranks

TOLERANCE = 1e-5  # float32 sums in another order, over steps of training


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    return torch.compile(model, backend="autoseq", options={"inner": "eager", **options})  # type: ignore[return-value]


def parallelized(model: nn.Module, **options: Any) -> nn.Module:
    return autoseq.parallelize(model, inner="eager", **options)


@autoseq.sequence_parallel(inner="eager")
class Decorated(models.PlainGPT):
    pass


def decorated(model: nn.Module, **_: Any) -> nn.Module:
    made = Decorated(layers=1)
    made.load_state_dict(model.state_dict())
    return made


WAYS: dict[str, Callable[..., nn.Module]] = {"torch.compile": compiled, "parallelize": parallelized, "decorator": decorated}


def train_with_averages(model: nn.Module) -> tuple[torch.Tensor, str]:
    """The logits of the averaged weights after three steps."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = models.batch("plain", batch_size=2, length=21)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch)[0].backward()
        optimizer.step()
        average.update_parameters(model)
    average.eval()
    with torch.no_grad():
        logits = average(**batch)[1]
    return logits + 0, type(logits).__name__


def errors_of_averages(rank: int, world_size: int) -> dict[str, tuple[float, str]]:
    found = {}
    options = {"mesh": dist.init_device_mesh("cpu", (world_size,))}
    for name, way in WAYS.items():
        torch._dynamo.reset()
        plain = models.make("plain", layers=1)
        expected, _ = train_with_averages(copy.deepcopy(plain))
        actual, kind = train_with_averages(way(plain, **options))
        found[name] = ((actual - expected).norm() / expected.norm()).item(), kind
    return found


def test_an_average_of_a_split_models_weights_is_split_and_exact() -> None:
    for found in run_ranks(errors_of_averages, 2):
        for error, kind in found.values():
            assert error <= TOLERANCE and kind == "DeferredTensor"


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy, "pickle": by_pickle, "torch.save": by_torch_save, "copy of a copy": lambda x: by_pickle(copy.deepcopy(x)),
}  # fmt: skip


def kinds_of_copies(rank: int, world_size: int) -> dict[str, tuple[str, bool, bool]]:
    """For each way and copy: the type of its logits, whether they are the model's, and whether weights are its own."""
    found = {}
    batch = models.batch("plain", batch_size=2, length=21)
    for name, way in WAYS.items():
        torch._dynamo.reset()
        model = way(models.make("plain", layers=1))
        expected = model(**batch)[1].detach() + 0
        for kind, make in COPIES.items():
            other = make(model)
            logits = other(**batch)[1]
            own = all(x is not y for x, y in zip(other.parameters(), model.parameters(), strict=True))
            found[f"{name}, {kind}"] = type(logits).__name__, torch.equal(logits.detach() + 0, expected), own
            assert list(other.state_dict()) == list(model.state_dict())
    return found


def test_a_copy_of_a_split_model_is_split() -> None:
    for found in run_ranks(kinds_of_copies, 2):
        assert found == dict.fromkeys(found, ("DeferredTensor", True, True)) and len(found) == len(WAYS) * len(COPIES)


def load_with_mesh(rank: int, world_size: int) -> tuple[list[str], str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("autoseq").addHandler(handler)
    try:
        model = parallelized(models.make("plain", layers=1), mesh=dist.init_device_mesh("cpu", (world_size,)))
        loaded = by_pickle(model)
        logits = loaded(**models.batch("plain", batch_size=2, length=21))[1]
    finally:
        logging.getLogger("autoseq").removeHandler(handler)
    return said, type(logits).__name__


def test_a_pickle_of_a_model_on_a_mesh_says_that_it_runs_whole() -> None:
    for said, kind in run_ranks(load_with_mesh, 2):
        (line,) = said
        assert kind == "Tensor" and "an unpickled PlainGPT had been parallelized over a device mesh" in line


def test_a_class_with_a_state_of_its_own_is_copied() -> None:
    model = parallelized(WithState())
    for make in COPIES.values():
        other = make(model)
        assert other.note == "kept" and other.__dict__["_compiled_call_impl"] is not model.__dict__["_compiled_call_impl"]


class WithState(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.note = "kept"

    def __getstate__(self) -> tuple[dict[str, Any], str]:  # type: ignore[override]
        state = self.__dict__.copy()
        for name in ("_compiled_call_impl", "__reduce_ex__"):
            state.pop(name, None)
        return state, "version 2"

    def __setstate__(self, state: tuple[dict[str, Any], str]) -> None:
        super().__setstate__(state[0])
