"""The cost model in symbols: how a strategy's seconds come from what it sends and computes and from what a topology says.

    T_work = 2 computed (D + V) / F + launches L + (a (3 merged + masked) + 2 packed) / M
    computed = full + masked + min(squares, (squares + tile · rows) / 2)
    T_keys = messages latency + bytes / rate
    H_keys = messages latency + bytes / rate of the host, where messages need the cores that compute, and 0 elsewhere

F flops a second of the attention kernel, which leaves out tile keys at once, L seconds a launch, M bytes a second of memory; latency and
rate of a link, of which the slower counts: inside a node, or all of a node between nodes. Of a rank's blocks, full and masked are pairs,
and so are the squares at a diagonal, which have so many rows; packed are the bytes of buffers that heads or keys are copied into or out of.

The same phases as `prediction` evaluates, so a test can hold one to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import sympy

from autoseq.planning.prediction import Lane, lanes_of
from autoseq.runtime.strategy import D, Site, Strategy, V, a
from autoseq.runtime.timeline import Exchanges, Way

WORK = sympy.Symbol("T_work", nonnegative=True)
FULL, MASKED, SQUARES, ROWS, PACKED = sympy.symbols("full masked squares rows packed", nonnegative=True, integer=True)
LAUNCHES, MERGED = sympy.symbols("launches merged", nonnegative=True, integer=True)
FLOPS_PER_S, LAUNCH_S, MEMORY_BYTES_PER_S = sympy.symbols("F L M", positive=True)
TILE = sympy.Symbol("tile", positive=True, integer=True)

_SAMPLE = Site(
    batch=1, q_len=64, k_len=64, heads=8, kv_heads=8, head_dim=8, value_dim=8, element_bytes=2, max_ahead=0, max_behind=7, mesh=(2, 2)
)  # fmt: skip


def exchange_symbol(name: str) -> sympy.Symbol:
    """Of the seconds of all messages of an exchange by themselves."""
    return sympy.Symbol(f"T_{name}", nonnegative=True)


def host_symbol(name: str) -> sympy.Symbol:
    """What all messages of an exchange take of the cores that compute."""
    return sympy.Symbol(f"H_{name}", nonnegative=True)


Phases = tuple[tuple[sympy.Expr, sympy.Expr], ...]
"""How often each phase comes, and its seconds: those of the longest of what goes on side by side."""


@cache
def phase_formulas(strategy: Strategy, way: Way, *, one_link: bool = False, host: bool = False) -> Phases:
    """The phases of a pass on several ranks. SymPy takes long over a Max, and they are asked for more than once.

    `one_link`: as on one node, where messages of two levels take the same link, one after the other. `host`: messages need cores.
    """
    lanes, found = lanes_of(_sample(strategy, way), one_link=one_link), list[tuple[sympy.Expr, sympy.Expr]]()
    for phase in strategy.phases(way):
        busy: dict[Lane, sympy.Expr] = {"compute": phase.work * WORK}
        for name, share in phase.sends:
            busy["compute"] += share * host_symbol(name) if host else 0
            busy[lanes[name]] = busy.get(lanes[name], sympy.Integer(0)) + share * exchange_symbol(name)
        parts = [part for part in busy.values() if part != 0]
        found.append((phase.times, sympy.Max(*parts) if parts else sympy.Integer(0)))
    return tuple(found)


def work_formula(way: Way) -> sympy.Expr:
    """What WORK is: products, launches, masks that are read, results that are merged and what is packed in memory."""
    widths = D + V if way == "forward" else 3 * D + 2 * V
    computed = FULL + MASKED + sympy.Min(SQUARES, (SQUARES + TILE * ROWS) / 2)
    touched = a * (3 * MERGED + MASKED) + 2 * PACKED
    return 2 * computed * widths / FLOPS_PER_S + LAUNCHES * LAUNCH_S + touched / MEMORY_BYTES_PER_S


def uses_links_together(strategy: Strategy, way: Way) -> bool:
    """Whether messages inside a node travel beside those across, so that a shared link makes a difference."""
    return phase_formulas(strategy, way) != phase_formulas(strategy, way, one_link=True)


def exchange_text(strategy: Strategy, way: Way) -> Iterator[str]:
    """What each exchange consists of, in words."""
    where = {"flat": "among all ranks", "inside": "inside a node", "across": "between nodes"}
    for name, exchange in _sample(strategy, way).items():
        bytes_formula = strategy.formulas()[f"{way}_bytes"] if len(_sample(strategy, way)) == 1 else f"bytes_{name}"
        yield f"T_{name}: {exchange.kind} {where[exchange.scope]}, messages · latency + ({bytes_formula}) / rate"


def _sample(strategy: Strategy, way: Way) -> Exchanges:
    return strategy.exchanges(_SAMPLE, 4, "contiguous", 0, way)
