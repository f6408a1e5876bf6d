"""Tables that fit the terminal without splitting a word: with borders, else without, else with lines of its own for each row."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

_BORDERS, _GAP = 3, 2
"""Characters beside the content of each column, with borders and without."""


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Group:
    """A titled table. Columns with `:` in front of their names are of numbers: right-aligned, and never wrapped."""
    return Group(Text(f"\n{title}", style="bold"), _Rows(columns, [[str(cell) for cell in row] for row in rows]))


class _Rows:
    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._columns, self._rows = columns, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        least = [self._least(number) for number in range(len(self._columns))]
        with_borders = options.max_width - _BORDERS * len(least) - 1
        without = options.max_width - _GAP * (len(least) - 1)
        if sum(least) <= with_borders:
            yield self._filled(Table(header_style="bold"), self._widths(least, with_borders))
        elif sum(least) <= without:
            bare = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
            yield self._filled(bare, self._widths(least, without))
        else:
            yield from self._as_lines(options.max_width)

    def _least(self, number: int) -> int:
        """The width of a column below which a word, or a number with its unit, would be split."""
        name, cells = self._columns[number], [row[number] for row in self._rows]
        whole = name.startswith(":")
        pieces = [piece for cell in cells for piece in (cell.splitlines() if whole else cell.split())]
        return max(map(len, [*name.removeprefix(":").split(), *pieces]), default=0)

    def _widths(self, least: Sequence[int], available: int) -> list[int]:
        """The least ones, and what is left over given, one by one, to the column that would wrap most."""
        cells = [[column.removeprefix(":"), *(row[i] for row in self._rows)] for i, column in enumerate(self._columns)]
        whole = [max(len(line) for cell in of_one for line in cell.splitlines() or [""]) for of_one in cells]
        widths = list(least)
        for _ in range(available - sum(least)):
            lacking = max(range(len(widths)), key=lambda i: whole[i] / max(1, widths[i]))
            widths[lacking] += widths[lacking] < whole[lacking]
        return widths

    def _filled(self, made: Table, widths: Sequence[int]) -> Table:
        for column, width in zip(self._columns, widths, strict=True):
            made.add_column(column.removeprefix(":"), justify="right" if column.startswith(":") else "left", width=width)
        for row in self._rows:
            made.add_row(*map(Text, row))
        return made

    def _as_lines(self, width: int) -> Iterable[Text]:
        """`name value` a line, an empty line between rows; what is longer than a line goes on below, behind the names."""
        names = [column.removeprefix(":") for column in self._columns]
        indent = max(map(len, names)) + 4
        for number, row in enumerate(self._rows):
            if number:
                yield Text("")
            for name, cell in zip(names, row, strict=True):
                first, *more = _wrapped(" ".join(cell.split("\n")), max(20, width - indent))
                yield Text(f"  {name:<{indent - 2}}{first}".rstrip())
                yield from (Text(" " * indent + line) for line in more)


def _wrapped(text: str, width: int) -> list[str]:
    """In lines of whole words."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
