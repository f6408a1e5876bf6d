"""The factor notation: what a pattern says, how it binds to sizes, and where a sequence goes inside products of factors."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from autoseq.passes.factors import Factors, Mark, Place, bind, fits, locate, parse_pattern, place_in, product, reshape_dims

SPREAD = None

PARSED = [
    pytest.param("m k, k n -> m n", [[("m",), ("k",)], [("k",), ("n",)]], [[("m",), ("n",)]], "", "k", id="a contraction is summed"),
    pytest.param("... i, o i -> ... o", [[SPREAD, ("i",)], [("o",), ("i",)]], [[SPREAD, ("o",)]], "", "i", id="leading dims"),
    pytest.param("v! e, ... -> ... e", [[("v",), ("e",)], [SPREAD]], [[SPREAD, ("e",)]], "v", "", id="a whole factor is not summed"),
    pytest.param("(b s) v -> b s v", [[("b", "s"), ("v",)]], [[("b",), ("s",), ("v",)]], "", "", id="a product of factors"),
    pytest.param("k, k ->", [[("k",)], [("k",)]], [[]], "", "k", id="a result of no dims"),
    pytest.param("n -> n, n", [[("n",)]], [[("n",)], [("n",)]], "", "", id="two results"),
    pytest.param("b_ n0 -> n0 b_", [[("b_",), ("n0",)]], [[("n0",), ("b_",)]], "", "", id="names of several letters"),
]


@pytest.mark.parametrize(("text", "operands", "results", "whole", "sums"), PARSED)
def test_parse_pattern(text: str, operands: list[Any], results: list[Any], whole: str, sums: str) -> None:
    pattern = parse_pattern(text)
    assert [list(dims) for dims in pattern.operands] == operands and [list(dims) for dims in pattern.results] == results
    assert pattern.whole == set(whole.split()) and pattern.sums == set(sums.split())


def test_brackets_mark_an_optional_operand() -> None:
    assert parse_pattern("... i, o i, [o] -> ... o").optional == (False, False, True)


BOUND = [
    pytest.param("m k, k n -> m n", [(2, 3), (3, 4)], [(2, 4)], {"m": 2, "k": 3, "n": 4}, id="plain"),
    pytest.param("... i, o i -> ... o", [(5, 2, 3), (4, 3)], [(5, 2, 4)], {"_2": 5, "_1": 2, "i": 3, "o": 4}, id="two leading dims"),
    pytest.param("... i, o i -> ... o", [(3,), (4, 3)], [(4,)], {"i": 3, "o": 4}, id="no leading dims"),
    pytest.param("..., ... -> ...", [(5, 2), (2,)], [(5, 2)], {"_2": 5, "_1": 2}, id="leading dims align from the right"),
    pytest.param("..., ... -> ...", [(5, 1), (2,)], [(5, 2)], {"_2": 5, "_1": 2}, id="a dim of size 1 has no factor"),
    pytest.param("(b s) v -> b s v", [(6, 4)], [(2, 3, 4)], {"v": 4, "b": 2, "s": 3}, id="a product is sized by the side that splits it"),
    pytest.param("b s -> (b s)", [(2, 3)], [(6,)], {"b": 2, "s": 3}, id="factors that are merged"),
]


@pytest.mark.parametrize(("text", "shapes", "results", "sizes"), BOUND)
def test_bind(text: str, shapes: list[Any], results: list[Any], sizes: dict[str, int]) -> None:
    factors = bind(parse_pattern(text), shapes, results)
    assert factors is not None and factors.sizes == sizes


UNBOUND = [
    pytest.param("m k, k n -> m n", [(2, 3), (5, 4)], [(2, 4)], id="a factor of two sizes"),
    pytest.param("m k, k n -> m n", [(2, 3, 3), (3, 4)], [(2, 4)], id="a dim too many"),
    pytest.param("... i, o i -> ... o", [(), (4, 3)], [(4,)], id="a dim too few"),
    pytest.param("..., ... -> ...", [(3,), (2,)], [(3,)], id="what does not broadcast"),
    pytest.param("(b s) v -> b s v", [(7, 4)], [(2, 3, 4)], id="a product of another size"),
    pytest.param("(b s) -> (s b)", [(6,)], [(6,)], id="a product whose factors have no size"),
    pytest.param("m n -> m n", [(2, 3)], [(3, 2)], id="a result of other sizes"),
]


@pytest.mark.parametrize(("text", "shapes", "results"), UNBOUND)
def test_shapes_that_do_not_fit_are_not_covered(text: str, shapes: list[Any], results: list[Any]) -> None:
    assert bind(parse_pattern(text), shapes, results) is None


def test_an_absent_operand_stays_absent() -> None:
    factors = bind(parse_pattern("... i, o i, [o] -> ... o"), [(2, 3), (4, 3), None], [(2, 4)])
    assert factors is not None and factors.operands[2] is None


def test_what_becomes_of_a_factor() -> None:
    factors = bind(parse_pattern("v! e, b k, k e -> b e"), [(9, 4), (2, 3), (3, 4)], [(2, 4)])
    assert isinstance(factors, Factors)
    assert not factors.passes("v") and factors.passes("e") and factors.passes("k")
    assert factors.is_partial("k") and not factors.is_partial("e") and factors.sums == {"k"}


# Where a sequence lies -------------------------------------------------------------------------------------------------

SIZES = {"b": 2, "s": 6, "h": 4, "x": 24}

LOCATED = [
    pytest.param((("b",), ("s",)), Mark(1, 1, 1, 6), Place("s", 1, 1, 6), id="a dim of its own"),
    pytest.param((("b", "s"),), Mark(0, 2, 1, 6), Place("s", 1, 1, 6), id="behind the batch in one dim"),
    pytest.param((("s", "h"),), Mark(0, 1, 4, 6), Place("s", 1, 1, 6), id="before the heads in one dim"),
    pytest.param((("b", "s", "h"),), Mark(0, 2, 4, 6), Place("s", 1, 1, 6), id="between the two"),
    pytest.param((("x",),), Mark(0, 2, 4, 3), Place("x", 2, 4, 3), id="inside a factor"),
    pytest.param((("b", "x"),), Mark(0, 4, 2, 6), Place("x", 2, 2, 6), id="inside a factor behind another"),
    pytest.param((("s", "h"),), Mark(0, 1, 1, 24), None, id="across two factors"),
    pytest.param((("b", "x"),), Mark(0, 3, 16, 1), None, id="cut across"),
    pytest.param(((), ("s",)), Mark(0, 1, 1, 1), None, id="a dim of size 1"),
]


@pytest.mark.parametrize(("dims", "mark", "place"), LOCATED)
def test_locate(dims: Any, mark: Mark, place: Place | None) -> None:
    assert locate(dims, SIZES, mark) == place


PLACED = [
    pytest.param((("b",), ("s",)), Place("s", 1, 1, 6), Mark(1, 1, 1, 6), id="a dim of its own"),
    pytest.param((("h",), ("b", "s")), Place("s", 1, 1, 6), Mark(1, 2, 1, 6), id="behind the batch"),
    pytest.param((("s", "h"),), Place("s", 1, 1, 6), Mark(0, 1, 4, 6), id="before the heads"),
    pytest.param((("b", "x", "h"),), Place("x", 2, 3, 4), Mark(0, 4, 12, 4), id="a part of a factor between others"),
    pytest.param((("b",),), Place("s", 1, 1, 6), None, id="not in this tensor"),
]


@pytest.mark.parametrize(("dims", "place", "mark"), PLACED)
def test_place_in(dims: Any, place: Place, mark: Mark | None) -> None:
    found = place_in(dims, SIZES, place)
    assert found is None if mark is None else mark.same(found)


FITTING = [
    pytest.param((2, 6), Mark(1, 1, 1, 6), True, id="the whole length"),
    pytest.param((2, 5), Mark(1, 1, 1, 6), True, id="a cut end"),
    pytest.param((2, 7), Mark(1, 1, 1, 6), False, id="longer than the space"),
    pytest.param((10,), Mark(0, 2, 1, 6), True, id="a cut end before it was merged"),
    pytest.param((11,), Mark(0, 2, 1, 6), False, id="not a whole number of rows"),
]


@pytest.mark.parametrize(("shape", "mark", "expected"), FITTING)
def test_fits(shape: tuple[int, ...], mark: Mark, expected: bool) -> None:
    assert fits(shape, mark) is expected


# Reshape ---------------------------------------------------------------------------------------------------------------

RESHAPES = [
    pytest.param((2, 6, 4), (12, 4), "f0 f1 f2", "(f0 f1) f2", id="merge"),
    pytest.param((12, 4), (2, 6, 4), "(f0 f1) f2", "f0 f1 f2", id="split"),
    pytest.param((2, 6, 8), (12, 2, 4), "f0 f1 (f2 f3)", "(f0 f1) f2 f3", id="merge and split"),
    pytest.param((2, 1, 6), (1, 2, 6, 1), "f0 . f1", ". f0 f1 .", id="dims of size 1 come and go"),
    pytest.param((2, 6), (2, 6), "f0 f1", "f0 f1", id="nothing"),
    pytest.param((6, 4), (4, 6), "f0! f1!", "f2! f3!", id="dims that do not nest are whole"),
    pytest.param((3, 6, 4), (3, 4, 6), "f0 f1! f2!", "f0 f3! f4!", id="only those that do not nest"),
    pytest.param((4, 6), (2, 12), "f0! f1!", "f2! f3!", id="across a border"),
    pytest.param((1, 1), (1,), ". .", ".", id="one element"),
    pytest.param((2, 0, 3), (0,), "f0 f1 f2", "(f0 f1 f2)", id="no elements"),
]


def words(dims: Any, whole: frozenset[str]) -> str:
    texts = [[name + "!" * (name in whole) for name in dim] for dim in dims]
    return " ".join("." if not t else t[0] if len(t) == 1 else f"({' '.join(t)})" for t in texts)


@pytest.mark.parametrize(("old", "new", "old_words", "new_words"), RESHAPES)
def test_reshape_dims(old: Any, new: Any, old_words: str, new_words: str) -> None:
    old_dims, new_dims, sizes, whole = reshape_dims(old, new)
    # The names are numbered in the order they are met; a group that does not nest counts its new side first.
    renamed = {name: f"f{i}" for i, name in enumerate(dict.fromkeys(n for d in (*old_dims, *new_dims) for n in d))}
    old_dims, new_dims = (tuple(tuple(renamed[n] for n in dim) for dim in dims) for dims in (old_dims, new_dims))
    whole = frozenset(renamed[n] for n in whole)
    assert (words(old_dims, whole), words(new_dims, whole)) == (old_words, new_words)
    assert set(renamed) == set(sizes)


@settings(deadline=None, derandomize=True)
@given(atoms=st.lists(st.integers(1, 5), min_size=1, max_size=5), cuts=st.tuples(st.integers(0, 31), st.integers(0, 31)))
def test_the_factors_of_a_reshape_multiply_up_and_keep_their_order(atoms: list[int], cuts: tuple[int, int]) -> None:
    old, new = (merged(atoms, cut) for cut in cuts)
    old_dims, new_dims, sizes, whole = reshape_dims(old, new)
    for shape, dims in ((old, old_dims), (new, new_dims)):
        assert [product([sizes[n] for n in dim]) for dim in dims] == shape
    # Both sides spell the same row-major order, but for groups that do not nest.
    assert [n for d in old_dims for n in d if n not in whole] == [n for d in new_dims for n in d if n not in whole]


def merged(atoms: list[int], cut: int) -> list[int]:
    dims = [1]
    for bit, atom in enumerate(atoms):
        dims = [*dims, atom] if cut >> bit & 1 else [*dims[:-1], dims[-1] * atom]
    return dims


def symbols(*hints: int) -> list[Any]:
    """Symbolic sizes of one shape environment."""
    env = ShapeEnv()
    sources = [ConstantSource(f"s{i}") for i in range(len(hints))]
    return [
        env.create_symintnode(env.create_symbol(hint, source, DimDynamic.DYNAMIC), hint=hint, source=source)
        for hint, source in zip(hints, sources, strict=True)
    ]


SYMBOLIC = [
    pytest.param(lambda B, S: (B, S, 4), lambda B, S: (B * S, 4), "f0 f1 f2", "(f0 f1) f2", id="merge"),
    pytest.param(lambda B, S: (B, S - 1, 4), lambda B, S: (B * (S - 1), 4), "f0 f1 f2", "(f0 f1) f2", id="merge a cut end"),
    pytest.param(lambda B, S: (B * S, 8), lambda B, S: (B, S, 2, 4), "(f0 f1) (f2 f3)", "f0 f1 f2 f3", id="split"),
    pytest.param(lambda B, S: (B, S), lambda B, S: (S, B), "f0! f1!", "f2! f3!", id="swapped sizes do not nest"),
    pytest.param(lambda B, S: (B, S), lambda B, S: (1, B, S), "f0 f1", ". f0 f1", id="a dim of size 1"),
]


@pytest.mark.parametrize(("old", "new", "old_words", "new_words"), SYMBOLIC)
def test_reshape_dims_of_symbolic_sizes(old: Any, new: Any, old_words: str, new_words: str) -> None:
    B, S = symbols(3, 5)
    test_reshape_dims(old(B, S), new(B, S), old_words, new_words)
    assert not B.node.shape_env.guards, "sizes are compared without guards"


def test_a_symbolic_sequence_inside_a_merged_dim_is_found() -> None:
    B, S = symbols(3, 5)
    old, _, sizes, _ = reshape_dims((B * S, 4), (B, S, 4))
    place = locate(old, sizes, Mark(0, B, 1, S))
    assert place is not None and (place.factor, place.outer, place.inner) == ("f1", 1, 1)
    assert fits((B * S, 4), Mark(0, B, 1, S)) and not fits((B * S + 1, 4), Mark(0, B, 1, S))
