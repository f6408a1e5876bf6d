"""Tables fit 80 columns, or fewer, and split no word: with borders, without, or a few lines a row."""

import io

import pytest
from rich.console import Console

from autoseq.graph_folding import folded
from autoseq.tables import table

COLUMNS = ["data × sequence", "strategies", "layout", ":step", ":tokens/s", ":MFU", ":sent", ":memory a rank"]
ROW = ("1 × 8", "ulysses", "contiguous", "824 µs", "4,970,196", "3.6%", "8.04 MB", "15 MB")
MIXED = ("2 × 4", "26× hybrid_gather_outer, 6× ring", "contiguous", "824 µs", "4,970,196", "3.6%", "8.04 MB", "15 MB")


def shown(rows: list[tuple[str, ...]], width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, markup=False, highlight=False, soft_wrap=True).print(table("Plans", COLUMNS, rows))
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 80, 100, 160])
@pytest.mark.parametrize("rows", [[ROW, ROW], [ROW, MIXED]], ids=["short words", "a long word"])
def test_no_line_is_too_long_and_no_word_or_number_is_split(rows: list[tuple[str, ...]], width: int) -> None:
    text = shown(rows, width)
    assert max(map(len, text.splitlines())) <= width
    for row in rows:
        for cell, column in zip(row, COLUMNS, strict=True):
            for word in [cell] if column.startswith(":") else cell.split():
                assert word in text


def test_each_width_has_its_form() -> None:
    assert "┃" in shown([ROW], 160)
    assert "┃" not in shown([ROW], 80)
    assert shown([MIXED], 80).splitlines()[2:4] == ["  data × sequence  2 × 4", "  strategies       26× hybrid_gather_outer, 6× ring"]


def test_layers_of_a_graph_that_differ_in_numbers_are_shown_once() -> None:
    def layer(n: int) -> list[str]:
        return [f"op{i}_{n}: f32[4] = aten.op{i}(blocks.{n}.weight)" for i in "abcdefgh"]

    lines = list(folded(["start", *layer(0), *layer(1), *layer(2), "end"]))
    assert lines == ["start", *layer(0), "    … the 8 lines above 2 times more, with other numbers in their names", "end"]
    assert list(folded([*layer(0), "other", *layer(1)])) == [*layer(0), "other", *layer(1)]
