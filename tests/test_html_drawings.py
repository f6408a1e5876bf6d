"""Pictures of ranks and masks say what they are drawn from."""

from itertools import pairwise

import pytest

from autoseq.html_drawings import Drawing, mask_drawing, message_drawing, messages, placement_drawing, placements, splits_heads
from autoseq.runtime.layout import Layout
from autoseq.runtime.strategies import STRATEGIES
from autoseq.runtime.strategy import Site

CELLS = 16


def site(max_ahead: int | None = 0, max_behind: int | None = None, k_len: int = 64) -> Site:
    sizes = {"batch": 1, "heads": 4, "kv_heads": 4, "head_dim": 8, "value_dim": 8, "element_bytes": 4}
    return Site(q_len=64, k_len=k_len, max_ahead=max_ahead, max_behind=max_behind, **sizes)


def cells(drawing: Drawing) -> set[tuple[int, int]]:
    """Row and column of each cell that is filled."""
    found = set()
    for shape in drawing.shapes[1:]:
        x, y, width, _ = (float(value) for _, value in shape.geometry)
        found |= {(round(y / 4), round(x / 4) + column) for column in range(round(width / 4))}
    return found


@pytest.mark.parametrize(
    "drawn",
    [
        pytest.param(site(), id="causal"),
        pytest.param(site(max_ahead=None), id="no mask"),
        pytest.param(site(max_behind=9), id="a window"),
        pytest.param(site(max_ahead=5, max_behind=5), id="a band"),
        pytest.param(site(max_ahead=-1), id="rows without keys"),
        pytest.param(site(max_ahead=16, k_len=80), id="more keys than queries"),
    ],
)
def test_a_cell_of_a_mask_is_filled_where_any_pair_of_it_is_left(drawn: Site) -> None:
    def is_left(q: int, k: int) -> bool:
        ahead = drawn.max_ahead is None or k - q <= drawn.max_ahead
        return ahead and (drawn.max_behind is None or q - k <= drawn.max_behind)

    step_q, step_k = drawn.q_len // CELLS, drawn.k_len // CELLS
    expected = {
        (row, column)
        for row in range(CELLS) for column in range(CELLS)
        if any(is_left(q, k) for q in range(row * step_q, (row + 1) * step_q) for k in range(column * step_k, (column + 1) * step_k))
    }  # fmt: skip
    assert cells(mask_drawing(drawn, 4, "contiguous", by_rank=False)) == expected


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        pytest.param("contiguous", [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4, id="contiguous"),
        pytest.param("zigzag", [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 2, 2, 1, 1, 0, 0], id="zigzag"),
    ],
)
def test_rows_of_a_mask_have_the_colour_of_the_rank_that_holds_them(layout: Layout, expected: list[int]) -> None:
    drawing = mask_drawing(site(), 4, layout, by_rank=True)
    assert [shape.classes for shape in drawing.shapes[1:]] == [f"rank{rank}" for rank in expected]


def test_a_shard_is_drawn_as_slices_that_cover_the_sequence_once() -> None:
    for layout in ("contiguous", "zigzag"):
        shapes = [dict(shape.geometry) for shape in placements(4, layout)[0].shapes if shape.classes.startswith("rank")]
        slices = sorted((float(shape["y"]), float(shape["height"])) for shape in shapes)
        assert sum(height for _, height in slices) == pytest.approx(22, abs=0.1)
        assert all(below == pytest.approx(y + height, abs=0.02) for (y, height), (below, _) in pairwise(slices))


def test_every_kind_of_message_and_every_strategy_has_a_drawing() -> None:
    defined = {drawing.name for drawing in messages(4)}
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "take_shard")
    assert {message_drawing(kind) for kind in kinds} | {message_drawing("send", name) for name in STRATEGIES} <= defined
    assert message_drawing("something else") == ""


def test_every_rank_sends_to_every_other_in_an_all_to_all_and_to_the_next_in_a_ring() -> None:
    wires = {drawing.name: [s for s in drawing.shapes if s.tag == "line"] for drawing in messages(4)}
    assert (len(wires["send-all_to_all"]), len(wires["send-ring"]), len(wires["send-halo"])) == (16, 4, 3)


def test_placements_have_drawings_and_unknown_ones_none() -> None:
    drawn = {"Shard(1)": "hold-shard", "Replicate": "hold-replicate", "Partial": "hold-partial", "": ""}
    assert {text: placement_drawing(text) for text in drawn} == drawn


def test_strategies_that_split_heads_are_those_that_say_so() -> None:
    assert {name for name in STRATEGIES if splits_heads(name)} == {
        name for name, strategy in STRATEGIES.items() if name == "ulysses" or hasattr(strategy, "heads_along")
    }
