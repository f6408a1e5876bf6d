"""What a block costs, in formulas and in numbers: for the details of a page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoseq.html_blocks import Block, Fold, Item, Line, Parameter, Row, rows_of
from autoseq.html_drawings import MOST_RANKS
from autoseq.node_traffic import NOTHING_SENT, Sent
from autoseq.planner import SitePlan
from autoseq.planning.choice import Placed
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.timeline import WAYS
from autoseq.runtime.traffic import SILENT, Traffic
from autoseq.strategy_table import formula_text

_SENT_BY = {
    "all_reduce": "2 · (P − 1)/P · the buffer",
    "all_gather": "(P − 1) · a rank's part",
    "reduce_scatter": "(P − 1)/P · the buffer",
    "all_to_all": "all that is addressed to other ranks",
    "send": "the messages themselves",
}


@dataclass(frozen=True, slots=True)
class Formula:
    """A quantity, how it is computed, and what comes out."""

    name: str
    formula: str
    value: str


@dataclass(frozen=True, slots=True)
class Totals:
    """What blocks hold and do, every repetition counted."""

    sent: Sent
    flops_before: int
    flops_after: int
    parameter_bytes: int
    num_parameters: int

    @property
    def step(self) -> Traffic:
        """Messages and bytes of rank 0, forward and backward."""
        return sum(self.sent.step.values(), SILENT)


def totals(items: Sequence[Item]) -> Totals:
    """Of all rows below some items. A parameter that is read twice counts once, those of repeated layers count each."""
    sent, before, after = NOTHING_SENT, 0, 0
    for row, times in rows_of(items):
        for _ in range(times if row.sent.ops else 0):
            sent = sent + row.sent
        before += times * sum(line.product_before.flops for line in row.lines if line.product_before)
        after += times * sum(line.product_after.flops for line in row.lines if line.product_after)
    held = _copies(items).values()
    return Totals(sent, before, after, sum(each.value.num_bytes * copies for each, copies in held), sum(copies for _, copies in held))


def _copies(items: Iterable[Item]) -> dict[str, tuple[Parameter, int]]:
    """Each parameter by name, and in how many repeated layers there is one like it; the same layer called again has no others."""
    found: dict[str, tuple[Parameter, int]] = {}
    for item in items:
        if isinstance(item, Row):
            found |= {each.name: (each, 1) for line in item.lines for each in line.parameters}
            continue
        times = item.copies if isinstance(item, Fold) else 1
        found |= {name: (each, times * copies) for name, (each, copies) in _copies(item.items).items()}
    return found


def item_totals(item: Item) -> Totals:
    """Of one item."""
    return totals([item])


def parameters_of(item: Item) -> list[Parameter]:
    """Those that the operators of an item read."""
    rows = [row for row, _ in rows_of([item])]
    return list({each.name: each for row in rows for line in row.lines for each in line.parameters}.values())


def product_formulas(lines: Sequence[Line]) -> list[Formula]:
    """Of the matrix products among some operators, on one device and on rank 0."""
    return [
        Formula(f"{line.op}, {where}", product.text, readable_flops(product.flops))
        for line in lines for where, product in (("one device", line.product_before), ("rank 0", line.product_after)) if product
    ]  # fmt: skip


def message_formulas(sent: Sent) -> list[Formula]:
    """What rank 0 sends for a row, kind by kind, pass by pass."""
    return [
        Formula(f"{op.replace('_', '-')}, {way}", _SENT_BY.get(op, "what the strategy's formulas say"), message_text(traffic))
        for way, counts in (("forward", sent.forward), ("backward", sent.backward)) for op, traffic in counts.items()
    ]  # fmt: skip


def message_text(traffic: Traffic) -> str:
    """`2,359,296 bytes in 4 messages`."""
    return f"{traffic.bytes:,} bytes in {traffic.messages:,} message{'' if traffic.messages == 1 else 's'}"


def attention_formulas(planned: SitePlan, P: int) -> list[Formula]:
    """The strategy's own formulas for a mask that leaves nothing out, and what they come to with this site's mask."""
    if P == 1:
        return []
    formulas, cost = STRATEGIES[planned.strategy].formulas(), planned.cost
    return [
        Formula(f"{what} sent, {way}", formula_text(formulas[f"{way}_{what}"]), f"{getattr(cost, f'{way}_{what}'):,}")
        for way in WAYS for what in ("bytes", "messages")
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Time:
    """What a strategy is predicted to take for a site: seconds of a step, as a share of the slowest one's, and bytes held.

    `rows` is the layout that suits it best, if that is not the program's.
    """

    strategy: str
    rows: str
    seconds: float
    share: float
    held_bytes: int
    is_chosen: bool


def predicted_times(planned: SitePlan) -> list[Time]:
    """The strategies that could serve a site, each in the layout that suits it best, the fastest first."""
    names = dict.fromkeys(place.offer.strategy for place in planned.places)
    best = [place for name in names if (place := planned.place if name == planned.strategy else planned.best_offer(name)) is not None]
    slowest = max((place.offer.seconds for place in best), default=0.0) or 1.0

    def time(place: Placed) -> Time:
        offer, rows = place.offer, place.layout if place.layout != planned.layout else ""
        held = offer.kept_bytes + offer.buffer_bytes
        return Time(offer.strategy, rows, offer.seconds, offer.seconds / slowest, held, offer.strategy == planned.strategy)

    return sorted(map(time, best), key=lambda each: each.seconds)


def refusals(planned: SitePlan) -> list[tuple[str, str]]:
    """The strategies that could not serve, by their reasons."""
    offered = {place.offer.strategy for place in planned.places}
    names: dict[str, list[str]] = {}
    for name, reason in planned.losers:
        if name not in offered:
            names.setdefault(reason, []).append(name)
    return [(", ".join(of_reason), reason) for reason, of_reason in names.items()]


def symbol_values(planned: SitePlan, P: int) -> list[tuple[str, str]]:
    """The symbols of the strategy's formulas at this site."""
    if P == 1:
        return []
    strategy = STRATEGIES[planned.strategy]
    used = {symbol for formula in strategy.formulas().values() for symbol in formula.free_symbols}
    sizes = strategy.sizes(planned.site.site, P, planned.layout, 0)
    return sorted((str(symbol), f"{size:,}") for symbol, size in sizes.items() if symbol in used)


def work_of_ranks(planned: SitePlan, P: int) -> list[int]:
    """Pairs of a query and a key that each of the first ranks computes in a forward."""
    strategy = STRATEGIES[planned.strategy]
    asked = planned.site.site, P, planned.layout
    return [strategy.work(*asked, rank, "forward").pairs for rank in range(min(P, MOST_RANKS))]


def result_line(item: Item) -> Line | None:
    """The line that makes an item's result."""
    if isinstance(item, Row):
        return item.lines[-1]
    return next((line for inner in reversed(item.items) if (line := result_line(inner)) is not None), None)


def only_row(block: Block) -> Row | None:
    """The row of a block that is nothing but one."""
    return block.items[0] if len(block.items) == 1 and isinstance(block.items[0], Row) and block.items[0].kind == "compute" else None


def op_names(lines: Sequence[Line]) -> str:
    """`reshape · transpose 2× · mul`."""
    counts: dict[str, int] = {}
    for line in lines:
        counts[line.op] = counts.get(line.op, 0) + 1
    return " · ".join(name if count == 1 else f"{name} {count}×" for name, count in counts.items())


def fold_title(folded: Fold) -> str:
    """`layers.0 … layers.3`, or `6 blocks, layers.0 … layers.47` where a period has several."""
    first, last = folded.paths[0], folded.paths[-1]
    names = f"{first} … {last}" if first != last else first
    return f"{folded.period} blocks, {names}" if folded.period > 1 else names


def readable_flops(count: int) -> str:
    """`2.15 TFLOP`."""
    amount = float(count)
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.3g} PFLOP"
