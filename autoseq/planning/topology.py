"""The hardware a plan is made for: how fast its links and kernels are, how the ranks lie in nodes, how much a rank can hold.

A `Topology` is data, the same on every rank: it comes from a file (`topology_file`), a preset (`presets`), from what torch tells of this
machine (`found`) or from timing it (`measure`). Messages cost latency and bytes by rate (Hockney, "The communication challenge for MPP",
1994), with a rate for each kind of message, because a library does not reach the same share of a link with each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from autoseq.runtime.errors import TopologyError
from autoseq.runtime.timeline import MessageKind, Scope

KINDS: tuple[MessageKind, ...] = get_args(MessageKind)

# Where a file tells nothing of a dtype, the first of these that it does tell of stands in for it.
_STAND_INS = {
    "bfloat16": ("float16", "float32", "float64"),
    "float16": ("bfloat16", "float32", "float64"),
    "float32": ("float64", "bfloat16", "float16"),
    "float64": ("float32", "bfloat16", "float16"),
}
DTYPES = tuple(_STAND_INS)


@dataclass(frozen=True, slots=True)
class Rate:
    """One message takes `latency_s`, and its bytes leave a rank at `bytes_per_s`, the same each way."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Host(Rate):
    """Cores that compute and send: what sending and receiving a message, and its bytes, takes of them, and how many ranks share one.

    Rates of kernels are those while all ranks compute. Where `ranks_per_core` is above 1, those that are done leave their cores to others
    of the `sharing_ranks` that lie beside each other, mostly those of a node.
    """

    ranks_per_core: float = 1.0
    sharing_ranks: int = 1


@dataclass(frozen=True, slots=True)
class Link:
    """How ranks of a node reach each other, or nodes.

    Inside a node the rates are those of one rank while all of them talk. Between nodes they are those of one network card, of which a node
    has `lanes`. On a half-duplex link what arrives takes the same time as what leaves.
    """

    send: Rate
    all_to_all: Rate
    all_gather: Rate
    reduce_scatter: Rate
    all_reduce: Rate
    duplex: Literal["full", "half"] = "full"
    lanes: int = 1

    def rate(self, kind: MessageKind) -> Rate:
        """That of a kind of message."""
        return getattr(self, kind)


@dataclass(frozen=True, slots=True)
class KernelRates:
    """Floating-point operations a second of one rank in one dtype: the vendor's peak, and what kernels reach on long inputs."""

    peak_flops_per_s: float
    matmul_flops_per_s: float
    attention_flops_per_s: float
    attention_backward_flops_per_s: float


@dataclass(frozen=True, slots=True, init=False)
class Kernels(Mapping[str, KernelRates]):
    """Rates by the dtype's name, in the order of DTYPES; unlike a dict it can be hashed and does not change."""

    rates: tuple[tuple[str, KernelRates], ...]

    def __init__(self, rates: Mapping[str, KernelRates]) -> None:
        object.__setattr__(self, "rates", tuple((dtype, rates[dtype]) for dtype in DTYPES if dtype in rates))

    def __getitem__(self, dtype: str) -> KernelRates:
        return dict(self.rates)[dtype]

    def __iter__(self) -> Iterator[str]:
        return (dtype for dtype, _ in self.rates)

    def __len__(self) -> int:
        return len(self.rates)


@dataclass(frozen=True, slots=True)
class Path:
    """One of the ways that messages take at once: their time is messages * latency_s + bytes * s_per_byte."""

    where: Literal["inside", "between"]
    latency_s: float
    s_per_byte: float

    def seconds(self, num_bytes: float, messages: float) -> float:
        return messages * self.latency_s + num_bytes * self.s_per_byte


@dataclass(frozen=True, slots=True)
class Topology:
    """`nodes` nodes of `ranks_per_node` ranks, each rank one device. `between` is None where only one node is known.

    memory_bytes: what one rank's device holds. memory_bytes_per_s: how fast it reads and writes that, both counted.
    launch_s: what each kernel call costs beside its work. sources: where the numbers come from. attention_tile: how many keys past a causal
    diagonal attention kernels leave out at once, for less is not skipped. host: the cores that ranks compute on and send with; None where
    other hardware sends, or other cores.
    """

    name: str
    ranks_per_node: int
    nodes: int
    inside: Link
    between: Link | None
    kernels: Mapping[str, KernelRates]
    memory_bytes: int
    memory_bytes_per_s: float
    launch_s: float
    sources: tuple[str, ...] = ()
    attention_tile: int = 128
    host: Host | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", Kernels(self.kernels))

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self.nodes * self.ranks_per_node

    def at(self, world_size: int) -> Topology:
        """The same hardware with as many nodes as `world_size` ranks take, or a part of one. Raises TopologyError if it does not fit."""
        if world_size < 1:
            raise TopologyError(f"topology {self.name!r}: there must be 1 rank or more, not {world_size}")
        if world_size <= self.ranks_per_node:
            return replace(self, nodes=1, ranks_per_node=world_size)
        self.between_nodes(world_size)
        return replace(self, nodes=world_size // self.ranks_per_node)

    def cut_into(self, ranks_per_node: int) -> Topology:
        """Nodes that are a part of these, each with its share of the network cards, one at least."""
        if self.between is None:
            return replace(self, ranks_per_node=ranks_per_node)
        lanes = max(1, self.between.lanes * ranks_per_node // self.ranks_per_node)
        return replace(self, ranks_per_node=ranks_per_node, between=replace(self.between, lanes=lanes))

    def every(self, P: int) -> Topology:
        """One rank of each P that lie beside each other, while those at the other places do the same: they share what is between nodes.

        P ranks fill whole nodes, or a part of one as others fill the rest.
        """
        together, between = min(P, self.ranks_per_node), self.between
        if between is not None:
            rates = {kind: between.rate(kind) for kind in KINDS}
            between = replace(between, **{kind: replace(rate, bytes_per_s=rate.bytes_per_s / together) for kind, rate in rates.items()})
        ranks_per_node = self.ranks_per_node // together
        return replace(self, ranks_per_node=ranks_per_node, nodes=self.world_size // P // ranks_per_node, between=between)

    def kernel_rates(self, dtype: str) -> KernelRates:
        """Those of a dtype such as "float32", or of the nearest one that the topology tells of."""
        if dtype not in _STAND_INS:
            raise TopologyError(f"topology {self.name!r} knows no dtype {dtype!r}; kernels have rates for {', '.join(DTYPES)}")
        return next(self.kernels[each] for each in (dtype, *_STAND_INS[dtype]) if each in self.kernels)

    def seconds(self, kind: MessageKind, num_bytes: float, messages: float, *, ranks: int) -> float:
        """How long one rank's messages take while each of the sequence's `ranks` ranks, in whole nodes, does likewise.

        `num_bytes` is what one rank sends in all, counted as in `runtime.traffic`. Raises TopologyError as `at` does.
        """
        return max((path.seconds(num_bytes, messages) for path in self.paths(kind, ranks=ranks)), default=0.0)

    def paths(self, kind: MessageKind, *, ranks: int, scope: Scope = "flat") -> tuple[Path, ...]:
        """The ways that one rank's messages take side by side; the slowest decides. None for a rank by itself.

        Whatever the scope, a sequence that fits into one node stays inside it.
        """
        if ranks <= 1:
            return ()
        R = self.ranks_per_node
        if ranks <= R or scope == "inside":
            return (self._path("inside", self.inside, kind, 1.0),)
        between = self.between_nodes(ranks)
        if scope == "across":
            # R ranks share the node's cards; one point-to-point message goes through one card, however many are idle.
            lanes = min(between.lanes, R) if kind == "send" else between.lanes
            return (self._path("between", between, kind, R / lanes),)
        if kind == "send":  # to a neighbour: one rank of a node sends into the next node, through one card
            inside, crossing = 1.0, 1.0
        elif kind == "all_to_all":  # what is addressed to other nodes crosses, from every rank
            crossing = (ranks - R) / (ranks - 1) * R / between.lanes
            inside = (R - 1) / (ranks - 1)
        else:  # a ring over all ranks: its messages enter each node once, on one rank a card
            inside, crossing = 1.0, 1.0 / between.lanes
        paths = self._path("inside", self.inside, kind, inside), self._path("between", between, kind, crossing)
        return paths if R > 1 else paths[1:]

    def _path(self, where: Literal["inside", "between"], link: Link, kind: MessageKind, share: float) -> Path:
        rate = link.rate(kind)
        both_ways = 2.0 if link.duplex == "half" else 1.0
        return Path(where, rate.latency_s, share * both_ways / rate.bytes_per_s)

    def between_nodes(self, ranks: int) -> Link:
        """The link between the nodes of so many ranks, which must be several whole ones."""
        R = self.ranks_per_node
        if self.between is None:
            raise TopologyError(
                f"topology {self.name!r} has one node of {R} ranks and says nothing of a network between nodes, but there are {ranks} "
                "ranks. Give it a 'between' link, or take one that has it: `autoseq topology list`."
            )
        if ranks % R:
            low = ranks // R * R
            nearest = f"the nearest that are: {low} and {low + R}"
            raise TopologyError(f"topology {self.name!r}: {ranks} ranks are not whole nodes of {R}; {nearest}")
        return self.between
