"""Parameters that FSDP2 shards through accelerate, beside a sequence that is split: every logged number and weight is one device's.

accelerate takes FSDP on GPUs alone, so these tests set what its state would hold there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import hf_job
from ranks import run_ranks
from test_hf_trainer import arguments


def shard(trainer: Any) -> None:
    """As if accelerate had been launched with FSDP2 on GPUs."""
    from accelerate.state import AcceleratorState, DistributedType
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT", reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    trainer.is_fsdp_enabled = True


def whole_weights(model: Any) -> dict[str, Tensor]:
    """All ranks call it."""
    found = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()}
    return {name: value.detach().clone() for name, value in found.items()}


def trained_and_resumed(folder: Path, attach: Callable[..., None], is_sharded: bool = False) -> Any:
    from transformers import Trainer

    found: dict[str, Any] = {}
    for steps in (2, 3):
        args = arguments(
            folder, optim="adamw_torch", learning_rate=1e-3, gradient_accumulation_steps=2, max_grad_norm=0.5,
            max_steps=steps, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(model=hf_job.llama(), args=args, train_dataset=hf_job.rows(16), eval_dataset=hf_job.rows(3, seed=2))
        if is_sharded:
            shard(trainer)
        attach(trainer)
        trainer.train(resume_from_checkpoint=steps > 2)
        assert not is_sharded or all(isinstance(p, DTensor) for p in trainer.model.parameters())
        found |= {f"log {steps}": hf_job.logged(trainer), f"weights {steps}": whole_weights(trainer.model)}
        hf_job.forget_accelerator()
    return found


def two_ranks(rank: int, world_size: int, folder: str) -> None:
    import autoseq

    path = Path(folder)
    if rank == 0:
        with hf_job.processes(None, 1):
            torch.save(trained_and_resumed(path / "alone", lambda *target: None), path / "alone.pt")
    dist.barrier()
    expected = torch.load(path / "alone.pt", weights_only=False)
    torch._dynamo.reset()
    with hf_job.processes(rank, world_size):
        attach = lambda *target: autoseq.hf.attach(*target, sequence=2, inner="eager")  # noqa: E731
        found = trained_and_resumed(path / "split", attach, is_sharded=True)
    hf_job.check_alike(found, expected, hf_job.ADAMW_TOLERANCE)


def test_training_and_resuming_are_those_of_one_device(tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, str(tmp_path), timeout_s=280)


def in_float64(folder: Path, attach: Callable[..., None], accumulated: int) -> Any:
    from transformers import Trainer

    args = arguments(folder, gradient_accumulation_steps=accumulated, max_grad_norm=0.5, train_sampling_strategy="sequential")
    trainer = Trainer(model=hf_job.llama().double(), args=args, train_dataset=hf_job.rows(12))
    if accumulated == 1:
        shard(trainer)
    attach(trainer)
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"norms": norms, "weights": whole_weights(trainer.model)}


def two_by_two(rank: int, world_size: int, folder: str) -> None:
    hf_job.compare_accumulated(rank, world_size, in_float64, folder)


def test_two_copies_are_two_accumulated_batches(tmp_path: Path) -> None:
    run_ranks(two_by_two, 4, str(tmp_path), timeout_s=240)


def test_verify_needs_whole_gradients() -> None:
    from types import SimpleNamespace

    from autoseq import UnsupportedError
    from autoseq.hf.sharded import refuse_comparison

    refuse_comparison(SimpleNamespace(is_fsdp2=True), 0)
    with pytest.raises(UnsupportedError, match="verify=2 compares whole gradients, and FSDP leaves a rank its share"):
        refuse_comparison(SimpleNamespace(is_fsdp2=True), 2)
