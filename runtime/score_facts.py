"""What a score's formula says about itself: how it is made of the plain score, and what that allows.

Kernels take sums, partial softmaxes add up unless a score hides whole rows, and a score that may be -inf is a mask of its own. All of
this is read off the text, so that the compiler, the planner and every rank decide alike.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from autoseq.runtime.float_functions import constant
from autoseq.runtime.formula import SCORE, SYMBOLS, capture_number, function_name, parse_score


@functools.lru_cache(maxsize=256)
def additive_terms(score: str) -> tuple[sympy.Basic, ...] | None:
    """The terms t of a score that is `s + t + ...`, in the order they are added; None for any other score."""
    terms, expression = [], parse_score(score)
    while expression != SCORE:
        if function_name(expression) != "f_add":
            return None
        with_s = [arg for arg in expression.args if SCORE in arg.free_symbols]
        if len(with_s) != 1:
            return None
        terms += [arg for arg in expression.args if arg is not with_s[0]]
        expression = with_s[0]
    return tuple(reversed(terms))


@functools.lru_cache(maxsize=256)
def needs_whole_rows(score: str, learned: tuple[int, ...] = ()) -> bool:
    """Whether a score may be a mask in disguise: very large negative numbers, beside which s and a row's own sum are rounded away.

    The parts of such a row's softmax do not add up, so it is computed in one piece. It may hide in a constant, or in a tensor over
    queries and keys that nobody learns (`learned` are the captures that get a gradient).
    """
    return _may_hide_rows(parse_score(score), learned)


_LARGE = 1000


def _may_hide_rows(node: Any, learned: tuple[int, ...]) -> bool:
    number = capture_number(node)
    if number is not None:
        # What is looked up within an index is an integer: then the outer tensor is a table, and not one entry for each pair.
        by_lookup = any(capture_number(inner) is not None for arg in node.args for inner in arg.atoms(AppliedUndef))
        dense = {SYMBOLS["q"], SYMBOLS["k"]} <= node.free_symbols
        return number not in learned and dense and not by_lookup
    if function_name(node) == "mask":
        return True
    if function_name(node) == "const":
        return _LARGE <= abs(constant(*map(int, node.args))) < float("inf")
    if isinstance(node, AppliedUndef):
        return any(_may_hide_rows(arg, learned) for arg in node.args)
    if isinstance(node, sympy.logic.boolalg.Boolean):
        return False
    # A large summand is a distance; a large factor or choice may be what a mask is multiplied by.
    parts = [arg for arg in node.args if not (node.is_Add and arg.is_Integer)]
    return _is_large(node) or any(_may_hide_rows(part, learned) for part in parts)


def _is_large(node: Any) -> bool:
    return node.is_Integer and abs(int(node)) >= _LARGE


@functools.lru_cache(maxsize=256)
def makes_infinity(score: str) -> bool:
    """Whether a score may be -inf by what is written in it, whatever it looks up."""
    return _makes_infinity(parse_score(score))


def _makes_infinity(node: Any) -> bool:
    if isinstance(node, AppliedUndef):
        name = function_name(node)
        if capture_number(node) is not None or name == "to_int":
            return False  # an index is an integer, whatever it is made of
        if name in ("f_log", "f_log2") or (name == "const" and math.isinf(constant(*map(int, node.args)))):
            return True
    return any(_makes_infinity(part) for part in node.args)


@functools.lru_cache(maxsize=256)
def looked_up(score: str) -> tuple[int, ...]:
    """The numbers of the captures that a score looks up."""
    numbers = {capture_number(node) for node in parse_score(score).atoms(AppliedUndef)}
    return tuple(sorted(number for number in numbers if number is not None))
