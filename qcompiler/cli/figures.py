"""Figures on the terminal: sizes, times, and tables that never crop a number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

__all__ = ["FigureTable", "facts", "size", "span"]

_GAP = 2
"""Blanks between columns."""

_LEAST, _LONGEST_WORD = 9, 24
"""A column of text wraps down to its longest word, but no further than 9; words above 24, which
are node names as a rule, are broken."""


@dataclasses.dataclass
class _Column:
    title: str
    numeric: bool
    cells: list[str | Text] = dataclasses.field(default_factory=list)

    def widths(self) -> tuple[int, int]:
        """Columns of the terminal it wants, and the fewest it can do with."""
        texts = [line for text in (self.title, *self.cells) for line in str(text).split("\n")]
        wanted = max(map(cell_len, texts))
        if self.numeric:
            return wanted, wanted
        word = max(cell_len(word) for text in texts for word in (text.split() or [""]))
        return wanted, min(wanted, max(min(word, _LONGEST_WORD), _LEAST))


class FigureTable:
    r"""A table without lines.

    Where it is too wide, text wraps first, down to its longest word; then the columns called
    `droppable` go, in that order; at last each row becomes a list of names and values.  A title
    that starts with ">" is of figures: aligned right and always whole.  "\n" breaks a line.
    """

    def __init__(self, *titles: str, droppable: Sequence[str] = ()) -> None:
        self._columns = [_Column(t.removeprefix(">"), t.startswith(">")) for t in titles]
        self._droppable = tuple(droppable)

    def add_row(self, *cells: str | Text) -> None:
        """Add a row; cells at its end may be left out."""
        missing = len(self._columns) - len(cells)
        for column, cell in zip(self._columns, [*cells, *[""] * missing], strict=True):
            column.cells.append(cell)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """Lay it out for the width at hand."""
        shown = list(self._columns)
        for title in (None, *self._droppable):
            shown = [column for column in shown if column.title != title]
            widths = _fit([column.widths() for column in shown], options.max_width)
            if widths is not None:
                yield _side_by_side(shown, widths)
                return
        yield from self._stacked()

    def _stacked(self) -> Iterator[RenderableType]:
        titles = [column.title.replace("\n", " ") for column in self._columns]
        rows = zip(*(column.cells for column in self._columns), strict=True)
        for index, row in enumerate(rows):
            if index:
                yield ""
            pairs = zip(titles, row, strict=True)
            yield facts(*((title, cell) for title, cell in pairs if str(cell)))


def facts(*rows: tuple[str, str | Text]) -> Table:
    """Names and values, aligned."""
    table = Table(box=None, show_header=False, padding=(0, _GAP, 0, 0), pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def size(count: float) -> str:
    """Bytes, in powers of a thousand: "91.0 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def span(seconds: float) -> str:
    """A time with three digits: "16.9 ms"."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            value = seconds * factor
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    raise AssertionError


def _fit(wishes: Sequence[tuple[int, int]], available: int) -> list[int] | None:
    """Widths that add up to no more than is available, taken from the widest; None if none do."""
    widths, least = [wanted for wanted, _ in wishes], [fewest for _, fewest in wishes]
    excess = sum(widths) + _GAP * (len(widths) - 1) - available
    for _ in range(excess):
        spare = [index for index, width in enumerate(widths) if width > least[index]]
        if not spare:
            return None
        widths[max(spare, key=widths.__getitem__)] -= 1
    return widths


def _side_by_side(columns: Sequence[_Column], widths: Sequence[int]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, _GAP, 0, 0), pad_edge=False)
    for column, width in zip(columns, widths, strict=True):
        table.add_column(
            Text(column.title), width=width, justify="right" if column.numeric else "left",
            vertical="top", overflow="fold",
        )  # fmt: skip
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table
