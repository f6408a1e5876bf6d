"""Nodes of equally many ranks: the two-level mesh of all ranks, from the option `ranks_per_node`.

The groups across nodes and inside a node belong to torch.distributed, where a tag finds them again: they are made once, by all
ranks in one order, and end with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _find_pg_by_ranks_and_tag, _new_group_with_tag

from autoseq.runtime.errors import OptionError
from autoseq.runtime.groups import SequenceGroup, process_group


def check_nodes(group: SequenceGroup, ranks_per_node: int) -> None:
    """Raises OptionError where a group of several ranks cannot be cut into nodes of so many."""
    if group.size == 1:
        return
    if group.size % ranks_per_node != 0:
        fitting = ", ".join(str(n) for n in range(1, group.size + 1) if group.size % n == 0)
        raise OptionError(
            f"ranks_per_node={ranks_per_node} does not divide the {group.size} ranks of the sequence; nodes are equally large: {fitting}"
        )
    if group.axes:
        nodes, ranks = group.mesh
        raise OptionError(
            f"ranks_per_node={ranks_per_node} and a mesh of {nodes} nodes of {ranks} ranks say the same thing twice: give one of them"
        )
    if group.size != dist.get_world_size():
        raise OptionError(
            f"ranks_per_node cuts all {dist.get_world_size()} ranks into nodes, but the mesh has {group.size} of them. Give a mesh of two "
            f"dimensions instead: init_device_mesh(device, (replicas, nodes, {ranks_per_node}), "
            "mesh_dim_names=('replicas', 'nodes', 'ranks'))['nodes', 'ranks']"
        )


def is_flat(group: SequenceGroup, ranks_per_node: int) -> bool:
    """Whether the nodes make no second level: there is one, or each has one rank."""
    return group.size == 1 or ranks_per_node in (1, group.size)


def on_nodes(group: SequenceGroup, ranks_per_node: int | None, *, agree: Callable[[], object] = lambda: None) -> SequenceGroup:
    """The group with its axes, if nodes are asked for and make a second level. Raises OptionError as `check_nodes` does.

    `agree` is called before they are made, which all ranks have to do.
    """
    if ranks_per_node is None:
        return group
    check_nodes(group, ranks_per_node)
    if is_flat(group, ranks_per_node):
        return group
    found = found_nodes(group, ranks_per_node)
    if found is None:
        agree()
        found = make_nodes(group, ranks_per_node)
    return found


def found_nodes(group: SequenceGroup, ranks_per_node: int) -> SequenceGroup | None:
    """The group with its axes, if they have been made."""
    axes = []
    for tag, parts in _axes(group, ranks_per_node):
        found = _find_pg_by_ranks_and_tag(tag, next(part for part in parts if group.rank in part))
        if found is None:
            return None
        axes.append(found.group_name)
    return replace(group, axes=tuple(axes))


def make_nodes(group: SequenceGroup, ranks_per_node: int) -> SequenceGroup:
    """The group with its axes. All ranks make them, at the same place of the program."""
    axes = []
    for tag, parts in _axes(group, ranks_per_node):
        made = [_new_group_with_tag(part, timeout=_timeout(group), pg_tag=tag, group_desc=tag) for part in parts]
        axes.append(next(made[i].group_name for i, part in enumerate(parts) if group.rank in part))
    return replace(group, axes=tuple(axes))


def _axes(group: SequenceGroup, ranks_per_node: int) -> list[tuple[str, list[list[int]]]]:
    """For each axis its tag and the ranks of its groups: those at the same place of each node, then those of a node."""
    inside = [list(range(first, first + ranks_per_node)) for first in range(0, group.size, ranks_per_node)]
    across = [list(part) for part in zip(*inside, strict=True)]
    return [(f"autoseq, nodes of {ranks_per_node}: {name}", parts) for name, parts in (("across", across), ("inside", inside))]


def _timeout(group: SequenceGroup) -> timedelta | None:
    """That of the group they are cut from, if its backend tells."""
    process = process_group(group.name)
    options = [getattr(process._get_backend(device), "options", None) for device in process._device_types]
    return next((each._timeout for each in options if each is not None), None)
