"""The structure of a score formula: what excludes keys, what is added or bent, and the scale.

    f_add(f_mul(s, 0.125), f_where(k <= q, 0, -3.4e38))      →      scale 0.125, predicate k <= q, score s, empty rows uniform

A softmax gives no weight to a key whose score is -inf, nor, beside any real score, to one of -1e30 and lower. What a row gets
whose keys are *all* excluded depends on how they were excluded, and is kept as `empty_rows`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import sympy
from sympy.core.function import AppliedUndef

from autoseq.passes.formula.floats import MASKED, two_values
from autoseq.passes.formula.values import call, const, const_value, is_capture, name_of, s
from autoseq.runtime.tiles import EmptyRows

_Kind = Literal["infinite", "infinite_fill", "added", "bias_fill", "replaced"]

_INFINITE: tuple[_Kind, ...] = ("infinite", "infinite_fill")
_REPLACED = -1e8
"""A score that is replaced by this or less takes no probability beside any real one, which is no less than a few thousands below 0."""


@dataclass(frozen=True, slots=True)
class Structure:
    """softmax of `score` over the keys that `predicate` allows, where `s` stands for scale · q·k."""

    score: Any
    scale: float
    predicate: Any
    empty_rows: EmptyRows
    fills_bias: bool = False  # a row without keys would give no gradient to its bias, where the score's formula does


def structure(formula: Any, empty_rows: EmptyRows, *, may_fill_bias: bool = True) -> Structure:
    """Take a score formula apart. `empty_rows` is what a row of -inf alone gives where the formula comes from."""
    rest, excluded = _peel(formula, (*_INFINITE, "added", "replaced", *(("bias_fill",) if may_fill_bias else ())))
    kinds = [kind for _, kind in excluded]
    # Finite masks are one of a kind: two that are added make -inf where they meet.
    if kinds.count("added") + kinds.count("bias_fill") > 1 or len({*kinds} - {*_INFINITE}) + any(kind in _INFINITE for kind in kinds) > 1:
        rest, excluded = _peel(formula, _INFINITE)
        kinds = [kind for _, kind in excluded]
    score, scale = _fold_scale(_score_first(rest))
    keeps = sympy.And(*(keep for keep, _ in excluded))
    return Structure(score, scale, keeps, _empty_rows({*kinds}, empty_rows), "bias_fill" in kinds)


def _empty_rows(kinds: set[_Kind], plain: EmptyRows) -> EmptyRows:
    """`_fill`: the score was replaced, so that the row's gradient ends at the values."""
    if kinds & {"added", "bias_fill", "replaced"}:
        return "uniform_fill" if "replaced" in kinds else "uniform"
    return "nan_fill" if plain == "nan" and kinds == {"infinite_fill"} else plain


_POLES = {"f_log", "f_log2", "f_exp", "f_exp2", "f_div", "f_pow", "f_rsqrt"}


def may_be_infinite(score: Any) -> bool:
    """Whether a score itself may be -inf: by a constant, by an operation with poles, or by what it looks up."""
    calls = score.atoms(AppliedUndef)
    names = {name_of(x) for x in calls}
    overflows = any(value is not None and abs(value) >= -MASKED for value in map(const_value, calls))
    return overflows or bool((names & _POLES) - _tamed(score)) or any(map(is_capture, calls))


def _tamed(score: Any) -> set[str]:
    """Divisions by constants have no poles."""
    divisions = [x for x in score.atoms(AppliedUndef) if name_of(x) == "f_div"]
    return {"f_div"} if all(const_value(x.args[1]) for x in divisions) else set()


_Excluded = list[tuple[Any, _Kind]]


def _peel(x: Any, kinds: tuple[_Kind, ...]) -> tuple[Any, _Excluded]:
    """The formula without its masks, and for each mask the condition under which a key is kept."""
    peelers = {"f_where": _peel_where, "f_add": _peel_sum, "f_sub": _peel_difference, "f_mul": _peel_scaled, "f_div": _peel_scaled}
    peel = peelers.get(name_of(x))
    return peel(x, kinds) if peel and x.has(s) else (x, [])


def _peel_where(x: Any, kinds: tuple[_Kind, ...]) -> tuple[Any, _Excluded]:
    condition, yes, no = x.args
    if condition.has(s):  # what is kept depends on the score itself
        return x, []
    for masked, kept, keep in ((yes, no, sympy.Not(condition)), (no, yes, condition)):
        value = const_value(masked)
        if value is not None and value <= _REPLACED:
            kind: _Kind = "infinite_fill" if value == -sympy.oo else "replaced"
            if kind in kinds:
                rest, excluded = _peel(kept, kinds)
                return rest, [*excluded, (keep, kind)]
    return x, []


def _peel_sum(x: Any, kinds: tuple[_Kind, ...]) -> tuple[Any, _Excluded]:
    with_s = [arg for arg in x.args if arg.has(s)]
    if len(with_s) != 1:
        return x, []
    term = x.args[1] if x.args[0] is with_s[0] else x.args[0]
    rest, excluded = _peel(with_s[0], kinds)
    added, masks = _peel_term(term, 1.0, kinds)
    if const_value(added) is None and any(kind == "replaced" for _, kind in excluded):
        return x, []  # in a row without keys, what is added to the one number is all that the softmax sees
    return (rest if const_value(added) == 0 else call("f_add", rest, added)), [*_under_sum(excluded, added), *masks]


def _peel_difference(x: Any, kinds: tuple[_Kind, ...]) -> tuple[Any, _Excluded]:
    scored, term = x.args
    if not scored.has(s) or term.has(s):
        return x, []
    rest, excluded = _peel(scored, kinds)
    taken, masks = _peel_term(term, -1.0, kinds)
    if const_value(taken) is None and any(kind == "replaced" for _, kind in excluded):
        return x, []
    return (rest if const_value(taken) == 0 else call("f_sub", rest, taken)), [*_under_sum(excluded, taken), *masks]


def _under_sum(excluded: _Excluded, added: Any) -> _Excluded:
    """A gradient that ends at a score of -inf still reaches what is added to it."""
    if const_value(added) is not None:
        return excluded
    return [(keep, "infinite" if kind == "infinite_fill" else kind) for keep, kind in excluded]


def _peel_scaled(x: Any, kinds: tuple[_Kind, ...]) -> tuple[Any, _Excluded]:
    """A mask inside a product with a moderate positive constant excludes the same keys."""
    factors = [const_value(arg) for arg in x.args]
    scored = x.args[0] if x.args[0].has(s) else x.args[1]
    factor = next((f for f in factors if f is not None), None)
    if factor is None or not 1e-4 <= factor <= 1e4 or (name_of(x) == "f_div" and scored is not x.args[0]):
        return x, []
    rest, excluded = _peel(scored, kinds)
    return (call(name_of(x), *(rest if arg is scored else arg for arg in x.args)), excluded) if excluded else (x, [])


def _peel_term(term: Any, sign: float, kinds: tuple[_Kind, ...]) -> tuple[Any, _Excluded]:
    """What is added to a score, without the masks in it: `where(c, bias, min)` is the bias, and keys are kept where c holds."""
    if name_of(term) == "f_add":
        first, second = (_peel_term(arg, sign, kinds) for arg in term.args)
        if first[1] or second[1]:
            parts = [part for part, _ in (first, second) if const_value(part) != 0]
            total = call("f_add", *parts) if len(parts) == 2 else parts[0] if parts else const(0.0)
            return total, [*first[1], *second[1]]
    found = two_values(term)
    if found is not None:
        term = call("f_where", found[0], const(found[1]), const(found[2]))
    if name_of(term) == "f_where":
        condition, yes, no = term.args
        for masked, kept, keep in ((yes, no, sympy.Not(condition)), (no, yes, condition)):
            value = const_value(masked)
            kind: _Kind = "added" if const_value(kept) is not None else "bias_fill"
            kind = "infinite" if value is not None and abs(value) == sympy.oo else kind
            if value is not None and sign * value <= MASKED and kind in kinds:
                rest, excluded = _peel_term(kept, sign, kinds)
                return rest, [*excluded, (keep, kind)]
    return term, []


def _score_first(score: Any) -> Any:
    """Sums written with the score first: torch adds alike both ways."""
    if name_of(score) != "f_add" or not score.has(s):
        return score
    first, second = sorted(score.args, key=lambda arg: not arg.has(s))
    return call("f_add", _score_first(first), second)


def _fold_scale(score: Any) -> tuple[Any, float]:
    """The factor that `s` is multiplied by wherever it occurs, taken out of the formula."""
    scale = 1.0
    while (scaled := _scaled_score(score)) is not None:  # `tanh(s / 50)` stays: it is a softcap
        product, factor = scaled
        without = score.xreplace({product: sympy.Symbol("scaled")})
        if without.has(s):
            break
        score, scale = without.xreplace({sympy.Symbol("scaled"): s}), scale * factor
    return score, scale


def _scaled_score(score: Any) -> tuple[Any, float] | None:
    calls = score.atoms(AppliedUndef)
    capped = {x.args[0] for x in calls if name_of(x) == "f_tanh"}
    products = [x for x in calls - capped if name_of(x) in ("f_mul", "f_div") and s in x.args]
    for product in sorted(products, key=str):
        other = product.args[1] if product.args[0] == s else product.args[0]
        value = const_value(other)
        if value is not None and value > 0 and (name_of(product) == "f_mul" or product.args[0] == s):
            return product, value if name_of(product) == "f_mul" else 1.0 / value
    return None
