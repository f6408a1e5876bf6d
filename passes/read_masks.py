"""Read masks: what a mask looks up becomes what it says.

    attention(…, captures=[mask], predicate="Ne(c0(b, 0, q, k), 0)")        # mask: bool [B, 1, S, S]
        →   attention(…, captures=[], max_ahead=0, predicate="")            # k <= q
    attention(…, score="f_add(f_mul(s, const(1, 8)), f_where(k <= q, const(0, 1), const(-3.4e38)))")
        →   attention(…, scale=0.125, max_ahead=0, score="", empty_rows="uniform")

Legal because the formula is the mask's own subgraph, read symbolically at an index and checked against it; the S×S tensor loses its
last user and is never built. A tensor over queries and keys that stays looked up after reading is reported, since it is held whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from autoseq.passes.attention_site import is_attention
from autoseq.passes.check_formulas import check_reading, check_structure
from autoseq.passes.formula import Reader
from autoseq.passes.formula.floats import requires_grad
from autoseq.passes.formula.reader import broadcast
from autoseq.passes.formula.text import lookup_function, parse
from autoseq.passes.formula.values import Index, call, capture_number, captures_in, is_bool, is_capture, k, q, s
from autoseq.passes.mask_bounds import split, tighter
from autoseq.passes.mask_text import site_text
from autoseq.passes.score_structure import Structure, may_be_infinite, structure
from autoseq.passes.shrink import CannotShrink
from autoseq.passes.sizes import hint, num_bytes
from autoseq.passes.source import source_line


@dataclass(frozen=True, slots=True)
class DenseMask:
    """A mask that could not be read: where, why, and the bytes it takes."""

    source: str
    reason: str
    num_bytes: int


def read_masks(gm: fx.GraphModule) -> tuple[int, list[DenseMask]]:
    """Replace each site's lookups by formulas; returns how many sites had a mask read, and the masks that stay dense."""
    read, dense = 0, []
    checked: dict[tuple[fx.Node, str], bool] = {}
    for node in gm.graph.nodes:
        if not is_attention(node):
            continue
        has_formula = bool(node.kwargs["score"] or node.kwargs["predicate"])
        left = _read(node, checked)
        dense += left
        read += has_formula and not left
        node.meta["attention"]["mask"] = site_text(node)
    return read, dense


def _read(node: fx.Node, checked: dict[tuple[fx.Node, str], bool]) -> list[DenseMask]:
    """Rewrite one site's formulas; returns what has to be held as it is."""
    captures: list[fx.Node] = list(node.args[3])  # type: ignore[arg-type]
    reader = Reader()
    formulas = (parse(str(node.kwargs[name]), captures) for name in ("score", "predicate"))
    score, predicate = (_inlined(formula, captures, reader, node, checked) for formula in formulas)
    score = s if score is sympy.true else score
    marked, empty_rows = _marked(score, reader.captures), node.kwargs["empty_rows"]
    found = structure(marked, empty_rows)  # type: ignore[arg-type]
    ahead, behind, rest = _bounds(node, predicate, found)
    if found.fills_bias and (rest is not sympy.true or _may_be_empty(node, ahead, behind)):
        found = structure(marked, empty_rows, may_fill_bias=False)  # type: ignore[arg-type]
        ahead, behind, rest = _bounds(node, predicate, found)
    _check_structure(node, score, predicate, found, reader)
    may_be_empty = rest is not sympy.true or _may_be_empty(node, ahead, behind)
    (rest, score), kept = _renumbered([rest, found.score], reader.captures)
    node.args = (*node.args[:3], kept, *node.args[4:])
    node.kwargs = {
        **node.kwargs, "scale": _product(node.kwargs["scale"], found.scale), "max_ahead": ahead, "max_behind": behind,
        "predicate": "" if rest is sympy.true else sympy.sstr(rest), "score": "" if score == s else sympy.sstr(score),
        "empty_rows": found.empty_rows if may_be_empty or may_be_infinite(score) else "zero",
    }  # fmt: skip
    return [_dense(node, kept[i]) for i in _dense_lookups([rest, score])]


def _bounds(node: fx.Node, predicate: Any, found: Structure) -> tuple[Any, Any, Any]:
    """The bounds on k - q of everything that excludes keys, and the rest of it."""
    ahead, behind, rest = split(sympy.And(predicate, found.predicate))
    return tighter(node.kwargs["max_ahead"], ahead), tighter(node.kwargs["max_behind"], behind), rest


def _may_be_empty(node: fx.Node, ahead: Any, behind: Any) -> bool:
    """Whether bounds may leave a row without keys: else every row has key 0, or the key at its own position."""
    q_len, k_len = (x.meta["val"].shape[2] for x in node.args[:2])  # type: ignore[union-attr]
    return not ((ahead is None or ahead >= 0) and (behind is None or (behind >= 0 and statically_known_true(q_len <= k_len))))


def _product(scale: Any, factor: float) -> Any:
    return scale if factor == 1.0 else factor if isinstance(scale, (int, float)) and scale == 1.0 else scale * factor


def _dense(node: fx.Node, mask: fx.Node) -> DenseMask:
    reason = "it depends on query and key in a way that was not read" if mask.op == "call_function" else "it is an input of the program"
    return DenseMask(source_line(node), reason, num_bytes(mask.meta["val"]))


def _dense_lookups(formulas: Sequence[Any]) -> list[int]:
    """The captures that are looked up by query and key themselves, not by something between them."""
    lookups = {lookup for formula in formulas for lookup in captures_in(formula)}
    return sorted({capture_number(x) for x in lookups if q in x.args and k in x.args})


def _inlined(formula: Any, captures: list[fx.Node], reader: Reader, site: fx.Node, checked: dict[tuple[fx.Node, str], bool]) -> Any:
    """`c0(b, 0, q, k)` becomes the value of capture 0 at that index; a bool capture stands as `Ne(c0(...), 0)`.

    Captures are numbered anew, in the order they are met, alike on every rank; a lookup by a lookup stays one.
    """
    if is_capture(formula):
        node, index = captures[capture_number(formula)], tuple(_inlined(arg, captures, reader, site, checked) for arg in formula.args)
        if captures_in(sympy.Tuple(*index)) or not _holds(site, node, index, checked):
            return reader.capture(node, index)
        return reader.at(node, index)
    if not captures_in(formula):
        return formula
    args = [_inlined(arg, captures, reader, site, checked) for arg in formula.args]
    truths = [arg for arg in args if is_bool(arg)]
    if isinstance(formula, (sympy.Ne, sympy.Eq)) and truths:  # SymPy writes `~Ne(c0(q, k), 0)` as `Eq(c0(q, k), 0)`
        return truths[0] if isinstance(formula, sympy.Ne) else sympy.Not(truths[0])
    return formula.func(*args)


def _holds(site: fx.Node, mask: fx.Node, index: Index, checked: dict[tuple[fx.Node, str], bool]) -> bool:
    """Whether the formula of a looked-up tensor was checked. Raises AssertionError if it is wrong; False if no check was possible."""
    key = (mask, str(index))
    if key in checked:
        return checked[key]
    query, keys = (x.meta["val"] for x in site.args[:2])  # type: ignore[union-attr]
    alone = Reader()
    alone.at(mask, index)
    try:
        check_reading(
            mask, alone, partial(broadcast, index), q_len=query.shape[2], k_len=keys.shape[2], batch=query.shape[0],
            heads=hint(query.shape[1]),
        )  # fmt: skip
        checked[key] = True
    except CannotShrink:
        checked[key] = False
    return checked[key]


def _check_structure(node: fx.Node, score: Any, predicate: Any, found: Structure, reader: Reader) -> None:
    if score == s:
        return
    query, keys = (x.meta["val"] for x in node.args[:2])  # type: ignore[union-attr]
    both = replace(found, predicate=sympy.And(predicate, found.predicate))
    check_structure(score, predicate, both, reader.captures, heads=hint(query.shape[1]), q_len=query.shape[2], k_len=keys.shape[2])


def _marked(score: Any, captures: list[fx.Node]) -> Any:
    """The score, where floats over keys that the program is given from outside say that they may be a mask."""
    return score.replace(
        lambda x: is_capture(x) and k in x.free_symbols and _is_given(captures[capture_number(x)]), lambda x: call("mask", x)
    )


def _is_given(node: fx.Node) -> bool:
    """Whether a float tensor without gradient comes from an input of the program, which may hold the least of all numbers."""
    if not node.meta["val"].is_floating_point() or requires_grad(node):
        return False
    queue, seen = [node], set[fx.Node]()
    while queue:
        made_of = queue.pop()
        val = made_of.meta.get("val")
        if made_of in seen or not isinstance(val, torch.Tensor) or not val.is_floating_point():
            continue
        seen.add(made_of)
        if made_of.op == "placeholder" and not made_of.meta.get("is_parameter"):
            return True
        queue.extend(made_of.all_input_nodes)
    return False


def _renumbered(formulas: list[Any], captures: list[fx.Node]) -> tuple[list[Any], list[fx.Node]]:
    """Formulas that look up only what they use, numbered from 0, and those captures."""
    used = sorted({capture_number(lookup) for formula in formulas for lookup in captures_in(formula)})
    numbers = {old: new for new, old in enumerate(used)}

    def renamed(lookup: Any) -> Any:
        number = capture_number(lookup)
        return lookup_function(numbers[number], captures[number])(*lookup.args)

    return [formula.replace(is_capture, renamed) for formula in formulas], [captures[i] for i in used]
