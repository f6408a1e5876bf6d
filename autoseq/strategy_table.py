"""What each strategy sends and which attention it serves, as tables: for `autoseq strategies` and for docs/strategies.md.

Every cell is asked of the strategies themselves, so the page cannot say what the code does not do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import sympy
from rich.console import Console
from rich.text import Text

from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site, Strategy
from autoseq.runtime.timeline import WAYS

RANKS = 4
MESH = (2, 2)

_PLAIN = Site(
    batch=1, q_len=4096, k_len=4096, heads=8, kv_heads=8, head_dim=64, value_dim=64, element_bytes=2, max_ahead=0, mesh=MESH
)  # fmt: skip
_WINDOW = replace(_PLAIN, max_behind=127)
_DOCUMENTS = "Eq(c0(b, q), c0(b, k))"

KINDS: dict[str, Site] = {
    "causal": _PLAIN,
    "a sliding window": _WINDOW,
    "no mask": replace(_PLAIN, max_ahead=None),
    "packed documents, padding, chunks, prefixes": replace(_PLAIN, predicate=_DOCUMENTS),
    "the same in a window": replace(_WINDOW, predicate=_DOCUMENTS),
    "grouped or few heads, also not divisible by the ranks": replace(_WINDOW, heads=9, kv_heads=3),
    "keys and values of different widths (MLA)": replace(_WINDOW, head_dim=192, value_dim=128),
    "softcap": replace(_WINDOW, score="f_mul(f_tanh(f_div(s, const(50, 1))), const(50, 1))"),
    "ALiBi, tables of distances, learned or not": replace(_WINDOW, score="f_add(s, c0(c1(k - q + 4096), h))", learned=(0,)),
    "a dense bias that is learned": replace(_WINDOW, score="f_add(s, c0(b, h, q, k))", learned=(0,)),
    "a dense float mask": replace(_WINDOW, score="f_add(s, c0(b, 0, q, k))"),
    "sinks": replace(_WINDOW, has_sinks=True),
    "dropout": replace(_WINDOW, dropout_p=0.1),
    "cross-attention, other length of keys": replace(_PLAIN, max_ahead=None, q_len=512),
    "rows without keys that average all keys": replace(_PLAIN, predicate=_DOCUMENTS, empty_rows="uniform"),
}


@dataclass(frozen=True, slots=True)
class Served:
    """Which strategies serve a kind of attention; a reason for each that does not."""

    kind: str
    reasons: dict[str, str | None]


def served() -> list[Served]:
    """Each kind of attention, on RANKS ranks in a mesh of MESH."""
    return [Served(kind, {name: s.cannot_serve(site, _ranks(name)) for name, s in STRATEGIES.items()}) for kind, site in KINDS.items()]


def markdown() -> str:
    """Both tables and the reasons, as docs/strategies.md holds them."""
    return "\n".join([*_cost_lines(), "", *_served_lines()]) + "\n"


def print_strategies(out: Console) -> None:
    """The same for a terminal, strategy by strategy."""
    rows, reasons = served(), _reasons()
    for name, strategy in STRATEGIES.items():
        formulas = {field: formula_text(formula) for field, formula in strategy.formulas().items()}
        out.print(Text.assemble((name, "bold"), f"  {summary(strategy)}  Layouts: {', '.join(layouts(strategy))}."))
        for way in WAYS:
            out.print(f"  {way}: {formulas[f'{way}_bytes']} bytes, messages: {formulas[f'{way}_messages']}")
        refused = [f"{row.kind} [{reasons.index(reason) + 1}]" for row in rows if (reason := row.reasons[name])]
        out.print(f"  serves {'all but: ' + '; '.join(refused) if refused else 'everything'}")
    out.print(f"\n{LEGEND}\n\nWhy not:")
    for line in _numbered(reasons):
        out.print(line)


LEGEND = """\
Bytes are those that a rank sends for one attention whose mask leaves nothing out, or whose window is W; `autoseq inspect` says how much
less it is with a mask. B batch; s, t a rank's rows of queries, of keys; H, K query, KV heads; D, V widths of keys, of values; P ranks
(N nodes of R); e, a bytes of an element, of an accumulator; c stages; h, g, n query heads and KV heads that the rank computes, KV heads
that it sends; m chunks that a rank holds; n_, m_, h_ ranks that its keys (k) or queries (q) go to, go to again, and whose it gets.
docs/strategies.md says more."""


def formula_text(formula: sympy.Expr) -> str:
    """A cost formula as people write it."""
    return sympy.sstr(sympy.factor_terms(formula)).replace("**", "^")


def layouts(strategy: Strategy) -> list[str]:
    """The layouts that a strategy takes."""
    return [layout for layout in get_args(Layout) if strategy.cannot_lay_out(layout) is None]


def summary(strategy: Strategy) -> str:
    """What a strategy does, in a line."""
    return str(type(strategy).__doc__).strip().splitlines()[0]


def _ranks(name: str) -> int:
    return 1 if name == "local" else RANKS


def _cost_lines() -> Iterator[str]:
    yield "| strategy | | bytes sent, forward | backward | messages | layouts |"
    yield "|---|---|---|---|---|---|"
    for name, strategy in STRATEGIES.items():
        formulas = {field: formula_text(formula) for field, formula in strategy.formulas().items()}
        messages = f"`{formulas['forward_messages']}`, `{formulas['backward_messages']}`"
        sent = f"`{formulas['forward_bytes']}` | `{formulas['backward_bytes']}`"
        yield f"| `{name}` | {summary(strategy)} | {sent} | {messages} | {', '.join(layouts(strategy))} |"


def _served_lines() -> Iterator[str]:
    reasons = _reasons()
    yield "| attention | " + " | ".join(f"`{name}`" for name in STRATEGIES) + " |"
    yield "|---" * (len(STRATEGIES) + 1) + "|"
    for row in served():
        yield f"| {row.kind} | " + " | ".join(_cell(reason, reasons) for reason in row.reasons.values()) + " |"
    yield ""
    yield from _numbered(reasons)


def _reasons() -> list[str]:
    return list(dict.fromkeys(reason for row in served() for reason in row.reasons.values() if reason))


def _cell(reason: str | None, reasons: Sequence[str]) -> str:
    return "yes" if reason is None else f"no [{reasons.index(reason) + 1}]"


def _numbered(reasons: Sequence[str]) -> Iterator[str]:
    for number, reason in enumerate(reasons, 1):
        yield f"{number}. {reason[0].upper()}{reason[1:]}."
