"""What strategies have in common whose ranks visit each other: what a planner asks of them follows from their `Manner`."""

from __future__ import annotations

from typing import ClassVar

import sympy

from autoseq.runtime.extrapolation import summed
from autoseq.runtime.layout import Layout, local_length
from autoseq.runtime.strategy import Site, Strategy
from autoseq.runtime.timeline import Exchanges, Phase, Way, pipeline
from autoseq.runtime.visits import HOME, THERE, Manner
from autoseq.runtime.work_counts import Task


class Visiting(Strategy):
    """Keys or queries go directly to whoever works on them."""

    manner: ClassVar[Manner]

    def exchanged(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> Exchanges:
        return self.manner.exchanges(site, group_size, layout, rank, way)

    def tasks(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> list[Task]:
        return self.manner.tasks(site, group_size, layout, rank, way)

    def kept_elements(self, site: Site, P: int, layout: Layout) -> int:
        """At most, of what comes: as much as a participant has of keys and values itself."""
        return site.batch * site.kv_heads * local_length(site.k_len, P, layout) * (site.head_dim + site.value_dim)

    def kept_bytes(self, site: Site, group_size: int, layout: Layout, rank: int) -> int:
        kept = self.kept_elements(site, group_size, layout) * site.element_bytes if group_size > 1 else 0
        return super().kept_bytes(site, group_size, layout, rank) + kept

    def buffer_bytes(self, site: Site, group_size: int, layout: Layout, rank: int, way: Way) -> int:
        if group_size == 1:
            return 0
        cases = self.cases(site, group_size, layout, rank)
        return summed([(case.weight, {way: self.manner.buffers(*case.asked, way)}) for case in cases])[way]


def visit_phases(rounds: sympy.Expr, own: sympy.Expr) -> tuple[Phase, ...]:
    """Round by round, given the share of the work that is with a rank's own keys and done first."""
    return pipeline(rounds, THERE, HOME, first_work=own)
