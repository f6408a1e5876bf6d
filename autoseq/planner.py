"""The planner: which strategy each attention site gets, and the layout of the whole graph.

A pure function of data that every rank has alike (sites, group size, options), so every rank reaches the same plan. For
now "auto" takes what is legal and balanced and whose busiest rank sends the fewest bytes in a training step; the losers keep
their reasons.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from torch import fx

from autoseq.passes.attention_site import is_attention
from autoseq.passes.formula.floats import requires_grad
from autoseq.passes.sizes import hint
from autoseq.runtime.errors import StrategyError
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Cost, Site

_ASKED = 16  # ranks whose cost is computed


@dataclass(frozen=True, slots=True)
class NamedSite:
    """An attention site with the words a report needs: module path (made unique), source line, mask formula."""

    name: str
    source: str
    mask: str
    site: Site


@dataclass(frozen=True, slots=True)
class SitePlan:
    """The strategy of one site, what it sends, and why each other strategy lost."""

    site: NamedSite
    strategy: str
    cost: Cost  # of rank 0
    busiest_bytes: int  # what the rank sends in a step that sends most
    losers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """One strategy a site, one layout for the graph."""

    layout: Layout
    sites: tuple[SitePlan, ...]

    def strategies(self) -> dict[str, str]:
        return {planned.site.name: planned.strategy for planned in self.sites}

    def step_bytes(self) -> int:
        """What the sites' busiest ranks send in a step."""
        return sum(planned.busiest_bytes for planned in self.sites)

    def lines(self) -> list[str]:
        """The plan as text: for people, and for ranks to compare."""
        meshes = {planned.site.site.mesh for planned in self.sites} - {()}
        head = f"layout {self.layout}" + "".join(f", a mesh of {nodes} nodes of {ranks} ranks" for nodes, ranks in meshes)
        return [head, *(f"{p.site.name}: {p.strategy}, mask {p.site.mask}, {p.cost}" for p in self.sites)]


def find_sites(gm: fx.GraphModule, mesh: tuple[int, ...] = ()) -> list[NamedSite]:
    """The attention sites of a graph, their names made unique in the graph itself. `mesh` is that of `Site`.

    A symbolic length is planned for by the length of this trace; the strategy serves any.
    """
    sites: list[NamedSite] = []
    seen: dict[str, int] = {}
    for node in gm.graph.nodes:
        if not is_attention(node):
            continue
        words = node.meta["attention"]
        count = seen[words["name"]] = seen.get(words["name"], 0) + 1
        if count > 1:
            words["name"] = f"{words['name']}#{count}"
        sites.append(NamedSite(words["name"], words["source"], words["mask"], replace(_site(node), mesh=mesh)))
    return sites


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


def make_plan(sites: Sequence[NamedSite], *, group_size: int, strategy: str, layout: str) -> Plan:
    """Choose for every site. Raises StrategyError if the one asked for, or every one, cannot serve a site.

    "auto" takes the layout with which the graph sends the fewest bytes, contiguous where both send as many, and does not count what
    leaves causal work unbalanced. A layout that is asked for is taken as it is.
    """
    for named in sites:
        _check_served(named, group_size, strategy)
    names = list(STRATEGIES) if strategy == "auto" else [strategy]
    asked: tuple[Layout, ...] = get_args(Layout) if layout == "auto" and group_size > 1 else ("contiguous",)
    if layout != "auto":
        asked = (layout,)  # type: ignore[assignment]
    # A strategy that balances no layout it takes is better than none.
    for must_balance in (layout == "auto" and group_size > 1, False):
        plans = [_plan(sites, group_size, names, each, must_balance) for each in asked]
        if served := [plan for plan in plans if isinstance(plan, Plan)]:
            return min(served, key=Plan.step_bytes)
    raise StrategyError("; or ".join(str(refusal) for refusal in plans))


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


def _plan(sites: Sequence[NamedSite], P: int, names: Sequence[str], layout: Layout, must_balance: bool) -> Plan | str:
    """The plan for a layout, or why there is none."""
    chosen = []
    for named in sites:
        refused = {name: _refusal(named.site, name, P, layout, must_balance) for name in STRATEGIES}
        able = [name for name in names if refused[name] is None]
        if not able:
            reasons = "; ".join(f"{name}: {refused[name]}" for name in names)
            return f"layout {layout!r} does not suit the attention at {named.source} ({named.name}): {reasons}"
        chosen.append(_cheapest(named, P, layout, able, refused if len(names) > 1 else {}))
    return Plan(layout, tuple(chosen))


def _refusal(site: Site, name: str, P: int, layout: Layout, must_balance: bool) -> str | None:
    strategy = STRATEGIES[name]
    reason = strategy.cannot_serve(site, P) or strategy.cannot_lay_out(layout)
    if reason is None and must_balance and layout == "contiguous" and strategy.balanced_by_zigzag and _is_causal(site):
        return "its causal work is uneven on contiguous rows"
    return reason


def _is_causal(site: Site) -> bool:
    return site.max_ahead == 0 and site.max_behind is None


def _cheapest(named: NamedSite, P: int, layout: Layout, able: Sequence[str], refused: Mapping[str, str | None]) -> SitePlan:
    """The strategy whose busiest rank sends the fewest bytes; of several the first in the registry."""
    sent = {name: max(STRATEGIES[name].cost(named.site, P, layout, rank).step_bytes for rank in _some_ranks(P)) for name in able}
    best = min(able, key=lambda name: sent[name])
    losers = tuple(
        (name, reason or f"its busiest rank sends {sent[name]:,} bytes a step, that of {best} {sent[best]:,}")
        for name, reason in refused.items()
        if name != best
    )
    return SitePlan(named, best, STRATEGIES[best].cost(named.site, P, layout), sent[best], losers)


def _some_ranks(P: int) -> list[int]:
    """All ranks, or of many the first, the last and some between."""
    return sorted({round(i * (P - 1) / (_ASKED - 1)) for i in range(_ASKED)}) if P > _ASKED else list(range(P))
