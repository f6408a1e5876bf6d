"""How long a strategy's attention takes on a topology: its phases, each as long as the slowest of what goes on side by side in it.

    seconds of a pass  =  sum over phases of  times · max(share of the work, shares of the messages on each kind of link)

where messages that need the cores of the rank itself, as on CPUs, make the work that they travel under longer, and ranks that share cores
leave them to those with more to do.

Work is matrix products at the kernel's rate, those of pairs that a kernel computes in vain among them, calls of kernels at the launch time,
and masks read, results merged and heads packed in memory at the memory's rate.
What a rank sends and computes is the strategy's to say (`exchanges`, `work`, `phases`), what that takes the topology's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from autoseq.planning.asked_ranks import asked_ranks
from autoseq.planning.exchange_times import exchange_seconds
from autoseq.planning.topology import Topology
from autoseq.runtime.errors import PlanError
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategy import Site, Strategy, accumulator_bytes
from autoseq.runtime.timeline import WAYS, Exchange, Exchanges, Step, Way, flops

Lane = Literal["compute", "inside", "across", "links"]
LANES: dict[str, Lane] = {"inside": "inside", "across": "across", "flat": "links"}
"""Where the messages of a scope show, on several nodes."""

_DTYPES = {1: "bfloat16", 2: "bfloat16", 4: "float32", 8: "float64"}

# A merge reads two numbers and writes one.
_TOUCHED = 3

MOST_SEGMENTS = 4096


@dataclass(frozen=True, slots=True)
class Segment:
    """What keeps a lane busy from `start_s` on, counted from the pass's begin."""

    lane: Lane
    name: str
    start_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class PassTime:
    """One pass of one attention on one rank: `work_s` and `message_s` are what each would take by itself."""

    seconds: float
    work_s: float
    message_s: float
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True)
class _Load:
    """A pass in seconds before anything overlaps: its work, each exchange, and the phases they come in."""

    work_s: float
    exchange_s: Mapping[str, float]
    host_s: Mapping[str, float]
    lanes: Mapping[str, Lane]
    steps: tuple[Step, ...]

    def parts(self, step: Step) -> dict[Lane, float]:
        """How long each lane is busy in a step. Messages of one kind of link share it, and may take a part of the cores besides."""
        busy: dict[Lane, float] = {"compute": step.work * self.work_s}
        for name, share in step.sends:
            busy["compute"] += share * self.host_s[name]
            lane = self.lanes[name]
            busy[lane] = busy.get(lane, 0.0) + share * self.exchange_s[name]
        return busy


def lanes_of(exchanges: Exchanges, *, one_link: bool = False) -> dict[str, Lane]:
    """The lane of each exchange. What goes among all ranks takes every link, so nothing goes beside it; nor where there is `one_link`."""
    shared = one_link or any(exchange.scope == "flat" for exchange in exchanges.values())
    return {name: "links" if shared else LANES[exchange.scope] for name, exchange in exchanges.items()}


def shares_a_link(site: Site, P: int, topology: Topology) -> bool:
    """Whether messages inside a node of the mesh and across may take the same link: in one node, or if the hardware has other nodes."""
    return topology.ranks_per_node >= P or (bool(site.mesh) and topology.ranks_per_node != site.mesh[1])


def dtype_of(site: Site) -> str:
    """The dtype whose rates count where only the size of an element is known: of two 16-bit ones, bfloat16."""
    if site.element_bytes not in _DTYPES:
        sizes = ", ".join(map(str, _DTYPES))
        raise PlanError(
            f"attention on elements of {site.element_bytes} bytes has no predicted time: kernels have rates for real numbers of {sizes} "
            "bytes. Cast q, k and v to one of float64, float32, bfloat16 or float16 before the attention."
        )
    return _DTYPES[site.element_bytes]


def pass_time(
    strategy: Strategy, site: Site, P: int, layout: Layout, rank: int, topology: Topology, way: Way, dtype: str | None = None,
    *, most_segments: int = MOST_SEGMENTS,
) -> PassTime:  # fmt: skip
    """How long one pass takes `rank` of P, and what it is busy with when. `dtype` is `dtype_of(site)` if not given.

    Where that would be more than `most_segments`, the repeats of a phase are one segment of their sum.
    """
    load = _load(strategy, site, P, layout, rank, topology, way, dtype or dtype_of(site))
    return PassTime(_seconds(load), load.work_s, sum(load.exchange_s.values()), tuple(_segments(load, most_segments)))


def pass_seconds(strategy: Strategy, site: Site, P: int, layout: Layout, rank: int, topology: Topology, way: Way) -> float:
    """`pass_time` without the segments."""
    return _seconds(_load(strategy, site, P, layout, rank, topology, way, dtype_of(site)))


def step_seconds(
    strategy: Strategy, site: Site, P: int, layout: Layout, topology: Topology, ranks: Iterable[int], ways: Iterable[Way] = WAYS
) -> float:  # fmt: skip
    """Passes of the slowest of some ranks, each way: attention ends with all of them."""
    asked = list(ranks)
    return sum(max(pass_seconds(strategy, site, P, layout, rank, topology, way) for rank in asked) for way in ways)


def _seconds(load: _Load) -> float:
    return sum(step.times * max(load.parts(step).values()) for step in load.steps)


def _segments(load: _Load, most: int) -> Iterator[Segment]:
    """Phase after phase; of very many, the repeats of a phase are drawn as one."""
    start, total = 0.0, sum(step.times * len(load.parts(step)) for step in load.steps)
    for number, step in enumerate(load.steps):
        parts = load.parts(step)
        repeats = step.times if total <= most else 1
        for _ in range(repeats):
            longest = 0.0
            for lane, seconds in parts.items():
                length = seconds * step.times / repeats
                longest = max(longest, length)
                if length > 0:
                    names = [name for name, share in step.sends if share and load.lanes[name] == lane]
                    yield Segment(lane, " + ".join(names) or f"attention, phase {number + 1}", start, length)
            start += longest


def _load(
    strategy: Strategy, site: Site, P: int, layout: Layout, rank: int, topology: Topology, way: Way, dtype: str
) -> _Load:  # fmt: skip
    exchanges = strategy.exchanges(site, P, layout, rank, way)
    return _Load(
        work_s=_work_seconds(strategy, site, P, layout, rank, topology, way, dtype),
        exchange_s=exchange_seconds(strategy, site, P, layout, rank, topology, way),
        host_s={name: host_seconds(exchange, topology) for name, exchange in exchanges.items()},
        lanes=lanes_of(exchanges, one_link=shares_a_link(site, P, topology)),
        steps=strategy.steps(site, P, layout, rank, way),
    )


def host_seconds(exchange: Exchange, topology: Topology) -> float:
    """What an exchange takes of the cores that a rank computes on."""
    return 0.0 if topology.host is None else exchange.messages * topology.host.latency_s + exchange.bytes / topology.host.bytes_per_s


def _work_seconds(
    strategy: Strategy, site: Site, P: int, layout: Layout, rank: int, topology: Topology, way: Way, dtype: str
) -> float:  # fmt: skip
    """A rank with more work than those it shares cores with has one for itself in the end; before, all of them share what there are."""
    own = _work_among_all(strategy, site, P, layout, rank, topology, way, dtype)
    if topology.host is None or topology.host.ranks_per_core == 1:
        return own
    M = topology.host.sharing_ranks
    first = rank // M * M
    asked = [first + each for each in asked_ranks(min(M, P - first))]
    of_ranks = [_work_among_all(strategy, site, P, layout, each, topology, way, dtype) for each in asked]
    return min(own, max(sum(of_ranks) / len(of_ranks), own / topology.host.ranks_per_core))


@lru_cache(maxsize=4096)
def _work_among_all(
    strategy: Strategy, site: Site, P: int, layout: Layout, rank: int, topology: Topology, way: Way, dtype: str
) -> float:  # fmt: skip
    """While all ranks compute."""
    work, rates = strategy.work(site, P, layout, rank, way), topology.kernel_rates(dtype)
    rate = rates.attention_flops_per_s if way == "forward" else rates.attention_backward_flops_per_s
    # Each head reads the number that a mask adds to its score.
    touched_bytes = (_TOUCHED * work.merged_elements + work.masked_pairs) * accumulator_bytes(site) + 2 * work.packed_bytes
    in_kernels = flops(work.computed_pairs(topology.attention_tile), site.head_dim, site.value_dim, way) / rate
    return in_kernels + work.launches * topology.launch_s + touched_bytes / topology.memory_bytes_per_s
