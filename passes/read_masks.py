"""Read masks: what a mask looks up becomes what it says.

    attention(…, captures=[mask], predicate="Ne(c0(b, 0, q, k), 0)")        # mask: bool [B, 1, S, S]
        →   attention(…, captures=[], max_ahead=0, predicate="")            # k <= q

Legal because the formula is the mask's own subgraph, read symbolically at an index; the S×S tensor loses its last
user and is never built. A mask that stays dense after reading is reported, since it is held whole.
"""

from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from autoseq.passes.find_attention import is_attention
from autoseq.passes.index_formula import Reader, Unreadable, b, h, is_bool, k, q
from autoseq.passes.sizes import num_bytes
from autoseq.passes.source import source_line

_SYMBOLS = {symbol.name: symbol for symbol in (b, h, q, k)}


@dataclass(frozen=True, slots=True)
class DenseMask:
    """A mask that could not be read: where, why, and the bytes it takes."""

    source: str
    reason: str
    num_bytes: int


def read_masks(gm: fx.GraphModule) -> tuple[int, list[DenseMask]]:
    """Replace each site's lookups by formulas; returns how many sites had a mask read, and the masks that stay dense."""
    read, dense = 0, []
    for node in gm.graph.nodes:
        if not is_attention(node):
            continue
        if node.kwargs["score"]:
            dense.append(_dense(node, node.args[3][0], "a float mask is added to the scores as it is"))  # type: ignore[index]
        elif node.args[3]:
            read_one = _read(node)
            if isinstance(read_one, DenseMask):
                dense.append(read_one)
            else:
                read += 1
        node.meta["attention"]["mask"] = mask_text(node)
    return read, dense


def _dense(node: fx.Node, mask: fx.Node, reason: str) -> DenseMask:
    return DenseMask(source_line(node), reason, num_bytes(mask.meta["val"]))


def _read(node: fx.Node) -> DenseMask | None:
    """Rewrite one site's mask arguments; a `DenseMask` if the mask has to be held as it is."""
    captures: list[fx.Node] = list(node.args[3])  # type: ignore[arg-type]
    reader = Reader()
    looked_up = parse(str(node.kwargs["predicate"]), len(captures))
    try:
        formula = _inline(looked_up, captures, reader)
    except Unreadable as stuck:
        return _dense(node, captures[0], f"its making could not be read at {stuck}")
    used = sorted(_lookups(formula), key=str)
    for lookup in used:
        if {q, k} <= lookup.free_symbols:
            return _dense(node, captures[0], "it depends on query and key in a way that was not read")
    max_ahead, max_behind, rest = split(formula)
    kept = sorted({_number(lookup) for lookup in used if lookup in rest.atoms(sympy.core.function.AppliedUndef)})
    rest = _renumber(rest, {old: new for new, old in enumerate(kept)})
    node.args = (*node.args[:3], [reader.captures[i] for i in kept], *node.args[4:])
    ahead = _tighter(node.kwargs["max_ahead"], max_ahead)
    behind = _tighter(node.kwargs["max_behind"], max_behind)
    predicate = "" if rest is sympy.true else sympy.sstr(rest)
    node.kwargs = {**node.kwargs, "max_ahead": ahead, "max_behind": behind, "predicate": predicate}
    return None


def parse(predicate: str, num_captures: int) -> Any:
    """The SymPy formula of a predicate string."""
    functions = {f"c{i}": sympy.Function(f"c{i}", integer=True) for i in range(num_captures)}
    return sympy.sympify(predicate or "True", locals={**_SYMBOLS, **functions})  # pyright: ignore[reportCallIssue]


def _lookups(formula: Any) -> set[Any]:
    return formula.atoms(sympy.core.function.AppliedUndef)


def _number(lookup: Any) -> int:
    return int(lookup.func.__name__[1:])


def _inline(formula: Any, captures: list[fx.Node], reader: Reader) -> Any:
    """`c0(b, 0, q, k)` becomes the value of capture 0 at that index; a bool capture stands as `Ne(c0(...), 0)`."""
    ordered = sorted(_lookups(formula), key=str)  # captures are numbered in the order they are met, alike on every rank
    values = {lookup: reader.at(captures[_number(lookup)], lookup.args) for lookup in ordered}
    formula = formula.subs({sympy.Ne(lookup, 0): value for lookup, value in values.items() if is_bool(value)})
    return formula.subs({lookup: value for lookup, value in values.items() if not is_bool(value)})


def split(formula: Any) -> tuple[int | None, int | None, Any]:
    """The bounds `k - q <= max_ahead` and `q - k <= max_behind` of a conjunction, and what is left of it."""
    ahead: int | None = None
    behind: int | None = None
    rest = []
    for atom in conjuncts(formula):
        bound = _bound(atom)
        if bound is None:
            rest.append(atom)
        elif bound[0] == "ahead":
            ahead = _tighter(ahead, bound[1])
        else:
            behind = _tighter(behind, bound[1])
    return ahead, behind, sympy.And(*rest)


def conjuncts(formula: Any) -> list[Any]:
    """The parts of a conjunction, in an order that every process has alike."""
    return sorted(sympy.And.make_args(formula), key=str)


def _tighter(a: Any, b: int | None) -> Any:
    return b if a is None else a if b is None else min(a, b)


def _bound(atom: Any) -> tuple[str, int] | None:
    """(`ahead` | `behind`, c) if the atom says k - q <= c or q - k <= c, over integers."""
    if not isinstance(atom, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)) or atom.free_symbols != {q, k}:
        return None
    small, large = (atom.lhs, atom.rhs) if isinstance(atom, (sympy.Le, sympy.Lt)) else (atom.rhs, atom.lhs)
    difference = sympy.expand(small - large)
    strict = 1 if isinstance(atom, (sympy.Lt, sympy.Gt)) else 0
    for kind, sign in (("ahead", 1), ("behind", -1)):
        constant = sympy.expand(difference - sign * (k - q))
        if constant.is_Integer:
            return kind, -int(constant) - strict
    return None


def _renumber(formula: Any, numbers: dict[int, int]) -> Any:
    return formula.replace(
        lambda e: isinstance(e, sympy.core.function.AppliedUndef),
        lambda e: sympy.Function(f"c{numbers[_number(e)]}", integer=True)(*e.args),
    )


def mask_text(node: fx.Node) -> str:
    """The site's mask as people write it: `(k <= q) & (k > q - 128) & Eq(doc(b, q), doc(b, k))`; `all` if nothing is masked."""
    parts = []
    ahead, behind = node.kwargs["max_ahead"], node.kwargs["max_behind"]
    if ahead is not None:
        parts.append("(k <= q)" if ahead == 0 else f"(k <= q {'+' if ahead > 0 else '-'} {abs(ahead)})")  # type: ignore
    if behind is not None:
        parts.append(f"(k > q - {behind + 1})")  # type: ignore[operator]
    if node.kwargs["predicate"]:
        captures: list[fx.Node] = node.args[3]  # type: ignore[assignment]
        formula = parse(str(node.kwargs["predicate"]), len(captures))
        parts.extend(_named(atom, captures) for atom in conjuncts(formula))
    if node.kwargs["score"]:
        parts.append(f"bias {capture_name(node.args[3][0])}")  # type: ignore[index]
    text = " & ".join(parts) or "all"
    return text[1:-1] if len(parts) == 1 and text[0] == "(" and text.count("(") == 1 else text


def _named(atom: Any, captures: list[fx.Node]) -> str:
    names = {i: capture_name(node) for i, node in enumerate(captures)}
    if isinstance(atom, sympy.Eq):
        sides = [s for s in atom.args if isinstance(s, sympy.core.function.AppliedUndef)]
        if len(sides) == 2 and sides[0].func == sides[1].func:  # the same lookup at q and at k: a document id
            number = _number(sides[0])
            names[number] = "doc" if captures[number].op != "placeholder" else names[number]
            ordered = sorted(atom.args, key=lambda s: q not in s.free_symbols)
            return f"Eq({', '.join(_call(s, names) for s in ordered)})"
    text = sympy.sstr(atom)
    for number, name in names.items():
        text = text.replace(f"c{number}(", f"{name}(")
    return text if isinstance(atom, (sympy.Eq, sympy.Ne)) else f"({text})"


def _call(lookup: Any, names: dict[int, str]) -> str:
    return f"{names[_number(lookup)]}({', '.join(map(str, lookup.args))})"


def capture_name(node: fx.Node) -> str:
    """An input by the user's name for it, a computed tensor by the node's."""
    return str(node.meta.get("source_name", node.name))
