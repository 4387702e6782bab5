"""Tables whose texts are plain: nothing in them is markup, and what would act on a terminal is escaped.

No text is cut, at any width: it is folded, and where columns would be too narrow to read, each row becomes a block of
lines, one for each column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..printable import printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable

NARROW = 12
"""Characters that a column needs to be read, unless its words are shorter."""

_FRAME = 3
"""Characters of a column beside its text: a line and a space on either side."""


@dataclass
class Column:
    """A column: its header, and the texts of its cells."""

    header: str
    justify: Literal["left", "right"] = "left"
    cells: list[str] = field(default_factory=list)


class Table:
    """A table of texts that may come from anybody.

    :meth:`lines` lays it out plainly; :mod:`rich` does so with styles, for a terminal, where :meth:`records` are for
    one that is too narrow for the columns (:meth:`fits`). A ``caption`` may have several lines.
    """

    def __init__(self, *headers: str, title: str | None = None) -> None:
        self.title = title
        self.caption: str | None = None
        self.columns = [Column(printable(header)) for header in headers]
        self.row_count = 0
        self._sections: set[int] = set()

    def add_column(self, header: object, *, justify: Literal["left", "right"] = "left") -> None:
        """Add a column on the right."""
        self.columns.append(Column(printable(header), justify))

    def add_row(self, *cells: object) -> None:
        """Add a row: a text for each column, or for the first ones."""
        if len(cells) > len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        for column, cell in zip(self.columns, cells, strict=False):
            column.cells.append(printable(cell))
        for column in self.columns[len(cells) :]:
            column.cells.append("")
        self.row_count += 1

    def add_section(self) -> None:
        """Draw a line below the last row, if another one follows."""
        self._sections.add(self.row_count)

    def lines(self, width: int | None = None) -> Iterator[str]:
        """The table as text without styles: each row on one line of any length, so that no text of it is cut.

        With ``width``, the widest columns are folded into as many characters. A row takes some microseconds here, and
        about a millisecond where :mod:`rich` lays it out.
        """
        widths = [max(map(_width, (column.header, *column.cells))) for column in self.columns]
        narrow = width is not None and _narrow(widths, width - _FRAME * len(widths) - 1)
        if self.title is not None:
            yield printable(self.title)
        yield _rule("┏━┳┓", widths)
        headers = [column.header for column in self.columns]
        yield from self._row(headers, widths, narrow, "┃")
        yield _rule("┡━╇┩", widths)
        for number, row in enumerate(zip(*(column.cells for column in self.columns), strict=True)):
            if number in self._sections and number:
                yield _rule("├─┼┤", widths)
            yield from self._row(row, widths, narrow, "│")
        yield _rule("└─┴┘", widths)
        if self.caption is not None:
            yield printable(self.caption, lines=True)

    def _row(self, texts: Sequence[str], widths: Sequence[int], narrow: bool, between: str) -> Iterator[str]:
        """The lines of one row: one, unless a text is wider than its column."""
        lines = [texts] if not narrow else _folded(texts, widths)
        for line in lines:
            padded = [
                text.rjust(width - _width(text) + len(text))
                if column.justify == "right"
                else text.ljust(width - _width(text) + len(text))
                for text, width, column in zip(line, widths, self.columns, strict=True)
            ]
            yield f"{between} {f' {between} '.join(padded)} {between}"

    def fits(self, width: int) -> bool:
        """Whether every column would be wide enough to be read in lines of ``width`` characters."""
        needs = 1
        for column in self.columns:
            words = (word for text in (column.header, *column.cells) for word in text.split())
            needs += min(NARROW, max(map(_width, words), default=0)) + _FRAME
        return needs <= width

    def records(self) -> RichTable:
        """Each row as lines, one for each column that has a text there, with an empty line between two rows."""
        from rich.table import Table as RichTable
        from rich.text import Text

        grid = RichTable.grid(padding=(0, 2, 0, 0))
        grid.add_column()
        grid.add_column(overflow="fold")
        if self.title is not None:
            grid.add_row(Text(), Text(printable(self.title), style="table.title"))
        for place, row in enumerate(zip(*(column.cells for column in self.columns), strict=True)):
            if place or self.title is not None:
                grid.add_row()
            for column, text in zip(self.columns, row, strict=True):
                if text:
                    grid.add_row(Text(column.header, style="table.header"), Text(text))
        if self.caption is not None:
            grid.add_row()
            grid.add_row(Text(), Text(printable(self.caption, lines=True), style="table.caption"))
        return grid

    def __rich__(self) -> RichTable:
        from rich.table import Table as RichTable
        from rich.text import Text

        made = RichTable(title=None if self.title is None else Text(printable(self.title), style="table.title"))
        if self.caption is not None:
            made.caption = Text(printable(self.caption, lines=True), style="table.caption")
        for column in self.columns:
            made.add_column(Text(column.header), justify=column.justify, overflow="fold")
        for number, row in enumerate(zip(*(column.cells for column in self.columns), strict=True), 1):
            made.add_row(*map(Text, row), end_section=number in self._sections)
        return made


def _width(text: str) -> int:
    """How many characters of a terminal a text takes: some take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _narrow(widths: list[int], most: int) -> bool:
    """Narrow the widest columns until all together take at most ``most`` characters; say whether that was needed."""
    if sum(widths) <= most:
        return False
    while (surplus := sum(widths) - most) > 0 and (widest := max(widths)) > NARROW:
        places = [place for place, width in enumerate(widths) if width == widest]
        next_widest = max((width for width in widths if width < widest), default=0)
        for place in places:
            widths[place] = max(next_widest, widest - -(-surplus // len(places)), NARROW)
    return True


def _folded(texts: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
    from rich.cells import chop_cells

    parts = [
        [text] if _width(text) <= width else chop_cells(text, width) for text, width in zip(texts, widths, strict=True)
    ]
    return [[of[line] if line < len(of) else "" for of in parts] for line in range(max(map(len, parts)))]


def _rule(parts: str, widths: Sequence[int]) -> str:
    left, line, between, right = (*parts,)
    return left + between.join(line * (width + 2) for width in widths) + right


def bar(share: float, width: int) -> str:
    """A bar of ``width`` characters at most, filled from the left to ``share``, which is from 0 to 1."""
    from rich.bar import Bar
    from rich.console import Console

    drawn = Console(width=width).render(Bar(size=1.0, begin=0.0, end=share, width=width))
    return "".join(segment.text for segment in drawn).rstrip()
