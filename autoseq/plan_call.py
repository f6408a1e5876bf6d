"""The line of Python that runs a plan of `autoseq plan`."""

from __future__ import annotations

import json
from collections.abc import Iterable

from autoseq.asked_strategies import as_patterns
from autoseq.planner import SitePlan
from autoseq.planning.degrees import Candidate

_DEVICE = '"cuda" if torch.cuda.is_available() else "cpu"'


def call_of(best: Candidate, topology: str) -> str:
    """The line that has a candidate's degrees, strategies and layout. It is run on all ranks.

    What cannot be told apart by name is chosen again in the run, on `topology`: the name or the file that the plan is for, as it was given.
    """
    split, options = best.split, dict[str, str]()
    if split.sequence == 1:
        return "each rank has whole sequences: train with DistributedDataParallel or FSDP, without autoseq"
    mesh = {"nodes": split.mesh[0], "ranks": split.mesh[1]} if split.mesh else {"ranks": split.sequence}
    dims = ({"data": split.data} if split.data > 1 else {}) | mesh
    if len(dims) > 1:
        made = f'init_device_mesh({_DEVICE}, {tuple(dims.values())}, mesh_dim_names=({_quoted(dims)}))'
        options["mesh"] = made if split.data == 1 else f"{made}[{_quoted(mesh)}]"
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
