"""What `attach` refuses before the first step, by name, in words of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

import autoseq
import hf_job
from autoseq import MeshError, OptionError, UnsupportedError
from test_hf_trainer import arguments


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """This process as one of four, without the others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    with hf_job.processes(None, 1):
        yield
    dist.destroy_process_group()


def trainer(folder: Path, change: Callable[[Any], None] = lambda trainer: None, **args: Any) -> Any:
    from transformers import Trainer

    made = Trainer(model=hf_job.llama(), args=arguments(folder, **args), train_dataset=hf_job.rows(4))
    change(made)
    return made


def runs_as(kind: str, **state: Any) -> Callable[[Any], None]:
    """As if accelerate had been started for another kind of distribution."""

    def change(trainer: Any) -> None:
        from accelerate.state import DistributedType

        seen = {"dynamo_plugin": trainer.accelerator.state.dynamo_plugin, "distributed_type": DistributedType[kind], **state}
        trainer.accelerator = SimpleNamespace(
            state=SimpleNamespace(**seen), distributed_type=DistributedType[kind], parallelism_config=None, _models=[]
        )

    return change


def parallelism(trainer: Any) -> None:
    runs_as("MULTI_GPU")(trainer)
    trainer.accelerator.parallelism_config = SimpleNamespace(tp_size=2)


def attached(trainer: Any) -> None:
    trainer._is_split_by_autoseq = True


CASES = [
    pytest.param(runs_as("DEEPSPEED"), {}, "does not serve DeepSpeed: its engine steps", id="DeepSpeed"),
    pytest.param(runs_as("MEGATRON_LM"), {}, "does not serve Megatron-LM", id="Megatron-LM"),
    pytest.param(runs_as("XLA"), {}, "does not serve XLA devices", id="XLA"),
    pytest.param(runs_as("FSDP"), {}, "serve FSDP1: .* Set fsdp_version to 2", id="FSDP1"),
    pytest.param(
        runs_as("FSDP", fsdp_plugin=SimpleNamespace(fsdp_version=2, state_dict_type="StateDictType.FULL_STATE_DICT")),
        {},
        "serve FSDP with FULL_STATE_DICT: .* Set state_dict_type to SHARDED_STATE_DICT",
        id="full state dicts",
    ),
    pytest.param(lambda t: setattr(t.model, "hf_device_map", {"model": 0, "lm_head": 1}), {}, "on several devices", id="device_map"),
    pytest.param(
        lambda t: setattr(t.args, "use_transformers_continuous_batching", True),
        {},
        "serve use_transformers_continuous_batching",
        id="continuous batching",
    ),
    pytest.param(parallelism, {}, r"another parallelism \(parallelism_config\)", id="parallelism_config"),
    pytest.param(lambda t: setattr(t.args, "_n_gpu", 2), {}, "does not serve DataParallel: .* torchrun", id="DataParallel"),
    pytest.param(lambda t: setattr(t, "use_vllm", True), {}, "does not serve use_vllm", id="vLLM"),
    pytest.param(attached, {}, "a second attach of one trainer", id="twice"),
    pytest.param(lambda t: t.model.compile(backend="eager"), {}, "a model that is compiled already", id="compiled"),
    pytest.param(lambda t: setattr(t.model, "_tp_size", 2), {}, "a model with tensor parallelism", id="tensor parallelism"),
    pytest.param(lambda t: t.accelerator.prepare(t.model), {}, "comes before accelerator.prepare", id="prepared"),
    pytest.param(
        lambda t: setattr(t, "accelerator", SimpleNamespace(device=SimpleNamespace(type="cuda"))),
        {"auto_find_batch_size": True},
        "auto_find_batch_size on GPUs: .* inside a kernel of NCCL",
        id="auto_find_batch_size on GPUs",
    ),
    pytest.param(
        lambda t: setattr(t.args, "generation_batch_size", 4),
        {"auto_find_batch_size": True},
        "auto_find_batch_size in a trainer that generates",
        id="auto_find_batch_size and generation",
    ),
    pytest.param(lambda t: None, {"torch_compile": True}, r"torch_compile \(accelerate's dynamo_backend\)", id="torch_compile"),
]


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(("change", "args", "message"), CASES)
def test_refused(change: Callable[[Any], None], args: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, change, **args)
    with pytest.raises(UnsupportedError, match=message):
        autoseq.hf.attach(made, sequence=2)


@pytest.mark.usefixtures("four_ranks")
def test_saving_on_each_node_of_a_sequence_on_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, save_on_each_node=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match="save_on_each_node where a sequence of 4 ranks lies on two nodes of 2"):
        autoseq.hf.attach(made, sequence=4)


@pytest.mark.usefixtures("four_ranks")
def test_wrong_arguments(tmp_path: Path) -> None:
    from accelerate import Accelerator

    made = trainer(tmp_path)
    with pytest.raises(MeshError, match="4 ranks cannot be divided into groups of sequence=3"):
        autoseq.hf.attach(made, sequence=3)
    with pytest.raises(OptionError, match="1 or more, not 0"):
        autoseq.hf.attach(made, sequence=0)
    with pytest.raises(OptionError, match="leave the option 'mesh' out"):
        autoseq.hf.attach(made, sequence=2, mesh=None)
    with pytest.raises(OptionError, match=r"attach cannot take grad_sync='none': every rank .* a gradient of its own"):
        autoseq.hf.attach(made, sequence=2, grad_sync="none")
    with pytest.raises(OptionError, match="attach cannot take outputs='local': losses, metrics and predictions"):
        autoseq.hf.attach(made, sequence=2, outputs="local")
    with pytest.raises(OptionError, match="cannot take ranks_per_node where auto_find_batch_size is set"):
        autoseq.hf.attach(trainer(tmp_path, auto_find_batch_size=True), sequence=4, ranks_per_node=2)
    with pytest.raises(OptionError, match="a Trainer has its model already"):
        autoseq.hf.attach(made, made.model, sequence=2)
    with pytest.raises(OptionError, match=r"attach takes a Trainer of transformers or TRL, .*not Linear"):
        autoseq.hf.attach(nn.Linear(1, 1), sequence=2)
    with pytest.raises(OptionError, match="needs the model, before"):
        autoseq.hf.attach(Accelerator(cpu=True), sequence=2)
    with pytest.raises(OptionError, match=r"verify=\.\.\. compares the training steps of a Trainer"):
        autoseq.hf.attach(Accelerator(cpu=True), nn.Linear(1, 1), sequence=2, verify=2)
    with pytest.raises(UnsupportedError, match="DataParallel or DistributedDataParallel"):
        autoseq.hf.attach(Accelerator(cpu=True), nn.DataParallel(nn.Linear(1, 1)), sequence=2)


def test_a_process_that_was_started_alone() -> None:
    with pytest.raises(MeshError, match="torchrun --nproc-per-node 8"):
        autoseq.hf.attach(nn.Linear(1, 1), sequence=8)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, autoseq; autoseq.hf.attach; assert not {'transformers', 'accelerate'} & sys.modules.keys()"
    run = hf_job.python(code)
    assert run.returncode == 0, run.stderr


def test_generation_batches_are_those_of_the_copies(caplog: pytest.LogCaptureFixture) -> None:
    from autoseq.hf.generation import draw_by_copy

    def counted_by_ranks(**changes: Any) -> Any:
        numbers = {"generation_batch_size": 8, "per_device_train_batch_size": 2, "steps_per_generation": 2, "num_generations": 2}
        return SimpleNamespace(args=SimpleNamespace(**numbers | {"gradient_accumulation_steps": 2} | changes))

    one_copy: Any = SimpleNamespace(num_copies=1, copy=0)
    made = counted_by_ranks()
    draw_by_copy(made, one_copy)
    assert made.args.generation_batch_size == 4 and not caplog.records
    draw_by_copy(counted_by_ranks(gradient_accumulation_steps=1), one_copy)
    assert "generation_batch_size is 4" in caplog.text and "no longer 8" in caplog.text
    with pytest.raises(OptionError, match="4 completions, which cannot be divided by num_generations=8"):
        draw_by_copy(counted_by_ranks(num_generations=8), one_copy)
    evaluated = {"eval_strategy": "steps", "per_device_eval_batch_size": 2}
    draw_by_copy(counted_by_ranks(**evaluated, num_generations_eval=None), one_copy)
    with pytest.raises(OptionError, match=r"evaluation batch of 1 copies of the data has 2 rows, .* by 4 generations"):
        draw_by_copy(counted_by_ranks(**evaluated, num_generations_eval=4), one_copy)


def test_the_class_of_the_arguments_of_a_silent_rank(tmp_path: Path) -> None:
    from autoseq.hf.trainers import _silent

    with hf_job.processes(None, 1):
        args, on_each_node = (arguments(tmp_path, save_on_each_node=each) for each in (False, True))
        assert args.should_save and args.should_log
        for each in (args, on_each_node):
            each.__class__ = _silent(type(each))
        assert not args.should_save
        assert on_each_node.should_save
