"""What of a model's cost does not shrink when more ranks share a sequence.

A step without a rule for split rows gathers them, and works on all of them on every rank, until its result is split again. So what a rank
spends for each of its tokens is a line over the ranks of a sequence: what its own rows cost, and as much again as all rows cost times the
ranks. Two looks at a model, on different numbers of ranks, tell both parts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from autoseq.planning.model_cost import Collective, ModelCost, PassCost

# The last is of rows that move between ranks, as where two sequences are joined: how many does not shrink with those that a rank has.
_OF_OTHER_ROWS = ("all_gather", "reduce_scatter", "all_to_all")


def gathers(cost: ModelCost) -> bool:
    """Whether some steps of a model see all rows, so that one look does not tell what it costs on other numbers of ranks."""
    return any(each.kind in _OF_OTHER_ROWS for each in cost.exchanged)


@lru_cache(maxsize=4096)
def cost_on(ranks: int, cost: ModelCost, more: ModelCost | None) -> ModelCost:
    """The cost on a rank with as many tokens as in `cost`, of a sequence on so many ranks. `more` is the look on more ranks, if any."""
    if more is None or ranks == cost.ranks:
        return cost

    def line(few: int, many: int) -> int:
        rise, run = many * cost.tokens - few * more.tokens, more.tokens * (more.ranks - cost.ranks)
        return max(0, few + rise * (ranks - cost.ranks) // run)

    def by_name(few: tuple[tuple[str, int], ...], many: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        return tuple((name, line(number, dict(many).get(name, 0))) for name, number in few)

    def passed(few: PassCost, many: PassCost) -> PassCost:
        growing = line(few.growing_bytes, many.growing_bytes)
        return replace(few, flops=by_name(few.flops, many.flops), again=by_name(few.again, many.again), growing_bytes=growing)

    full = {each.kind: each.full_bytes for each in more.exchanged}
    exchanged = (Collective(each.kind, line(each.full_bytes, full.get(each.kind, 0)), each.messages) for each in cost.exchanged)
    return replace(
        cost,
        ranks=ranks,
        forward=passed(cost.forward, more.forward),
        backward=passed(cost.backward, more.backward),
        exchanged=tuple(exchanged),
        kept_bytes=line(cost.kept_bytes, more.kept_bytes),
        largest_bytes=line(cost.largest_bytes, more.largest_bytes),
        gathered_bytes=line(cost.gathered_bytes, more.gathered_bytes),
    )
