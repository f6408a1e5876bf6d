"""How good predictions were: medians, ratios within rounds, orders of pairs, and the choice against the fastest.

Two candidates differ where the median of their ratios within rounds is beyond `CLEARLY`; only there is the predicted order held to it.
The choice is good if it takes at most `GOOD` times what the candidate with the least median takes, as a median of ratios too. Of pairs
that were predicted the other way round it is also told how many differ the same way in nearly every round (`STEADILY`).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from plan_cases import Candidate, Place, slowest_rank
from work import Work

CLEARLY = 1.2
GOOD = 1.1
STEADILY = 0.8


@dataclass(frozen=True, slots=True)
class Outcome:
    """One candidate: what was predicted, in parts, and what was measured. Forward and backward count by their slowest rank each."""

    candidate: Candidate
    predicted_s: float
    parts_s: dict[str, float]  # of the prediction: each way in all, work alone, messages alone
    rounds_s: tuple[float, ...]
    forward_s: float  # measured, the median

    @property
    def name(self) -> str:
        return f"{self.candidate.strategy}, {self.candidate.layout}"

    @property
    def measured_s(self) -> float:
        return statistics.median(self.rounds_s)

    def times(self, other: Outcome) -> float:
        """How many times as long as another one it takes."""
        return statistics.median(a / b for a, b in zip(self.rounds_s, other.rounds_s, strict=True))

    def share_slower_than(self, other: Outcome) -> float:
        """In what share of rounds it took longer than another one."""
        return statistics.mean(a > b for a, b in zip(self.rounds_s, other.rounds_s, strict=True))


@dataclass(frozen=True, slots=True)
class Pair:
    """Two candidates that clearly differ."""

    faster: str
    slower: str
    measured: float  # slower ÷ faster
    predicted: float
    rounds: float  # the share of those in which the slower one took longer

    @property
    def agrees(self) -> bool:
        return self.predicted > 1

    @property
    def is_steady(self) -> bool:
        return self.rounds >= STEADILY


@dataclass(frozen=True)
class Judged:
    """One attention in one place."""

    place: Place
    attention: str
    work: Work
    chosen: Candidate
    outcomes: tuple[Outcome, ...]  # as predicted, fastest first
    why_not: dict[str, str]

    @property
    def choice(self) -> Outcome:
        return next(outcome for outcome in self.outcomes if outcome.candidate == self.chosen)

    @property
    def fastest(self) -> Outcome:
        return min(self.outcomes, key=lambda outcome: outcome.measured_s)

    @property
    def over_fastest(self) -> float:
        """1 if the choice is the fastest; a median of ratios may also say less."""
        return self.choice.times(self.fastest)

    @property
    def is_good(self) -> bool:
        return self.over_fastest <= GOOD

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Those that differ, faster first."""
        found = []
        for one, other in itertools.combinations(self.outcomes, 2):
            for faster, slower in ((one, other), (other, one)):
                if (ratio := slower.times(faster)) > CLEARLY:
                    predicted = slower.predicted_s / faster.predicted_s
                    found.append(Pair(faster.name, slower.name, ratio, predicted, slower.share_slower_than(faster)))
        return tuple(found)

    def as_json(self) -> dict[str, Any]:
        verdict = {"over_fastest": self.over_fastest, "is_good": self.is_good, "fastest": asdict(self.fastest.candidate)}
        pairs = [asdict(pair) | {"agrees": pair.agrees} for pair in self.pairs]
        outcomes = [asdict(outcome) | {"measured_s": outcome.measured_s} for outcome in self.outcomes]
        head = {"attention": self.attention, "work": asdict(self.work), "chosen": asdict(self.chosen), **verdict}
        return {**head, "outcomes": outcomes, "differing_pairs": pairs, "why_not": self.why_not}


def judge(place: Place, named: Sequence[tuple[str, Work]], per_rank: Sequence[dict[str, Any]]) -> list[Judged]:
    """What the ranks of a place returned (`plan_cases.run_place`), attention by attention."""
    of_works = zip(*(rank["works"] for rank in per_rank), strict=True)
    return [_judged(place, name, work, records) for (name, work), records in zip(named, of_works, strict=True)]


def _judged(place: Place, attention: str, work: Work, per_rank: Sequence[dict[str, Any]]) -> Judged:
    first = per_rank[0]
    outcomes = [_outcome(records) for records in zip(*(rank["candidates"] for rank in per_rank), strict=True)]
    outcomes.sort(key=lambda outcome: outcome.predicted_s)
    return Judged(place, attention, work, Candidate(**first["chosen"]), tuple(outcomes), first["why_not"])


def _outcome(records: Sequence[dict[str, Any]]) -> Outcome:
    first = records[0]
    rounds = slowest_rank([record["seconds"] for record in records])
    parts = {key: value for key, value in first.items() if key.startswith(("forward", "backward"))}
    return Outcome(
        Candidate(first["strategy"], first["layout"]), first["predicted_s"], parts,
        tuple(step for step, _ in rounds), statistics.median(forward for _, forward in rounds),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts over attentions, and how far times were from predictions."""

    attentions: int
    good: int
    worst_over_fastest: float
    differing_pairs: int
    agreeing: int
    steadily_disagreeing: int
    typical_error: float  # the geometric mean of measured ÷ predicted or its inverse

    def line(self) -> str:
        return (
            f"{self.good} of {self.attentions} choices are the fastest measured or within {GOOD - 1:.0%} of it (at worst "
            f"{self.worst_over_fastest:.2f}×); the predicted order is right for {self.agreeing} of {self.differing_pairs} pairs whose "
            f"times differ by over {CLEARLY - 1:.0%} ({self.steadily_disagreeing} of the others differ so in {STEADILY:.0%} of rounds); "
            f"a step takes {self.typical_error:.2f}× more or less than predicted, typically"
        )


def summary(found: Sequence[Judged]) -> Summary:
    pairs = [pair for each in found for pair in each.pairs]
    errors = [abs(math.log(outcome.measured_s / outcome.predicted_s)) for each in found for outcome in each.outcomes]
    return Summary(
        len(found), sum(each.is_good for each in found), max((each.over_fastest for each in found), default=1.0),
        len(pairs), sum(pair.agrees for pair in pairs), sum(pair.is_steady for pair in pairs if not pair.agrees),
        math.exp(statistics.mean(errors)) if errors else 1.0,
    )  # fmt: skip


def table(found: Sequence[Judged]) -> str:
    """A line for each place, in Markdown, as it stands in docs/benchmarks.md."""
    places = list(dict.fromkeys(each.place for each in found))
    rows = [_row(place.name, [each for each in found if each.place == place]) for place in places]
    head = (
        "| place | lengths | good choices | worst choice | pairs in the predicted order "
        f"| of the others, the same in {STEADILY:.0%} of rounds | step, times more or less than predicted |"
    )
    return "\n".join([head, "|---|---|---|---|---|---|---|", *rows])


def _row(name: str, found: Sequence[Judged]) -> str:
    total, worst = summary(found), max(found, key=lambda each: each.over_fastest)
    lengths = ", ".join(str(n) for n in sorted({each.work.seq_len for each in found}))
    cells = (
        name, lengths, f"{total.good} of {total.attentions}", f"{worst.over_fastest:.2f}× ({worst.attention}, {worst.work.seq_len})",
        f"{total.agreeing} of {total.differing_pairs}", str(total.steadily_disagreeing), f"{total.typical_error:.2f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"
