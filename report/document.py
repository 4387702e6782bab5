"""A report as a document: sections of words, tables and plots, whatever it will be written as.

Plots are made when they are asked for: Markdown needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .tables import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go

Figure = Callable[[], "go.Figure"]


@dataclass(frozen=True)
class Block:
    """A plot with the table behind it, or a table alone.

    ``finding`` is what both show, ``caption`` how to read the plot, and ``alt`` what it shows, for who cannot see it.
    ``detail``: left out where there is little room. ``wide``: the plot has parts side by side, and scrolls in its own
    box on a narrow screen.
    """

    key: str
    title: str
    table: Table | None = None
    alt: str = ""
    finding: str = ""
    caption: str = ""
    figure: Figure | None = None
    wide: bool = False
    detail: bool = False


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when they are asked for."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Section:
    """A heading, sentences, commands that bring what is missing, and blocks."""

    key: str
    title: str
    words: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    folds: tuple[Fold, ...] = ()

    @property
    def figures(self) -> list[Block]:
        """The blocks with a plot, those in folds too."""
        folded = [block for fold in self.folds for block in fold.blocks]
        return [block for block in (*self.blocks, *folded) if block.figure is not None]


@dataclass(frozen=True)
class Document:
    """The whole report: title, facts (name and value), notes, and sections."""

    title: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    sections: tuple[Section, ...] = field(default=())

    @property
    def figures(self) -> list[Block]:
        """The blocks with a plot."""
        return [block for section in self.sections for block in section.figures]
