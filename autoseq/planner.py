"""The planner: which strategy each attention site gets, and the layout of the whole graph.

A pure function of data that every rank has alike (sites, group size, options, topology), so every rank reaches the same plan. "auto"
takes, of what is legal and fits in memory, what is predicted to be fastest (`planning/prediction.py`); the losers keep their predicted
seconds and their reasons.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import get_args

from torch import fx

from autoseq.asked_strategies import Asked, asked_strategy
from autoseq.passes.attention_site import is_attention
from autoseq.passes.formula.floats import requires_grad
from autoseq.passes.sizes import hint
from autoseq.planning.asked_ranks import asked_ranks
from autoseq.planning.choice import Offer, Picks, Placed, choose, needed_bytes, smallest, taken, three_digits
from autoseq.planning.prediction import step_seconds
from autoseq.planning.reasons import in_one_plan
from autoseq.planning.topology import Topology
from autoseq.readable import readable_seconds
from autoseq.runtime.errors import StrategyError
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Cost, Site
from autoseq.runtime.timeline import WAYS, Way


@dataclass(frozen=True, slots=True)
class NamedSite:
    """An attention site with the words a report needs: module path (made unique), source line, mask formula; and the passes it takes.

    Of a program that Dynamo traces in several parts, each part has names of its own; `part_name` is the one there.
    """

    name: str
    source: str
    mask: str
    site: Site
    ways: tuple[Way, ...] = WAYS
    part_name: str = ""

    @property
    def run_name(self) -> str:
        """What a run calls it, which compiles each part by itself; two sites of different parts may have the same."""
        return self.part_name or self.name


@dataclass(frozen=True, slots=True)
class SitePlan:
    """The strategy of one site in the layout of its plan, what it sends, and why each other strategy lost."""

    site: NamedSite
    strategy: str
    layout: Layout
    cost: Cost  # of rank 0
    losers: tuple[tuple[str, str], ...]
    offers: tuple[Offer, ...]  # of all that could serve in this layout, the chosen one among them
    elsewhere: tuple[Placed, ...] = ()  # of all that could serve in the layouts and on the meshes that were not taken

    @property
    def places(self) -> tuple[Placed, ...]:
        """All that could serve, in the plan's layout and on its mesh first."""
        return (*(Placed(offer, self.layout, self.site.site.mesh) for offer in self.offers), *self.elsewhere)

    @property
    def place(self) -> Placed:
        """What was chosen, where it is."""
        return Placed(self.offer, self.layout, self.site.site.mesh)

    def best_offer(self, strategy: str) -> Placed | None:
        """The best that a strategy offers in any layout, on any mesh, of equal ones the plan's; None if it could serve in none."""
        asked = (each for each in self.places if each.offer.strategy == strategy)
        return min(asked, key=lambda each: each.offer.worth, default=None)

    @property
    def offer(self) -> Offer:
        """What was chosen takes."""
        return next(offer for offer in self.offers if offer.strategy == self.strategy)

    @property
    def seconds(self) -> float:
        """Predicted for a step, forward and backward."""
        return self.offer.seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """One strategy a site, one layout for the graph, and the topology that they are for."""

    layout: Layout
    sites: tuple[SitePlan, ...]
    topology: str = ""
    refused: tuple[tuple[Layout, str], ...] = ()  # layouts that were not taken, and why

    def strategies(self) -> dict[str, str]:
        return {planned.site.name: planned.strategy for planned in self.sites}

    def step_bytes(self) -> int:
        """What the sites' busiest ranks send in a step."""
        return sum(planned.offer.sent_bytes for planned in self.sites)

    def seconds(self) -> float:
        """Predicted for the attention of a step."""
        return sum(planned.seconds for planned in self.sites)

    def memory_bytes(self) -> int:
        """What the attentions keep for the backward, and the largest buffers."""
        return needed_bytes([planned.offer for planned in self.sites])

    def lines(self, *, seconds: bool = True) -> list[str]:
        """The plan as text: for people, and without predicted seconds, which machines may round differently, for ranks to compare."""
        meshes = {planned.site.site.mesh for planned in self.sites} - {()}
        head = f"layout {self.layout}" + "".join(f", a mesh of {nodes} nodes of {ranks} ranks" for nodes, ranks in meshes)
        total, held = f"{self.seconds():.3g} s of attention a step, " if seconds else "", f"{self.memory_bytes():,} bytes held"
        took = [f", {p.seconds:.3g} s" if seconds else "" for p in self.sites]
        sites = [f"{p.site.name}: {p.strategy}, mask {p.site.mask}, {p.cost}{s}" for p, s in zip(self.sites, took, strict=True)]
        return [head, f"topology {self.topology}", *sites, total + held]

    def reasons(self) -> list[str]:
        """Why other layouts and strategies were not taken; sites that lost them alike are told once."""
        layouts = [f"not layout {layout}: {reason}" for layout, reason in self.refused]
        told = {(p.strategy, p.losers): p.site.name for p in reversed(self.sites)}
        return layouts + [f"{name}: not {lost}: {reason}" for (_, losers), name in reversed(told.items()) for lost, reason in losers]


def find_sites(gm: fx.GraphModule, mesh: tuple[int, ...] = ()) -> list[NamedSite]:
    """The attention sites of a graph, their names made unique in the graph itself. `mesh` is that of `Site`.

    A symbolic length is planned for by the length of this trace; the strategy serves any.
    """
    sites: list[NamedSite] = []
    nodes = [node for node in gm.graph.nodes if is_attention(node)]
    names = _numbered([node.meta["attention"]["name"] for node in nodes])
    for node, name in zip(nodes, names, strict=True):
        words = node.meta["attention"]
        words["name"] = name
        sites.append(NamedSite(name, words["source"], words["mask"], replace(_site(node), mesh=mesh), _ways(node)))
    return sites


def joined_sites(plans: Iterable[Plan]) -> list[SitePlan]:
    """The sites of all parts of a model in one list, their names made unique in it."""
    sites = [planned for plan in plans for planned in plan.sites]
    names = _numbered([planned.site.name for planned in sites])
    named = [replace(planned.site, name=name, part_name=planned.site.run_name) for planned, name in zip(sites, names, strict=True)]
    return [replace(planned, site=site) for planned, site in zip(sites, named, strict=True)]


def _numbered(names: Sequence[str]) -> list[str]:
    """`attn, attn` as `attn, attn#2`; a number that a name has already gives way to the new one."""
    seen, numbered = Counter[str](), list[str]()
    for name in names:
        base = name.partition("#")[0]
        seen[base] += 1
        numbered.append(base if seen[base] == 1 else f"{base}#{seen[base]}")
    return numbered


def _ways(node: fx.Node) -> tuple[Way, ...]:
    """Without a gradient to compute there is no backward to plan for."""
    return WAYS if any(requires_grad(x) for x in node.all_input_nodes) else ("forward",)


def _site(node: fx.Node) -> Site:
    q, k, v = (x.meta["val"] for x in node.args[:3])  # type: ignore[union-attr]
    return Site(
        batch=hint(q.shape[0]), q_len=hint(q.shape[2]), k_len=hint(k.shape[2]), heads=hint(q.shape[1]), kv_heads=hint(k.shape[1]),
        head_dim=hint(q.shape[3]), value_dim=hint(v.shape[3]), element_bytes=q.element_size(),
        max_ahead=node.kwargs["max_ahead"], max_behind=node.kwargs["max_behind"],  # type: ignore[arg-type]
        predicate=str(node.kwargs["predicate"]), score=str(node.kwargs["score"]), learned=_learned(node.args[3]),
        has_sinks=node.args[4] is not None, dropout_p=float(node.kwargs["dropout_p"]), empty_rows=str(node.kwargs["empty_rows"]),
    )  # fmt: skip


def _learned(captures: Sequence[fx.Node]) -> tuple[int, ...]:
    """The captures that get a gradient."""
    return tuple(i for i, capture in enumerate(captures) if requires_grad(capture))


def make_plan(
    sites: Sequence[NamedSite], *, group_size: int, strategy: Asked, layout: str, topology: Topology, reserved_bytes: int = 0
) -> Plan:  # fmt: skip
    """Choose for every site: the fastest step, of equally fast ones what sends fewer bytes, then the first in the registry; and the layout,
    of equally fast ones contiguous rows. Equal are times that are the same in three digits.

    What the attentions hold is to fit beside `reserved_bytes` in the memory of a rank of `topology`; where nothing does, the plan is the
    one that holds least, which `Plan.memory_bytes` tells. Raises StrategyError if the strategy asked for, or every one, cannot serve a
    site, and TopologyError if the topology has no such number of ranks.
    """
    asked_of = [asked_strategy(strategy, named.run_name) for named in sites]
    for named, one in zip(sites, asked_of, strict=True):
        _check_served(named, group_size, one)
    names = [tuple(STRATEGIES) if one == "auto" else (one,) for one in asked_of]
    asked: tuple[Layout, ...] = get_args(Layout) if layout == "auto" and group_size > 1 else ("contiguous",)
    if layout != "auto":
        asked = (layout,)  # type: ignore[assignment]
    hardware, room = topology.at(group_size), topology.memory_bytes - reserved_bytes
    offered = {each: _offers(sites, group_size, names, each, hardware) for each in asked}
    refused = {each: found for each, found in offered.items() if isinstance(found, str)}
    if len(refused) == len(asked):
        raise StrategyError("; or ".join(refused.values()))
    found = [_candidate(each, offers, room) for each, offers in offered.items() if not isinstance(offers, str)]
    best = min(found, key=lambda each: (not each.fits, three_digits(each.seconds) if each.fits else each.held_bytes))
    losing = [each for each in found if each is not best]
    planned = tuple(
        _site_plan(named, best, number, _placed(losing, number, named.site.mesh), group_size, allowed)
        for number, (named, allowed) in enumerate(zip(sites, names, strict=True))
    )
    others = [(each.layout, _layout_lost(each, best)) for each in losing]
    return Plan(best.layout, planned, topology.name, (*refused.items(), *others))


@dataclass(frozen=True, slots=True)
class _Candidate:
    """The best choice in one layout."""

    layout: Layout
    offers: list[list[Offer]]
    picks: Picks
    fits: bool

    @property
    def seconds(self) -> float:
        return sum(offer.seconds for offer in taken(self.offers, self.picks))

    @property
    def held_bytes(self) -> int:
        return needed_bytes(taken(self.offers, self.picks))


def _candidate(layout: Layout, offers: list[list[Offer]], room: float) -> _Candidate:
    picks = choose(offers, room)
    return _Candidate(layout, offers, smallest(offers) if picks is None else picks, picks is not None)


def _check_served(named: NamedSite, P: int, asked: str) -> None:
    """Whatever the layout."""
    refused = {name: s.cannot_serve(named.site, P) for name, s in STRATEGIES.items()}
    if asked != "auto" and refused[asked] is not None:
        able = ", ".join(name for name, reason in refused.items() if reason is None) or "none"
        where = f"the attention at {named.source} ({named.name})"
        raise StrategyError(f"strategy {asked!r} cannot serve {where}: {refused[asked]}. Those that can: {able}")
    if all(reason is not None for reason in refused.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise StrategyError(f"no strategy can serve the attention at {named.source} ({named.name}): {reasons}")


def _offers(
    sites: Sequence[NamedSite], P: int, names: Sequence[tuple[str, ...]], layout: Layout, topology: Topology
) -> list[list[Offer]] | str:  # fmt: skip
    """What the strategies that can serve would take, site by site; or why one site has none. Sites that are alike are asked once.

    `names` are those that may be taken, site by site.
    """
    known: dict[tuple[Site, tuple[Way, ...], tuple[str, ...]], list[Offer]] = {}
    for named, allowed in zip(sites, names, strict=True):
        if (named.site, named.ways, allowed) in known:
            continue
        able = [name for name in allowed if _refusal(named.site, name, P, layout) is None]
        if not able:
            reasons = "; ".join(f"{name}: {_refusal(named.site, name, P, layout)}" for name in allowed)
            return f"layout {layout!r} does not suit the attention at {named.source} ({named.name}): {reasons}"
        known[named.site, named.ways, allowed] = [offer(name, named.site, P, layout, topology, named.ways) for name in able]
    return [known[named.site, named.ways, allowed] for named, allowed in zip(sites, names, strict=True)]


def offer(name: str, site: Site, P: int, layout: Layout, topology: Topology, ways: tuple[Way, ...] = WAYS) -> Offer:
    """What a strategy takes for a site: of its slowest rank, and of the one that holds most. Without a backward nothing is kept for it."""
    return _offer(name, _as_seen(name, site, P), P, layout, topology, ways)


def _as_seen(name: str, site: Site, P: int) -> Site:
    """The site without a mesh, for a strategy that needs none: it is asked once for all meshes."""
    plain = replace(site, mesh=())
    return plain if STRATEGIES[name].cannot_serve(plain, P) is None else site


@lru_cache(maxsize=4096)
def _costs(name: str, site: Site, P: int, layout: Layout, ways: tuple[Way, ...]) -> tuple[Cost, ...]:
    """What the ranks that are asked send, rank 0 first."""
    of_ranks = tuple(STRATEGIES[name].cost(site, P, layout, rank) for rank in asked_ranks(P))
    return of_ranks if ways == WAYS else tuple(replace(cost, backward_bytes=0, backward_messages=0) for cost in of_ranks)


@lru_cache(maxsize=4096)
def _offer(name: str, site: Site, P: int, layout: Layout, topology: Topology, ways: tuple[Way, ...]) -> Offer:
    strategy, ranks = STRATEGIES[name], asked_ranks(P)
    return Offer(
        name,
        float(f"{step_seconds(strategy, site, P, layout, topology, ranks, ways):.6g}"),  # not decided by the order of a sum
        max(strategy.kept_bytes(site, P, layout, rank) for rank in ranks) if ways == WAYS else 0,
        max(strategy.buffer_bytes(site, P, layout, rank, way) for rank in ranks for way in ways),
        max(cost.step_bytes for cost in _costs(name, site, P, layout, ways)),
    )


def _refusal(site: Site, name: str, P: int, layout: Layout) -> str | None:
    strategy = STRATEGIES[name]
    return strategy.cannot_serve(site, P) or strategy.cannot_lay_out(layout)


def _layout_lost(lost: _Candidate, best: _Candidate) -> str:
    seconds = f"{readable_seconds(lost.seconds)} of attention a step, {best.layout} {readable_seconds(best.seconds)}"
    if best.fits and not lost.fits:
        return f"{seconds}; it does not fit"
    if not best.fits:
        return f"{seconds}; neither fits, and it holds {lost.held_bytes - best.held_bytes:,} bytes more"
    if three_digits(lost.seconds) == three_digits(best.seconds):
        return f"{seconds}, which is the same in three digits; {best.layout} is simpler"
    return seconds


def _placed(losing: Sequence[_Candidate], number: int, mesh: tuple[int, ...]) -> list[Placed]:
    """What a site could have had in the layouts that lost."""
    return [Placed(offer, each.layout, mesh) for each in losing for offer in each.offers[number]]


def _site_plan(
    named: NamedSite, taken_in: _Candidate, number: int, elsewhere: Sequence[Placed], P: int, names: Sequence[str]
) -> SitePlan:  # fmt: skip
    layout, offers, site = taken_in.layout, taken_in.offers[number], named.site
    best = offers[taken_in.picks[number]].strategy
    cost, *_ = _costs(best, _as_seen(best, site, P), P, layout, named.ways)
    planned = SitePlan(named, best, layout, cost, (), tuple(offers), tuple(elsewhere))

    def why_not(name: str) -> str:
        found = planned.best_offer(name)
        if found is None:
            return str(_refusal(site, name, P, layout))
        chosen = taken(taken_in.offers, taken_in.picks)
        return in_one_plan(found, planned.place, needed_bytes([*chosen[:number], found.offer, *chosen[number + 1 :]]) - taken_in.held_bytes)

    return replace(planned, losers=tuple((name, why_not(name)) for name in names if name != best))
