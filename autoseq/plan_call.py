"""The line of Python that runs a plan of `autoseq plan`."""

from __future__ import annotations

import json
from collections.abc import Iterable

from autoseq.planning.degrees import Candidate


def call_of(best: Candidate, topology: str) -> str:
    """The line that has a candidate's degrees, strategy and layout. It is started on all ranks, with CUDA.

    Several strategies are chosen again in the run, on `topology`: the name or the file that the plan is for, as it was given.
    """
    split, options = best.split, dict[str, str]()
    if split.sequence == 1:
        return "each rank has whole sequences: train with DistributedDataParallel or FSDP, without autoseq"
    mesh = {"nodes": split.mesh[0], "ranks": split.mesh[1]} if split.mesh else {"ranks": split.sequence}
    dims = ({"data": split.data} if split.data > 1 else {}) | mesh
    if len(dims) > 1:
        made = f'init_device_mesh("cuda", {tuple(dims.values())}, mesh_dim_names=({_quoted(dims)}))'
        options["mesh"] = made if split.data == 1 else f"{made}[{_quoted(mesh)}]"
    taken = best.strategies
    options |= {"strategy": _quoted(taken)} if len(taken) == 1 else {"topology": _quoted([topology])}
    options["layout"] = _quoted([best.plan.layout])
    inside = ", ".join(f'"{name}": {value}' for name, value in options.items())
    return f'torch.compile(model, backend="autoseq", options={{{inside}}})'


def _quoted(texts: Iterable[str]) -> str:
    """Strings in Python, one after the other."""
    return ", ".join(json.dumps(text, ensure_ascii=False) for text in texts)
