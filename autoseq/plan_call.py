"""The lines of Python that run a plan of `autoseq plan`: the mesh, the sampler, what sums gradients over the copies, and the compilation.

They are complete but for `model`, `dataset` and the optimizer, which are the user's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from autoseq.asked_strategies import as_patterns
from autoseq.planner import SitePlan
from autoseq.planning.degrees import Candidate
from autoseq.planning.training import Split, Training

_DEVICE = '"cuda" if torch.cuda.is_available() else "cpu"'
ALONE = "# Each rank has whole sequences: train with DistributedDataParallel or FSDP, without autoseq."


def lines_of(best: Candidate, training: Training, topology: str) -> list[str]:
    """The statements that train with a candidate, run on all ranks after `init_process_group` with the same weights everywhere.

    The whole batch of `training` is divided among the copies of the data. See `call_of` for `topology`.
    """
    split = best.split
    if split.sequence == 1:
        return [ALONE]
    rows = f"batch_size={training.batch // split.data}"
    sampler = 'num_replicas=mesh["data"].size(), rank=mesh["data"].get_local_rank()'
    compiled = f"model = {call_of(best, topology)}"
    if training.shard_parameters:
        sharded = f'model = fully_shard(model, mesh=autoseq.sequence_mesh({split.ranks})["sequence"], reshard_after_forward=True)'
        imports, wrapped = "import autoseq, torch; from torch.distributed.fsdp import fully_shard", [sharded, compiled]
    elif split.data > 1:
        replicated = "torch.nn.parallel.DistributedDataParallel"
        copies = f'model = {replicated}(model, process_group=mesh["data"].get_group(), gradient_as_bucket_view=True)'
        imports, wrapped = "import autoseq, torch", [compiled, copies]
    else:
        imports, wrapped = "import autoseq, torch", [compiled]
    return [
        imports, _mesh_line(split), f"sampler = torch.utils.data.DistributedSampler(dataset, {sampler})",
        f"loader = torch.utils.data.DataLoader(dataset, {rows}, sampler=sampler)", *wrapped,
    ]  # fmt: skip


def _mesh_line(split: Split) -> str:
    if not split.mesh:
        return f"mesh = autoseq.sequence_mesh({split.sequence})"
    return f'mesh = torch.distributed.init_device_mesh({_DEVICE}, {(split.data, *split.mesh)}, mesh_dim_names=("data", "nodes", "ranks"))'


def call_of(best: Candidate, topology: str) -> str:
    """The compilation that has a candidate's strategies and layout, on the mesh of `lines_of`.

    What cannot be told apart by name is chosen again in the run, on `topology`: the name or the file that the plan is for, as it was given.
    """
    if best.split.sequence == 1:
        return ALONE
    options = {"mesh": 'mesh["nodes", "ranks"]' if best.split.mesh else 'mesh["sequence"]'}
    by_name = _by_name(best.plan.sites)
    shared = {name: taken for name, taken in by_name.items() if len(taken) > 1}
    patterns = as_patterns({name: "auto" if name in shared else taken[0] for name, taken in by_name.items()})
    options["strategy"] = _quoted(patterns.values()) if len(patterns) == 1 else json.dumps(patterns, ensure_ascii=False)
    if shared:
        options["topology"] = _quoted([topology])
    options["layout"] = _quoted([best.plan.layout])
    inside = ", ".join(f'"{name}": {value}' for name, value in options.items())
    return f'torch.compile(model, backend="autoseq", options={{{inside}}}){_remark(shared)}'


def _by_name(sites: Iterable[SitePlan]) -> dict[str, list[str]]:
    """What attentions are called in the run, and the strategies of all that are called so: parts of a model are compiled one by one."""
    found: dict[str, list[str]] = {}
    for planned in sites:
        taken = found.setdefault(planned.site.run_name, [])
        if planned.strategy not in taken:
            taken.append(planned.strategy)
    return found


def _remark(shared: dict[str, list[str]]) -> str:
    """Python's comment on names that several parts of a model have, with a strategy each."""
    told = [f"{_quoted([name])} is the name of several attentions, planned as {' and '.join(taken)}" for name, taken in shared.items()]
    return f"  # {'; '.join(told)}: the run chooses" if told else ""


def _quoted(texts: Iterable[str]) -> str:
    """Strings in Python, one after the other."""
    return ", ".join(json.dumps(text, ensure_ascii=False) for text in texts)
