"""The options of the backend: one frozen record, validated with errors that list what exists."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch.distributed.device_mesh import DeviceMesh

from autoseq.asked_strategies import Asked, read_asked
from autoseq.planning.presets import HERE, load_topology
from autoseq.planning.topology import Topology
from autoseq.runtime.errors import OptionError, did_you_mean
from autoseq.runtime.layout import Layout

Outputs = Literal["deferred", "full", "local"]
GradSync = Literal["sequence", "none"]
Inner = Literal["inductor", "aot_eager", "eager"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "layout": ("auto", *get_args(Layout)),
    "outputs": get_args(Outputs),
    "grad_sync": get_args(GradSync),
    "inner": get_args(Inner),
    "strict": (False, True),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What `torch.compile(model, backend="autoseq", options={...})` takes; defaults are what most programs want.

    mesh: the ranks that share one sequence, as a DeviceMesh of one dim, or of two: nodes, ranks in a node. None means all ranks.
    ranks_per_node: makes two dims of all ranks, in nodes of so many; the two-level strategies need to know them.
    strategy: how attention crosses ranks; "auto" picks, per site, the one predicted to be fastest of those that fit in memory. Or patterns
        of sites' names with either, {"model.layers.5.*": "ring", "*": "halo"}, of which the first that matches counts; where none does,
        "auto". A pattern that decides for no site is an error.
    layout: which rows a rank holds; "auto" is the one with which the whole graph's attention is predicted to be faster.
    topology: the hardware to plan for: a name (`autoseq topology list`), a JSON file (`autoseq topology measure -o`), or a Topology, which
        is what the first two become; None, or "here", is what torch tells of this machine. Every rank gives the same.
    outputs: a sharded output comes back "deferred" (gathers itself when its values are needed), "full" or "local", as this rank's rows.
        What is not sharded is whole on every rank under all three: a loss, a pooled row, and every output of a program without attention.
        A program that runs whole because its sequence has fewer tokens than there are ranks has no rows for each: an error under "local".
    grad_sync: parameter gradients are reduced over the sequence group in the graph ("sequence") or left to the caller.
    inner: what compiles the rewritten graph: Inductor, AOTAutograd alone, or nothing: it runs node by node, as the passes left it,
        and what is checkpointed is kept.
    strict: a step that has to run on gathered values is an error, not a logged fallback.
    """

    mesh: DeviceMesh | None = None
    ranks_per_node: int | None = None
    strategy: Asked = "auto"
    layout: str = "auto"
    topology: Topology | str | os.PathLike[str] | None = None
    outputs: Outputs = "deferred"
    grad_sync: GradSync = "sequence"
    inner: Inner = "inductor"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.mesh is not None and not isinstance(self.mesh, DeviceMesh):
            raise OptionError(f"option 'mesh' is a torch.distributed DeviceMesh or None, not {type(self.mesh).__name__}")
        nodes = self.ranks_per_node
        if nodes is not None and (type(nodes) is not int or nodes < 1):
            raise OptionError(f"option 'ranks_per_node' is a number of ranks, 1 or more, or None, not {nodes!r}")
        if not isinstance(self.topology, Topology | str | os.PathLike | None):
            kind = type(self.topology).__name__
            raise OptionError(f"option 'topology' is a topology's name, a JSON file, a Topology or None, not {kind}")
        object.__setattr__(self, "strategy", read_asked(self.strategy))
        object.__setattr__(self, "topology", None if self.topology in (None, HERE) else load_topology(self.topology))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
                hint = did_you_mean(value, [c for c in choices if isinstance(c, str)])
                raise OptionError(f"option {name!r} cannot be {value!r}{hint}; it is one of {', '.join(map(repr, choices))}")


def parse_options(given: Mapping[str, Any] | None) -> Options:
    """Validate a mapping of options. Raises OptionError for an unknown key or value, naming what exists."""
    known = [f.name for f in fields(Options)]
    for key in given or {}:
        if key not in known:
            raise OptionError(f"there is no option {key!r}{did_you_mean(key, known)}; the options are {', '.join(known)}")
    return Options(**dict(given or {}))
