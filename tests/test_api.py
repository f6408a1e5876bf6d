"""The public surface: the function, the decorator, the ways outputs come back, groups side by side."""

import copy
import importlib.metadata
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autoseq
import models
from ranks import run_ranks

OPTIONS: dict[str, Any] = {"inner": "eager"}
TOLERANCE = 1e-5  # relative L2 of a float32 gradient, whose sums run in another order


def test_the_backend_is_an_entry_point_that_needs_no_import() -> None:
    names = [point.name for point in importlib.metadata.entry_points(group="torch_dynamo_backends")]
    assert "autoseq" in names


def test_all_public_names_exist_and_have_a_docstring() -> None:
    for name in autoseq.__all__:
        assert getattr(autoseq, name).__doc__, name


def test_parallelize_returns_the_model_with_its_keys_unchanged() -> None:
    model = models.make("plain")
    keys = list(model.state_dict())
    assert autoseq.parallelize(model, **OPTIONS) is model
    assert list(model.state_dict()) == keys


def test_parallelize_refuses_what_is_no_module() -> None:
    with pytest.raises(autoseq.OptionError, match=r"parallelize takes an nn\.Module, not function"):
        autoseq.parallelize(lambda x: x)  # type: ignore[type-var]


def test_the_decorator_refuses_what_is_no_module_class_and_wrong_options() -> None:
    with pytest.raises(autoseq.OptionError, match=r"decorates an nn\.Module class"):
        autoseq.sequence_parallel()(dict)  # type: ignore[type-var]
    with pytest.raises(autoseq.OptionError, match="there is no option 'speed'"):
        autoseq.sequence_parallel(speed=1)
    with pytest.raises(autoseq.OptionError, match=r"write @autoseq\.sequence_parallel\(\)"):
        autoseq.sequence_parallel(models.PlainGPT)


def test_ranks_that_were_launched_but_not_initialized_are_an_error_and_never_run_unsplit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    compiled = torch.compile(models.make("plain", layers=1), backend="autoseq", options=OPTIONS)
    with pytest.raises(autoseq.MeshError, match=r"launched as one of 2 ranks .* not initialized.*init_process_group"):
        compiled(**models.batch("plain", batch_size=1, length=8))


@autoseq.sequence_parallel(**OPTIONS)
class SplitGPT(models.PlainGPT):
    """A hand-written model whose every instance is split."""


def train_decorated(rank: int, world_size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    split = SplitGPT()
    torch.manual_seed(0)
    plain = models.PlainGPT()
    batch = models.batch("plain", batch_size=2, length=21)
    loss, logits = split(**batch)
    loss.backward()
    expected, _ = plain(**batch)
    expected.backward()
    return {
        "keys": list(split.state_dict()) == list(plain.state_dict()),
        "type": type(logits).__name__,
        "error": worst_gradient(split, plain),
    }


def worst_gradient(model: nn.Module, oracle: nn.Module) -> float:
    pairs = zip(model.parameters(), oracle.parameters(), strict=True)
    return max(((p.grad - e.grad).norm() / e.grad.norm()).item() for p, e in pairs)  # type: ignore[operator,union-attr]


def test_every_instance_of_a_decorated_class_is_split() -> None:
    for result in run_ranks(train_decorated, 2):
        assert result["keys"] and result["type"] == "DeferredTensor" and result["error"] <= TOLERANCE


def outputs_of_each_kind(rank: int, world_size: int) -> dict[str, Any]:
    oracle = models.make("plain", layers=1)
    batch = models.batch("plain", batch_size=2, length=21)
    expected = oracle(**batch)[1]
    found: dict[str, Any] = {}
    for kind in ("deferred", "full", "local"):
        model = models.make("plain", layers=1)
        # Whole rows of the scores on one rank: the same bits as on one device.
        options = {**OPTIONS, "outputs": kind, "layout": "contiguous", "strategy": "ulysses"}
        logits = torch.compile(model, backend="autoseq", options=options)(**batch)[1]
        # 21 rows on 2 ranks are 11 and 10
        mine = expected[:, rank * 11 : rank * 11 + 11] if kind == "local" else expected
        found[kind] = (type(logits).__name__, tuple(logits.shape), torch.equal(logits.detach() + 0, mine.detach()))
    return found


def test_outputs_come_back_deferred_full_or_local() -> None:
    for rank, found in enumerate(run_ranks(outputs_of_each_kind, 2)):
        assert found["deferred"] == ("DeferredTensor", (2, 21, models.VOCABULARY), True)
        assert found["full"] == ("Tensor", (2, 21, models.VOCABULARY), True)
        assert found["local"] == ("Tensor", (2, [11, 10][rank], models.VOCABULARY), True)


def losses_outside(rank: int, world_size: int) -> tuple[float, float]:
    model = models.make("llama")
    oracle = copy.deepcopy(model)
    ids = models.batch("llama", batch_size=2, length=21)["input_ids"]
    compiled = torch.compile(model, backend="autoseq", options=OPTIONS)
    losses = []
    for each in (compiled, oracle):
        logits = each(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())  # type: ignore[index]
        loss.backward()
        losses.append(loss.item())
    return abs(losses[0] - losses[1]), worst_gradient(model, oracle)


def test_a_loss_computed_outside_the_model_is_one_devices() -> None:
    for loss, gradient in run_ranks(losses_outside, 2):
        assert loss <= 1e-6 and gradient <= TOLERANCE


def unsummed(rank: int, world_size: int) -> float:
    model = models.make("plain")
    oracle = copy.deepcopy(model)
    batch = models.batch("plain", batch_size=2, length=21)
    torch.compile(model, backend="autoseq", options={**OPTIONS, "grad_sync": "none"})(**batch)[0].backward()
    oracle(**batch)[0].backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    return worst_gradient(model, oracle)


def test_grad_sync_none_leaves_gradients_that_add_up_over_the_group() -> None:
    assert max(run_ranks(unsummed, 3)) <= TOLERANCE


def two_groups(rank: int, world_size: int) -> tuple[float, float]:
    """Data x sequence: each pair of ranks trains on its own batch; and a second model runs on all four ranks."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    pair, everyone = models.make("plain", layers=1), models.make("llama", num_hidden_layers=1)
    oracles = copy.deepcopy(pair), copy.deepcopy(everyone)
    torch.manual_seed(7)
    ids = torch.randint(0, models.VOCABULARY, (2, 2, 23))[mesh.get_local_rank("data")]
    split_pair = torch.compile(pair, backend="autoseq", options={**OPTIONS, "mesh": mesh["sequence"]})
    split_everyone = torch.compile(everyone, backend="autoseq", options={**OPTIONS, "strategy": "ring"})
    batch = models.batch("llama", batch_size=1, length=23)
    for _ in range(2):  # the two models' messages interleave
        split_pair(ids, ids)[0].backward()
        split_everyone(**batch).loss.backward()
        oracles[0](ids, ids)[0].backward()
        oracles[1](**batch).loss.backward()
    return worst_gradient(pair, oracles[0]), worst_gradient(everyone, oracles[1])


def test_several_models_and_groups_live_in_one_process() -> None:
    for errors in run_ranks(two_groups, 4):
        assert max(errors) <= TOLERANCE


def wrapped_in_ddp(rank: int, world_size: int) -> float:
    """Data parallel over pairs: DDP averages over `data`, autoseq sums over `sequence`."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    model = models.make("plain")
    oracle = copy.deepcopy(model)
    torch.manual_seed(7)
    batches = torch.randint(0, models.VOCABULARY, (2, 2, 23))
    autoseq.parallelize(model, **OPTIONS, mesh=mesh["sequence"])
    replicated = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group("data"))
    mine = batches[mesh.get_local_rank("data")]
    replicated(mine, mine)[0].backward()
    (sum(oracle(ids, ids)[0] for ids in batches) / 2).backward()
    return worst_gradient(model, oracle)


def test_ddp_over_another_mesh_dimension_composes() -> None:
    assert max(run_ranks(wrapped_in_ddp, 4)) <= TOLERANCE
