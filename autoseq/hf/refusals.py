"""What `attach` refuses by name, before the first step: settings with which the numbers would not be one device's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from autoseq.runtime.errors import MeshError, OptionError, UnsupportedError


@dataclass(frozen=True, slots=True)
class Refusal:
    """A setting, how it shows, why it is refused and what to do instead."""

    what: str
    applies: Callable[[Any], bool]
    why: str
    instead: str

    def message(self) -> str:
        return f"autoseq.hf.attach does not serve {self.what}: {self.why}. {self.instead}"


def check_ranks(sequence: Any) -> None:
    """Raises OptionError for a number of ranks that is none, and MeshError for one by which the ranks cannot be divided."""
    if type(sequence) is not int or sequence < 1:
        raise OptionError(f"sequence is the number of ranks that share one sequence, 1 or more, not {sequence!r}")
    if not (dist.is_available() and dist.is_initialized()):
        raise MeshError(
            f"sequence={sequence} ranks are to share a sequence, and torch.distributed is not initialized: this process was started alone. "
            f"Start the program with torchrun --nproc-per-node {sequence}, or accelerate launch --num_processes {sequence}."
        )
    ranks = dist.get_world_size()
    if ranks % sequence:
        raise MeshError(
            f"{ranks} ranks cannot be divided into groups of sequence={sequence}. Start a multiple of {sequence} ranks, or choose a "
            f"divisor of {ranks}."
        )


def check_accelerator(accelerator: Any, models: Sequence[nn.Module]) -> None:
    """Raises UnsupportedError for a setting of the accelerator, or a state of a model, that would not be exact."""
    _refuse(_OF_ACCELERATOR, accelerator)
    for model in models:
        _refuse(_OF_MODEL, model)
    prepared = [kind for kind in ("_models", "_optimizers", "_schedulers", "_dataloaders") if getattr(accelerator, kind, None)]
    if any(not _is_reference(model, models) for model in accelerator._models) or set(prepared) - {"_models"}:
        raise UnsupportedError(
            "autoseq.hf.attach comes before accelerator.prepare(...) and before a trainer's train(), evaluate() and predict(): what was "
            f"prepared ({', '.join(kind[1:] for kind in prepared)}) has divided the data by the number of ranks already."
        )


def check_trainer(trainer: Any, models: Sequence[nn.Module], sequence: int) -> None:
    """Raises UnsupportedError for a setting of the trainer, its arguments or its accelerator that would not be exact."""
    _refuse(_OF_TRAINER, trainer)
    ranks_of_node = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if trainer.args.save_on_each_node and ranks_of_node % sequence:
        raise UnsupportedError(
            f"autoseq.hf.attach does not serve save_on_each_node where a sequence of {sequence} ranks lies on two nodes of {ranks_of_node} "
            "ranks: one of them would have no generators to resume from. Leave it out, and save where all nodes can read."
        )
    check_accelerator(trainer.accelerator, models)


def _is_reference(model: nn.Module, models: Sequence[nn.Module]) -> bool:
    """TRL's trainers prepare the models that they do not train when they are made, which wraps nothing."""
    return any(model is each for each in models[1:]) or not any(p.requires_grad for p in model.parameters())


def _refuse(refusals: Sequence[Refusal], of: Any) -> None:
    for refusal in refusals:
        if refusal.applies(of):
            raise UnsupportedError(refusal.message())


def _type(accelerator: Any) -> str:
    return str(accelerator.distributed_type.value)


def _parallelisms(accelerator: Any) -> Iterator[str]:
    sizes = "dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size"
    yield from (name for name in sizes if getattr(accelerator.parallelism_config, name, 1) > 1)


_BESIDE = "Leave it out: the ranks that do not share a sequence are copies of the data, over which DDP sums the gradients."

_OF_ACCELERATOR = (
    Refusal("DeepSpeed", lambda a: _type(a) == "DEEPSPEED", "its engine steps, clips and reduces over all ranks by itself", _BESIDE),
    Refusal("Megatron-LM", lambda a: _type(a) == "MEGATRON_LM", "its engine splits and steps the model by itself", _BESIDE),
    Refusal("XLA devices", lambda a: _type(a) == "XLA", "torch.compile's backends do not run there", "Use CPU or CUDA devices."),
    Refusal(
        "FSDP1",
        lambda a: _type(a) == "FSDP" and getattr(getattr(a.state, "fsdp_plugin", None), "fsdp_version", 1) != 2,
        "its parameters are views of flat ones that it swaps behind the program",
        "Set fsdp_version to 2, in fsdp_config or the FSDP plugin.",
    ),
    Refusal(
        "FSDP with FULL_STATE_DICT",
        lambda a: "FULL" in str(getattr(getattr(a.state, "fsdp_plugin", None), "state_dict_type", "")),
        "what it gathers for a file was not compared yet",
        "Set state_dict_type to SHARDED_STATE_DICT; `accelerate merge-weights` makes one file of a checkpoint.",
    ),
    Refusal(
        "another parallelism (parallelism_config)", lambda a: bool([*_parallelisms(a)]),
        "it divides the ranks in a way of its own", _BESIDE,
    ),
    Refusal(
        "torch_compile (accelerate's dynamo_backend)", lambda a: a.state.dynamo_plugin.backend.value != "NO",
        "its list of backends is closed and has no autoseq, and a model compiled twice would run unsplit",
        "Leave torch_compile out; attach compiles the model, by inner=\"inductor\" where nothing else is chosen.",
    ),
)  # fmt: skip

_OF_MODEL = (
    Refusal(
        "a model that is compiled already", lambda m: hasattr(m, "_orig_mod") or m._compiled_call_impl is not None,
        "what was compiled would run unsplit", "Give the trainer the plain model; attach compiles it in place.",
    ),
    Refusal(
        "a model in DataParallel or DistributedDataParallel",
        lambda m: isinstance(m, nn.DataParallel | nn.parallel.DistributedDataParallel),
        "its ranks have other batches", "Give the trainer the plain model.",
    ),
    Refusal(
        "a model on several devices (device_map)", lambda m: len({*(getattr(m, "hf_device_map", None) or {}).values()}) > 1,
        "its hooks move activations between devices, and a rank has one", "Load it without device_map, on the device of its rank.",
    ),
    Refusal(
        "a model with tensor parallelism", lambda m: (getattr(m, "_tp_size", None) or 1) > 1 or bool(getattr(m, "_device_mesh", None)),
        "its ranks have the same batch for another reason", "Load it without tp_plan and distributed_config.",
    ),
)  # fmt: skip

_OF_TRAINER = (
    Refusal(
        "DataParallel", lambda t: t.args.n_gpu > 1, "one process drives several GPUs",
        "Start one process a GPU with torchrun, or set CUDA_VISIBLE_DEVICES.",
    ),
    Refusal(
        "a second attach of one trainer", lambda t: getattr(t, "_is_split_by_autoseq", False),
        "its model is split already", "Call it once.",
    ),
    Refusal(
        "auto_find_batch_size on GPUs", lambda t: t.args.auto_find_batch_size and t.accelerator.device.type != "cpu",
        "where one rank runs out of memory the others wait for it inside a kernel of NCCL, which cannot be ended from outside safely",
        "Set per_device_train_batch_size by hand; `autoseq plan` says what fits.",
    ),
    Refusal(
        "auto_find_batch_size in a trainer that generates",
        lambda t: t.args.auto_find_batch_size and getattr(t.args, "generation_batch_size", None) is not None,
        "its generation batches keep the size that they had at first", "Set per_device_train_batch_size by hand.",
    ),
    Refusal(
        "use_vllm", lambda t: getattr(t, "use_vllm", False), "its engine divides the ranks in a way of its own",
        "Leave it out: completions are then generated by the model itself, unsplit, alike on all ranks of a sequence.",
    ),
    Refusal(
        "use_transformers_continuous_batching",
        lambda t: any(getattr(owner, "use_transformers_continuous_batching", False) for owner in (t, t.args)),
        "its engine schedules requests by the time they take, so the ranks of a sequence would draw differently",
        "Leave it out: completions are then generated by the model itself, unsplit, alike on all ranks of a sequence.",
    ),
)  # fmt: skip
