"""The runner: one contract for all passes, one place for what every pass needs around it.

A pass is a function on a GraphModule that edits it in place and returns what it did. The runner alone lints, removes dead
code, recompiles, times, shows the graph to an observer, and says which pass failed.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from autoseq.runtime.errors import AutoSeqError

log = logging.getLogger("autoseq.passes")


@dataclass(frozen=True, slots=True)
class Pass:
    name: str
    run: Callable[[fx.GraphModule], Any]


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What one pass did: its return value, its time, the number of nodes after it."""

    name: str
    result: Any
    seconds: float
    num_nodes: int


def run_passes(
    gm: fx.GraphModule,
    passes: Sequence[Pass],
    *,
    skip: frozenset[str] = frozenset(),
    observe: Callable[[str, fx.GraphModule], None] | None = None,
) -> dict[str, PassRecord]:
    """Run `passes` in order on `gm`; `observe(name, gm)` sees the graph after each. Returns the records by name."""
    unknown = skip - {p.name for p in passes}
    if unknown:
        raise AutoSeqError(f"no pass is called {', '.join(sorted(unknown))}; there are: {', '.join(p.name for p in passes)}")
    records = {}
    for one in passes:
        if one.name in skip:
            continue
        started = time.perf_counter()
        try:
            result = one.run(gm)
            gm.graph.eliminate_dead_code()
            gm.graph.lint()
            gm.recompile()
        except AutoSeqError:
            raise
        except Exception as error:
            raise AutoSeqError(f"internal error in pass {one.name!r}: {type(error).__name__}: {error}") from error
        records[one.name] = PassRecord(one.name, result, time.perf_counter() - started, len(gm.graph.nodes))
        log.debug("%s: %s (%.3f s, %d nodes)", one.name, result, records[one.name].seconds, records[one.name].num_nodes)
        if observe:
            observe(one.name, gm)
    return records
