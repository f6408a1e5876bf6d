"""The planner: which strategy each attention site gets, and the layout of the whole graph.

A pure function of data that every rank has alike (sites, group size, options), so every rank reaches the same plan. For
now "auto" takes the legal strategy that sends the fewest bytes for a training step; the losers keep their reasons.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from autoseq.passes.attention_site import is_attention
from autoseq.passes.formula.floats import requires_grad
from autoseq.passes.sizes import hint
from autoseq.runtime.errors import StrategyError
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Cost, Site

_ROTATES = ("ring", "gather_kv")  # work per rank follows the rows it holds, so a causal mask wants zigzag


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
    cost: Cost
    losers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """One strategy a site, one layout for the graph."""

    layout: Layout
    sites: tuple[SitePlan, ...]

    def strategies(self) -> dict[str, str]:
        return {planned.site.name: planned.strategy for planned in self.sites}

    def lines(self) -> list[str]:
        """The plan as text: for people, and for ranks to compare."""
        head = f"layout {self.layout}"
        return [head, *(f"{p.site.name}: {p.strategy}, mask {p.site.mask}, {p.cost}" for p in self.sites)]


def find_sites(gm: fx.GraphModule) -> list[NamedSite]:
    """The attention sites of a graph, their names made unique in the graph itself.

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
        sites.append(NamedSite(words["name"], words["source"], words["mask"], _site(node)))
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
    """Choose for every site. Raises StrategyError if the one asked for, or every one, cannot serve a site."""
    chosen = [_choose(named, group_size, strategy) for named in sites]
    chosen_layout: Layout = "contiguous"
    if layout == "zigzag" or (layout == "auto" and group_size > 1 and any(_wants_zigzag(named, name) for named, name, _ in chosen)):
        chosen_layout = "zigzag"
    plans = [
        SitePlan(named, name, STRATEGIES[name].cost(named.site, group_size, chosen_layout), losers) for named, name, losers in chosen
    ]
    return Plan(chosen_layout, tuple(plans))


def _wants_zigzag(named: NamedSite, strategy: str) -> bool:
    return strategy in _ROTATES and named.site.max_ahead == 0 and named.site.max_behind is None


def _choose(named: NamedSite, P: int, asked: str) -> tuple[NamedSite, str, tuple[tuple[str, str], ...]]:
    refused = {name: s.cannot_serve(named.site, P) for name, s in STRATEGIES.items()}
    if asked != "auto":
        if refused[asked] is not None:
            raise StrategyError(f"strategy {asked!r} cannot serve the attention at {named.source} ({named.name}): {refused[asked]}")
        return named, asked, ()
    sent = {name: _step_bytes(named.site, name, P) for name, reason in refused.items() if reason is None}
    if not sent:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise StrategyError(f"no strategy can serve the attention at {named.source} ({named.name}): {reasons}")
    best = min(sent, key=lambda name: (sent[name], list(STRATEGIES).index(name)))
    losers = tuple(
        (name, reason or f"sends {sent[name]:,} bytes a step, {best} {sent[best]:,}") for name, reason in refused.items() if name != best
    )
    return named, best, losers


def _step_bytes(site: Site, name: str, P: int) -> int:
    cost = STRATEGIES[name].cost(site, P, "contiguous")
    return cost.forward_bytes + cost.backward_bytes
