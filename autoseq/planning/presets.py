"""Topologies by name: those that come with autoseq, more or smaller nodes of them, or a file.

    8xH100              a node of eight
    4xH100              a part of it
    2x8xA800-4nic       two nodes of eight, each with four network cards; without -4nic as many as such nodes have in general
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from autoseq.planning.topology import Topology
from autoseq.planning.topology_file import dump, parse_topology
from autoseq.runtime.errors import TopologyError, did_you_mean

_NAME = re.compile(r"(?:(?P<nodes>\d+)x)?(?P<ranks>\d+)x(?P<device>[A-Za-z]\w*)(?:-(?P<lanes>\d+)nic)?")
_MAX_LANES = 8
HERE = "here"
"""The name of the hardware that is found on this machine."""
FORMS = "8xH100, 2x8xH100 for two nodes, 2x8xH100-4nic for four network cards a node, or a JSON file (`autoseq topology show 8xH100`)"


def names() -> list[str]:
    """The nodes that come with autoseq."""
    return [name for name, _ in _texts()]


def load_topology(given: str | os.PathLike[str] | Topology) -> Topology:
    """A topology by name or from a file; one that is given is checked. Raises TopologyError, in one line, if it is none or wrong."""
    if isinstance(given, Topology):
        parse_topology(dump(given), f"topology {given.name!r}")
        return given
    text = os.fspath(given)
    if text == HERE:
        raise TopologyError("topology 'here' is this machine, for `autoseq plan` and `inspect` and the option topology: no file has it")
    if isinstance(given, str) and (parts := _NAME.fullmatch(text)):
        return _preset(text, **parts.groupdict())
    try:
        path = Path(text).expanduser()
        content = path.read_text(encoding="utf-8") if path.suffix == ".json" or path.is_file() else None
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~name, and nobody has that name
        raise TopologyError(f"topology {text!r} cannot be read: {error}") from error
    if content is None:
        raise TopologyError(f"there is no topology {text!r}{did_you_mean(text, names())}; it is {FORMS}")
    return parse_topology(content, text)


@cache
def _texts() -> tuple[tuple[str, str], ...]:
    """The packaged files: name and content, in one order."""
    found = [file for file in files("autoseq.planning").joinpath("topologies").iterdir() if file.name.endswith(".json")]
    return tuple(sorted((file.name.removesuffix(".json"), file.read_text(encoding="utf-8")) for file in found))


def _preset(name: str, nodes: str | None, ranks: str, device: str, lanes: str | None) -> Topology:
    nodes_of = {known.partition("x")[2].lower(): (known, text) for known, text in _texts()}
    if device.lower() not in nodes_of:
        raise TopologyError(f"topology {name!r}: nothing is known of {device}{_which(device)}; there are {', '.join(names())}")
    known, text = nodes_of[device.lower()]
    base = parse_topology(text, f"topologies/{known}.json")
    if not 1 <= int(ranks) <= base.ranks_per_node:
        raise TopologyError(f"topology {name!r}: what is known is a node of {known}, so a node has 1 to {base.ranks_per_node} ranks")
    if nodes is not None and int(nodes) < 1:
        raise TopologyError(f"topology {name!r}: there must be one node or more")
    if lanes is not None and not 1 <= int(lanes) <= _MAX_LANES:
        raise TopologyError(f"topology {name!r}: a node has 1 to {_MAX_LANES} network cards, not {int(lanes)}")
    made = replace(base.cut_into(int(ranks)), name=name, nodes=int(nodes or 1))
    if lanes is not None and made.between is not None:
        source = f"between.lanes: {int(lanes)}, as the name says, whatever else is said below"
        made = replace(made, between=replace(made.between, lanes=int(lanes)), sources=(source, *made.sources))
    return made


def _which(device: str) -> str:
    return did_you_mean(device, [name.partition("x")[2] for name in names()])
