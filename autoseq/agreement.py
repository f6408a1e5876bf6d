"""Ranks agree, or fail together: the same hardware, program and plan at compile time, the same inputs at the first call.

A rank that compiled another graph would not give a wrong number but a hang, in the middle of a collective. So ranks compare
fingerprints through the store, which cannot hang, before anything is sent.
"""

import hashlib
import itertools
import json
import logging
import weakref
import zlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from autoseq.apart import apart
from autoseq.given_differently import EQUAL_BATCHES, parameter_tolerance
from autoseq.given_inputs import EVERY_VARIABLE, check_every
from autoseq.meetings import meet
from autoseq.planning.topology import Topology
from autoseq.planning.topology_file import dump, parse_topology
from autoseq.random_state import Draws, random_state
from autoseq.runtime.errors import AutoSeqError, RankMismatchError, RendezvousError
from autoseq.runtime.fingerprint import compressed, exact, far_apart
from autoseq.runtime.groups import SequenceGroup, process_group
from autoseq.runtime.rendezvous import timeout_s
from autoseq.seen_weights import whole_sketch

log = logging.getLogger("autoseq")

COMPILE_TIMEOUT_VARIABLE = "AUTOSEQ_COMPILE_TIMEOUT_S"
COMPILE_TIMEOUT_S = 600.0

# What rank 0 of a group found. It stays when ranks disagree later: hardware does not change.
_topologies: weakref.WeakKeyDictionary[dist.ProcessGroup, Topology] = weakref.WeakKeyDictionary()


def _meet_after_compiling(group: SequenceGroup, purpose: str, payload: bytes) -> list[bytes]:
    try:
        return meet(group, purpose, payload, timeout_s(COMPILE_TIMEOUT_VARIABLE, COMPILE_TIMEOUT_S))
    except RendezvousError as error:
        raise RendezvousError(f"{error} {COMPILE_TIMEOUT_VARIABLE} sets how many seconds ranks wait for each other's compilers.") from error


def agree_on_program(group: SequenceGroup, lines: Sequence[str], failure: AutoSeqError | None, *, may_change: bool = False) -> str | None:
    """Compare this rank's program (its text, line by line) with the others'; raise on all ranks if any differs or failed.

    Returns the program's digest; or None, on all ranks, where programs differ and every rank says that its own `may_change` before they
    are compared again.
    """
    if group.size == 1:
        return ""
    text = "\n".join(lines)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    told = None if failure is None else f"{type(failure).__name__}: {failure}"
    mine = {"digest": digest, "failure": told, "may_change": may_change}
    theirs = [json.loads(reply) for reply in _meet_after_compiling(group, "compiles a program", json.dumps(mine).encode())]
    failed = {rank: reply["failure"] for rank, reply in enumerate(theirs) if reply["failure"]}
    if failure is not None:
        return digest  # the caller raises its own, which says more
    if failed:
        rank, message = next(iter(failed.items()))
        raise RankMismatchError(f"rank {rank} of group {group.name!r} could not compile the program: {message}")
    if len({reply["digest"] for reply in theirs}) == 1:
        return digest
    if all(reply["may_change"] for reply in theirs):
        return None
    texts = [zlib.decompress(t).decode() for t in _meet_after_compiling(group, "shows its program", zlib.compress(text.encode()))]
    raise RankMismatchError(_first_difference(group, texts))


def agree_on_topology(group: SequenceGroup, find: Callable[[], Topology]) -> Topology | None:
    """The hardware that rank 0 finds, for all ranks, whose machines may differ a little; they meet for it once.

    None where each rank is to find its own: it is alone, or rank 0 finds none, which fails again where the others hear of it.
    """
    if group.size == 1:
        return None
    process = process_group(group.name)
    if process not in _topologies:
        mine = _found(find) if group.rank == 0 else b""
        text = _meet_after_compiling(group, "compiles its first program without the option 'topology'", mine)[0].decode()
        if not text:
            return None
        _topologies[process] = parse_topology(text, "the hardware that rank 0 found")
    return _topologies[process]


def _found(find: Callable[[], Topology]) -> bytes:
    try:
        return dump(find()).encode()
    except Exception as error:  # noqa: BLE001 (the other ranks wait for an answer, whatever it is)
        log.warning("this rank's hardware could not be told to the others: %s: %s", type(error).__name__, error)
        return b""


def _first_difference(group: SequenceGroup, texts: Sequence[str]) -> str:
    for other in range(1, len(texts)):
        for ours, their in itertools.zip_longest(texts[0].splitlines(), texts[other].splitlines(), fillvalue="(nothing)"):
            if ours != their:
                return (
                    f"ranks 0 and {other} of group {group.name!r} compiled different programs. First difference:\n"
                    f"  rank 0: {ours.strip()}\n  rank {other}: {their.strip()}\n"
                    "Every rank must build the same model, pass the same options and call it with inputs of the same shape."
                )
    return f"ranks of group {group.name!r} compiled different programs"


def agree_on_inputs(group: SequenceGroup, names: Sequence[str], values: Sequence[object], *, draws: Draws) -> None:
    """Compare the fingerprints of all inputs, parameters too; raise RankMismatchError naming the first that differs.

    For a program that draws random numbers the generators' states count too: a value drawn on every rank must be the same.
    """
    if group.size == 1:
        return
    with apart():
        mine = {name: _fingerprint(value) for name, value in zip(names, values, strict=True)}
        if draws:
            mine["torch's random state (call torch.manual_seed alike on every rank)"] = repr(random_state(draws)), []
    mine[f"the environment variable {EVERY_VARIABLE}"] = str(check_every()), []
    replies = _meet_after_compiling(group, "calls a program for the first time", json.dumps(mine).encode())
    theirs = [json.loads(reply) for reply in replies]
    dtypes = {name: value.dtype for name, value in zip(names, values, strict=True) if isinstance(value, torch.Tensor)}
    for name in mine:
        tolerance = parameter_tolerance(dtypes.get(name, torch.float32))
        for rank, other in enumerate(theirs):
            (kind, sketch), (first_kind, first_sketch) = other[name], theirs[0][name]
            if kind != first_kind or (sketch and far_apart([first_sketch, sketch], tolerance)):
                raise RankMismatchError(
                    f"ranks 0 and {rank} of group {group.name!r} called the model with different values of {name}. {EQUAL_BATCHES}"
                )


def _fingerprint(value: object) -> tuple[str, list[float]]:
    """What must be the same on all ranks, and what may differ by rounding. The values of sharded tensors are not known here."""
    if not isinstance(value, torch.Tensor):
        return repr(value), []
    kind = f"{value.dtype} {tuple(value.shape)}"
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return kind, []
    if value.is_floating_point() or value.is_complex():
        return kind, whole_sketch(compressed(value.detach())).tolist()
    return f"{kind} {int(exact([value])[0])}", []
