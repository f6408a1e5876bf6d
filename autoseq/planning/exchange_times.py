"""How long the messages of an attention take by themselves: what stays in a node at its rates, what crosses through the node's cards.

Between nodes the ranks of a node share a link, so there the node counts, not the rank: all that its ranks send to other nodes, or get
from there, whichever is more. Who sends what to whom a strategy says exactly (`Strategy.crossings`), be it a ring, of which one rank of
a node crosses, or a halo, of which several do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from autoseq.planning.asked_ranks import asked_ranks
from autoseq.planning.topology import Topology
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategy import Site, Strategy
from autoseq.runtime.timeline import Crossing, MessageKind, Scope, Way


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """What an exchange puts on the link between nodes, of one node: in all, and of its busiest rank, in messages too."""

    sent_bytes: int
    came_bytes: int
    rank_sent_bytes: int
    rank_came_bytes: int
    messages: int

    @staticmethod
    def of(crossings: list[Crossing]) -> NodeLoad:
        """Of all ranks of a node."""
        sent, came = [each.sent_bytes for each in crossings], [each.came_bytes for each in crossings]
        return NodeLoad(sum(sent), sum(came), max(sent), max(came), max(each.messages for each in crossings))


def exchange_seconds(
    strategy: Strategy, site: Site, P: int, layout: Layout, rank: int, topology: Topology, way: Way
) -> dict[str, float]:  # fmt: skip
    """Seconds of each exchange of `rank` by its name, while all ranks do likewise. A collective ends with the slowest that take part."""
    exchanges, own = strategy.exchanges(site, P, layout, rank, way), _seconds_of_rank(strategy, site, P, layout, rank, topology, way)
    collective = {name: each.scope for name, each in exchanges.items() if each.kind != "send"}
    others = {each: _seconds_of_rank(strategy, site, P, layout, each, topology, way) for each in asked_ranks(P)} if collective else {}

    def slowest(name: str, scope: Scope) -> float:
        return max([own[name], *(theirs[name] for other, theirs in others.items() if _takes_part(other, rank, scope, site))])

    return {name: slowest(name, collective[name]) if name in collective else seconds for name, seconds in own.items()}


def _takes_part(other: int, rank: int, scope: Scope, site: Site) -> bool:
    """Whether two ranks of a sequence are in one collective."""
    if scope == "flat":
        return True
    (node, place), (others_node, others_place) = divmod(rank, site.mesh[1]), divmod(other, site.mesh[1])
    return others_node == node if scope == "inside" else others_place == place


@lru_cache(maxsize=4096)
def _seconds_of_rank(
    strategy: Strategy, site: Site, P: int, layout: Layout, rank: int, topology: Topology, way: Way
) -> Mapping[str, float]:  # fmt: skip
    """Of what one rank sends, and its node across the nodes."""
    exchanges, R = strategy.exchanges(site, P, layout, rank, way), topology.ranks_per_node
    if P <= R:
        return {name: topology.seconds(each.kind, each.bytes, each.messages, ranks=P) for name, each in exchanges.items()}
    of_node = _crossings_of_node(strategy, site, P, layout, rank // R, way, R)
    own = of_node[rank % R]
    return {
        name: max(
            topology.seconds(each.kind, max(0, each.bytes - own[name].sent_bytes), own[name].inside_messages, ranks=R),
            crossing_seconds(topology, each.kind, NodeLoad.of([of_rank[name] for of_rank in of_node]), P),
        )
        for name, each in exchanges.items()
    }


@lru_cache(maxsize=1024)
def _crossings_of_node(
    strategy: Strategy, site: Site, P: int, layout: Layout, node: int, way: Way, R: int
) -> tuple[Mapping[str, Crossing], ...]:  # fmt: skip
    """Of each of its ranks, which all ask for the same."""
    return tuple(strategy.crossings(site, P, layout, rank, way, R) for rank in range(node * R, (node + 1) * R))


def crossing_seconds(topology: Topology, kind: MessageKind, load: NodeLoad, ranks: int) -> float:
    """How long the cards of a node take. Collectives use all of them; of point-to-point messages, those of one rank go through one."""
    link = topology.between_nodes(ranks)
    both_ways = link.duplex == "half"
    of_node, of_rank = (
        sent + came if both_ways else max(sent, came)
        for sent, came in ((load.sent_bytes, load.came_bytes), (load.rank_sent_bytes, load.rank_came_bytes))
    )
    of_card = max(of_node / link.lanes, of_rank if kind == "send" else 0)
    rate = link.rate(kind)
    return load.messages * rate.latency_s + of_card / rate.bytes_per_s
