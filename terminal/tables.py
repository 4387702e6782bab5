"""Tables whose texts are plain: nothing in them is markup, and what would act on a terminal is escaped.

No text is cut, at any width, and only long words are broken (:data:`LONG`): cells are wrapped between words, and
where the columns leave no room for theirs, each row becomes a block of lines, one for each column.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..printable import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table as RichTable
    from rich.text import Text

LONG, LONG_PATH = 1 / 2, 1 / 3
"""Shares of a line from which on a word may be broken, and one with slashes, such as a path or a spec."""

_FRAME = 3
"""Characters of a column beside its text: a line and a space on either side."""


@dataclass
class Column:
    """A column: its header, and the texts of its cells."""

    header: str
    justify: Literal["left", "right"] = "left"
    cells: list[str] = field(default_factory=list)


class Table:
    """A table of texts that may come from anybody. A ``caption`` may have several lines.

    :meth:`lines` and :meth:`record_lines` are text, in columns or in blocks; :meth:`styled` and :meth:`records` are
    those with styles, for :mod:`rich`. Blocks are for a terminal that is too narrow for the columns (:meth:`fits`).
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
        """The table as text without styles: each row on one line of any length, so that no text of it is broken.

        With ``width``, the widest columns are wrapped into lines of as many characters. A row takes some microseconds
        here, and about a millisecond where :mod:`rich` lays it out.
        """
        natural = self._natural()
        widths = self._fitted(width, natural)
        narrow = widths != natural
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
        for line in _wrapped_row(texts, widths) if narrow else [texts]:
            padded = [
                text.rjust(width - _width(text) + len(text))
                if column.justify == "right"
                else text.ljust(width - _width(text) + len(text))
                for text, width, column in zip(line, widths, self.columns, strict=True)
            ]
            yield f"{between} {f' {between} '.join(padded)} {between}"

    def record_lines(self, width: int) -> Iterator[str]:
        """Each row as lines of ``width`` characters, some for each column that has a text there, without styles."""
        return (name + text for name, text in self._records(width))

    def _records(self, width: int) -> Iterator[tuple[str, str]]:
        """The lines of :meth:`record_lines`, each in two: the name of a column, and its text."""
        if self.title is not None:
            yield from (("", line) for line in _wrapped(printable(self.title), width))
        names = max((_width(column.header) for column in self.columns), default=0)
        for place, row in enumerate(zip(*(column.cells for column in self.columns), strict=True)):
            if place or self.title is not None:
                yield "", ""
            for column, text in zip(self.columns, row, strict=True):
                if text:
                    yield from _record(column.header, text, names, width)
        if self.caption is not None:
            yield "", ""
            for caption in printable(self.caption, lines=True).splitlines():
                yield from (("", line) for line in _wrapped(caption, width))

    def fits(self, width: int) -> bool:
        """Whether lines of ``width`` characters hold the columns with no word broken that is not :data:`LONG`."""
        return sum(self._least(width)) + self._frames <= width

    @property
    def _frames(self) -> int:
        return _FRAME * len(self.columns) + 1

    def _natural(self) -> list[int]:
        """The columns' widths where there is room for everything."""
        return [max(map(_width, (column.header, *column.cells))) for column in self.columns]

    def _least(self, width: int) -> list[int]:
        """The columns' least widths: those of their longest words."""
        words = ([word for text in (column.header, *column.cells) for word in text.split()] for column in self.columns)
        return [max((_least_of(word, width) for word in each), default=0) for each in words]

    def _fitted(self, width: int | None, natural: list[int]) -> list[int]:
        """The columns' widths in lines of ``width`` characters, for which :meth:`fits` must hold: wide columns share
        what the others leave of their ``natural`` widths."""
        if width is None or sum(natural) + self._frames <= width:
            return natural
        least = self._least(width)

        def of(most: int) -> list[int]:
            return [max(low, min(high, most)) for low, high in zip(least, natural, strict=True)]

        caps = range(max(natural) + 1)
        return of(bisect.bisect_right(caps, width - self._frames, key=lambda most: sum(of(most))) - 1)

    def records(self, width: int) -> Text:
        """What :meth:`record_lines` has, with styles."""
        from rich.text import Text

        lines = [Text.assemble((name, "table.header"), text) for name, text in self._records(width)]
        return Text("\n").join(lines)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable]:
        yield self.styled(options.max_width)

    def styled(self, width: int) -> RichTable:
        """The table in columns, in lines of ``width`` characters."""
        from rich.table import Table as RichTable
        from rich.text import Text

        made = RichTable(title=None if self.title is None else Text(printable(self.title), style="table.title"))
        if self.caption is not None:
            made.caption = Text(printable(self.caption, lines=True), style="table.caption")
        for column, chars in zip(self.columns, self._fitted(width, self._natural()), strict=True):
            made.add_column(Text(column.header), justify=column.justify, overflow="fold", width=chars)
        for number, row in enumerate(zip(*(column.cells for column in self.columns), strict=True), 1):
            made.add_row(*map(Text, row), end_section=number in self._sections)
        return made


def _width(text: str) -> int:
    """How many characters of a terminal a text takes: some take two."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _least_of(word: str, width: int) -> int:
    """The characters that a column of a line of ``width`` characters needs for a word."""
    return min(_width(word), max(1, int((LONG_PATH if "/" in word else LONG) * width)))


def _wrapped_row(texts: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
    parts = [_wrapped(text, width) for text, width in zip(texts, widths, strict=True)]
    return [[of[line] if line < len(of) else "" for of in parts] for line in range(max(map(len, parts)))]


def _wrapped(text: str, width: int) -> list[str]:
    """The text in lines of ``width`` characters, broken between words, or inside one that is longer."""
    if _width(text) <= width:
        return [text]
    from rich.cells import chop_cells

    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if _width(joined) <= width:
            lines[-1] = joined
            continue
        lines = [*filter(None, lines), *chop_cells(word, max(1, width))]
    return lines


def _record(name: str, text: str, names: int, width: int) -> Iterator[tuple[str, str]]:
    """The lines of a column in a block: its name in ``names`` characters and its text, or one below the other."""
    indent = names + 2
    if width < 2 * indent:
        indent = 2
        yield from ((line, "") for line in _wrapped(name, width))
        name = ""
    for line in _wrapped(text, width - indent):
        yield name + " " * (indent - _width(name)), line
        name = ""


def _rule(parts: str, widths: Sequence[int]) -> str:
    left, line, between, right = (*parts,)
    return left + between.join(line * (width + 2) for width in widths) + right


def bar(share: float, width: int) -> str:
    """A bar of ``width`` characters at most, filled from the left to ``share``, which is from 0 to 1."""
    from rich.bar import Bar
    from rich.console import Console

    drawn = Console(width=width).render(Bar(size=1.0, begin=0.0, end=share, width=width))
    return "".join(segment.text for segment in drawn).rstrip()
