"""One HTML file that shows what autoseq makes of a model: for `autoseq inspect --html`.

The file needs nothing but itself: no request leaves it, and its own content security policy forbids any. All text that comes from
the model (names, source lines, masks) is escaped by the template, and only the one script whose hash the policy names may run.
"""

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jinja2
from markupsafe import Markup
from torch import nn

from autoseq import html_costs as costs
from autoseq.html_blocks import Block, Fold, Item, Picture, Row, rows_of, shown_source
from autoseq.html_drawings import (
    MOST_RANKS,
    Drawing,
    mask_drawing,
    message_drawing,
    messages,
    placement_drawing,
    placements,
    share_of_work,
    splits_heads,
)
from autoseq.html_folding import fold
from autoseq.html_timeline import Busy, busy, timeline_drawing
from autoseq.html_tree import picture
from autoseq.inspection import Inspection, Made, inspected, topology_of, why_whole, with_programs
from autoseq.node_traffic import NodeTraffic, node_traffic
from autoseq.options import Options
from autoseq.passes.sizes import num_bytes
from autoseq.planner import SitePlan
from autoseq.planning.model_cost import model_cost
from autoseq.program import Program
from autoseq.readable import readable_bytes, readable_seconds
from autoseq.runtime.errors import NoAttentionError
from autoseq.runtime.layout import local_length
from autoseq.runtime.strategies import STRATEGIES
from autoseq.step_timeline import Timeline, step_timeline
from autoseq.strategy_table import LEGEND, summary

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Pictured:
    """An inspection, its programs as blocks, and a step of them on the clock."""

    inspection: Inspection
    pictures: tuple[Picture, ...]
    timeline: Timeline


def inspect_pictures(make: Callable[[], Made], *, seq_len: int, world_size: int, options: Options) -> Pictured:
    """`inspect_model`, with pictures. Raises the same."""

    def look(programs: Sequence[Program]) -> Pictured:
        if not any(program.plan.sites for program in programs):
            raise NoAttentionError(f"there is nothing to draw: every rank runs the whole model, because {why_whole(programs)}")
        traffic = [node_traffic(program, world_size) for program in programs]
        topology = topology_of(options, world_size)
        timeline = step_timeline(programs, traffic, model_cost(programs, world_size=world_size), topology, world_size)
        return Pictured(inspected(programs, seq_len, world_size, topology), _pictures(programs, traffic), timeline)

    return with_programs(make, look, world_size=world_size, options=options)


def _pictures(programs: Sequence[Program], traffic: Sequence[NodeTraffic]) -> tuple[Picture, ...]:
    """One for all calls of a part of a model that send as much."""
    calls: dict[object, list[int]] = {}
    for number, program in enumerate(programs):
        calls.setdefault((id(program.gm), program.gathered), []).append(number)
    drawn = [(picture(programs[first], traffic[first]), 1 + len(others)) for first, *others in calls.values()]
    return tuple(Picture(fold(each.items), each.gradients, times) for each, times in drawn)


def html_page(found: Pictured, target: str) -> str:
    """The page as text, without anything outside it."""
    environment = _environment()
    style, script = ((_TEMPLATES / name).read_text("utf-8") for name in ("inspect.css", "inspect.js"))
    page = _Page(found, target)
    return environment.get_template("inspect.html.j2").render(
        page=page, costs=costs, style=Markup(style), script=Markup(script), style_hash=_hash(style), script_hash=_hash(script)
    )  # fmt: skip


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters.update(bytes=readable_bytes, number="{:,}".format, flops=costs.readable_flops, seconds=readable_seconds)
    made.tests.update(block=lambda x: isinstance(x, Block), fold=lambda x: isinstance(x, Fold), row=lambda x: isinstance(x, Row))
    return made


def _hash(text: str) -> str:
    """A source of a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@dataclass(frozen=True, slots=True)
class Figure:
    """A number at the head of the page."""

    name: str
    value: str
    note: str


class _Page:
    """What the template asks for."""

    def __init__(self, found: Pictured, target: str) -> None:
        self.found, self.target = found, target
        self.inspection = found.inspection
        self.pictures = found.pictures
        self.P, self.seq_len = found.inspection.world_size, found.inspection.sequence_length
        self._plan = next(program.plan for program in found.inspection.programs if program.plan.sites)
        self.layout = self._plan.layout  # of the first part that is split; the figure names all
        self.most_ranks = MOST_RANKS
        self.strategy_legend = LEGEND

    @property
    def drawings(self) -> list[Drawing]:
        """Those that rows refer to."""
        return [*placements(self.P, self.layout), *messages(self.P)]

    @property
    def figures(self) -> list[Figure]:
        sent = list(self.inspection.collectives.values())
        before = max((value for value in map(_largest_before, self.inspection.programs)), default=0)
        owned = {id(x): x for program in self.inspection.programs for x in program.owned if isinstance(x, nn.Parameter)}
        parameters = sum(map(num_bytes, owned.values()))
        fallbacks = len(self.inspection.fallbacks)
        return [
            Figure("ranks", f"{self.P:,}", f"layout {self.inspection.layout}"),
            Figure("tokens a rank", f"{local_length(self.seq_len, self.P, self.layout):,}", f"of {self.seq_len:,}"),
            Figure("sent in a step", readable_bytes(sum(m.bytes for m in sent)), f"{sum(m.messages for m in sent):,} messages of rank 0"),
            Figure(
                "largest intermediate", readable_bytes(self.inspection.largest_intermediate.num_bytes),
                f"{readable_bytes(before)} on one device",
            ),
            Figure("attention, predicted", readable_seconds(sum(p.plan.seconds() for p in self.inspection.programs)), self.topology),
            Figure("parameters", readable_bytes(parameters), "on every rank"),
            Figure("fallbacks", f"{fallbacks:,}", "steps on gathered values" if fallbacks else "nothing is gathered whole"),
        ]  # fmt: skip

    @property
    def topology(self) -> str:
        """What the plan is for."""
        return f"a step on {self._plan.topology}" if self._plan.topology else "a step"

    @property
    def sites(self) -> list[tuple[Row, int]]:
        """The attention rows, and how often each comes."""
        return [(row, times * each.times) for each in self.pictures for row, times in rows_of(each.items) if row.site is not None]

    @property
    def timeline(self) -> Drawing:
        return timeline_drawing(self.found.timeline)

    @property
    def busy(self) -> list[Busy]:
        return busy(self.found.timeline)

    def mask(self, planned: SitePlan, by_rank: bool) -> Drawing:
        return mask_drawing(planned.site.site, self.P, planned.layout, by_rank and not splits_heads(planned.strategy))

    def work(self, planned: SitePlan) -> list[tuple[int, float]]:
        work = costs.work_of_ranks(planned, self.P)
        return list(zip(work, share_of_work(work), strict=True))

    def attention_formulas(self, planned: SitePlan) -> list[costs.Formula]:
        return costs.attention_formulas(planned, self.P)

    def symbols(self, planned: SitePlan) -> list[tuple[str, str]]:
        return costs.symbol_values(planned, self.P)

    def summary(self, strategy: str) -> str:
        return summary(STRATEGIES[strategy])

    def is_open(self, item: Item, depth: int) -> bool:
        """Whether a block starts unfolded: all of a small model, the outer levels of a large one."""
        return depth < 1 or sum(1 for each in self.pictures for _ in rows_of(each.items)) < _MANY_ROWS

    placement_drawing = staticmethod(placement_drawing)
    message_drawing = staticmethod(message_drawing)
    source = staticmethod(shown_source)


_MANY_ROWS = 160


def _largest_before(program: Program) -> int:
    values = [node.meta.get("val") for node in program.before.nodes if node.op == "call_function"]
    return max((num_bytes(val) for val in values if hasattr(val, "element_size")), default=0)

