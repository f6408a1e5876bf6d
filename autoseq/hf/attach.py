"""`attach`: the one line that splits the sequence of a trainer's model, or of the model of a loop with an `Accelerator`."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autoseq.api import parallelize
from autoseq.hf.accelerate_loops import adapt_accelerator
from autoseq.hf.comparison import compare_first_steps
from autoseq.hf.data_parallel import reduce_over_copies
from autoseq.hf.generation import generate_unsplit
from autoseq.hf.out_of_memory import try_again_together
from autoseq.hf.refusals import check_accelerator, check_ranks, check_trainer
from autoseq.hf.replicas import Replicas, show_replicas
from autoseq.hf.reporting import any_rank_reports, counting_backend, report_traffic
from autoseq.hf.retries import refuse_retries, refuse_retries_in
from autoseq.hf.same_start import share_generators, share_weights
from autoseq.hf.sharded import refuse_comparison, save_over_all_ranks
from autoseq.mesh import DIMS, make_mesh, sequence_mesh
from autoseq.runtime.errors import OptionError

_INEXACT = {
    "grad_sync": ("none", "every rank of a sequence would step by a gradient of its own"),
    "outputs": ("local", "losses, metrics and predictions would be of one rank's rows"),
}
"""Options of loops that reduce and gather themselves, which neither a trainer nor accelerate does."""


def attach(target: Any, model: nn.Module | None = None, *, sequence: int, verify: int = 0, **options: Any) -> None:
    """Split the sequence of a trainer's model over `sequence` ranks; what ranks remain are copies of the data.

        autoseq.hf.attach(trainer, sequence=8)                 # a Trainer of transformers or TRL, before train() and evaluate()
        autoseq.hf.attach(accelerator, model, sequence=8)      # an accelerate.Accelerator, before prepare()

    Losses, gradient norms, metrics, predictions, learning rates, checkpoints and weights are those of as many processes as there are
    copies: of one device, where all ranks share the sequence. The program is started with torchrun or `accelerate launch`, one process a
    rank. `verify`: so many first training steps are run on each rank by itself too, and compared; a difference raises VerificationError.
    A trainer that reports (`report_to`) logs `autoseq/bytes_sent` and `autoseq/gathers` beside each training loss. `options` are those of
    `autoseq.Options`, without `mesh`.

    Raises OptionError for a wrong argument, MeshError where the ranks cannot be divided, and UnsupportedError for what would not be exact:
    DeepSpeed, Megatron-LM, XLA, FSDP1, another parallelism, DataParallel, torch_compile, vLLM, find_executable_batch_size.
    """
    check_ranks(sequence)
    _check_options(options)
    refuse_retries()
    if _is_a("accelerate", "Accelerator", target):
        if not isinstance(model, nn.Module):
            raise OptionError("attach(accelerator, model, sequence=...) needs the model, before accelerator.prepare(model, ...)")
        if verify:
            raise OptionError("verify=... compares the training steps of a Trainer; beside an Accelerator run `autoseq verify`")
        check_accelerator(target, [model])
        adapt_accelerator(target, _split(target, [model], sequence_mesh(sequence, device_type=target.device.type), options))
        refuse_retries_in(target, "prepare", "backward")
    elif _is_a("transformers", "Trainer", target):
        if model is not None:
            raise OptionError("a Trainer has its model already: attach(trainer, sequence=...)")
        from autoseq.hf.trainers import adapt_trainer, models_of

        check_trainer(target, models_of(target), sequence)
        refuse_comparison(target.accelerator, verify)
        if target.args.auto_find_batch_size and options.get("ranks_per_node") is not None:
            raise OptionError(
                "attach cannot take ranks_per_node where auto_find_batch_size is set: the groups of nodes could not be made again after a "
                "rank ran out of memory. Leave one of them out."
            )
        is_counted, may_retry = any_rank_reports(target), target.args.auto_find_batch_size
        new_mesh = functools.partial(_mesh, sequence, target.accelerator.device.type, is_counted, may_retry)
        replicas = _split(target.accelerator, models_of(target), new_mesh(), options)
        adapt_trainer(target, replicas, options)
        refuse_retries_in(target, "train")
        if may_retry:
            try_again_together(target, replicas, lambda: _split_again(models_of(target), replicas, new_mesh(), options))
        if target.args.report_to:
            report_traffic(target)
        if verify:
            compare_first_steps(target, replicas, verify)
    else:
        raise OptionError(
            f"attach takes a Trainer of transformers or TRL, or an accelerate.Accelerator and a model, not {type(target).__name__}; "
            "for a loop of your own use autoseq.parallelize"
        )


def _check_options(options: dict[str, Any]) -> None:
    if "mesh" in options:
        raise OptionError("attach makes the mesh from sequence=...; leave the option 'mesh' out")
    for name, (value, why) in _INEXACT.items():
        if options.get(name) == value:
            raise OptionError(f"attach cannot take {name}={value!r}: {why}. Leave it out; a loop of your own can use autoseq.parallelize")


def _is_a(package: str, name: str, target: Any) -> bool:
    """Without importing the package: an instance of its class cannot exist before."""
    kind = getattr(sys.modules.get(package), name, None)
    return kind is not None and isinstance(target, kind)


def _mesh(sequence: int, device_type: str, is_counted: bool, may_retry: bool) -> DeviceMesh:
    """As `sequence_mesh`; its sequences count their messages, and all its groups are its own and can be dropped, where that is asked."""
    backends = dict.fromkeys(DIMS, "gloo") if may_retry else {}
    if is_counted:
        backends[DIMS[1]] = counting_backend()
    return make_mesh(sequence, device_type, backends) if backends else sequence_mesh(sequence, device_type=device_type)


def _split_again(models: list[nn.Module], replicas: Replicas, mesh: DeviceMesh, options: dict[str, Any]) -> None:
    replicas.mesh = mesh
    for model in models:
        parallelize(model, **options, mesh=mesh["sequence"])
    show_replicas(replicas)


def _split(accelerator: Any, models: list[nn.Module], mesh: DeviceMesh, options: dict[str, Any]) -> Replicas:
    replicas = Replicas(mesh)
    for model in models:
        parallelize(model, **options, mesh=mesh["sequence"])
        share_weights(model, mesh["sequence"])
    share_generators(mesh["sequence"])
    show_replicas(replicas)
    save_over_all_ranks("accelerate.accelerator")
    if "transformers" in sys.modules:
        generate_unsplit()
    reduce_over_copies(accelerator, replicas)
    return replicas
