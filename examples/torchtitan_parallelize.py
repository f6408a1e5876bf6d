"""torchtitan 0.3 with the sequence split by autoseq in place of its context parallel: a `parallelize_fn` for a model's `ModelSpec`.

    spec = dataclasses.replace(spec, parallelize_fn=parallelize)          # then: --parallelism.tensor_parallel_degree 8

torchtitan's own context parallel cuts the inputs and adds up losses and gradients over its ranks. The ranks of its "tp" dim get the same
batch, and losses, token counts and gradients are counted once for all of them, as autoseq needs it: that dim is the sequence.
A model may not be wrapped by more than one `fully_shard`, or its blocks would be programs by themselves.
"""

from torch.distributed.fsdp import fully_shard

import autoseq


def parallelize(model, *, parallel_dims, inner="inductor", **_settings):
    """Called by torchtitan's Trainer with the model on the meta device; `_settings` are those of its other parallelisms."""
    for dim in ("dp_replicate", "cp", "pp"):
        if getattr(parallel_dims, dim) > 1:
            raise ValueError(f"{dim} is {getattr(parallel_dims, dim)}: beside autoseq the ranks are dp_shard × tp, so set it to 1")
    copies = parallel_dims.get_optional_mesh("fsdp")
    if copies is not None:
        fully_shard(model, mesh=copies)
        model.set_gradient_divide_factor(1.0)  # the Trainer divides the loss by the tokens of all copies, so gradients are added up
        model.set_force_sum_reduction_for_comms(True)
    return autoseq.parallelize(model, mesh=parallel_dims.get_mesh("tp"), inner=inner)
