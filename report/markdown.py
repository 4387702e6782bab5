"""The report as Markdown for a pull request: the words and the tables, without plots."""

from __future__ import annotations

import re

from ..printable import printable
from .document import Block, Document
from .tables import CODE, NUMBER, Table

MOST_ROWS = 30
"""Rows of a table: GitHub takes 65,536 characters for a comment."""

_SPECIAL = re.compile(r"([\\`*\[\]|~#])")
_UNDERSCORE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""An underscore inside a word is no emphasis."""


def markdown(document: Document) -> str:
    """The Markdown text; texts from stores and files are escaped, and can be no markup and mention nobody."""
    parts = [f"# {escaped(document.title)}"]
    if document.facts:
        parts.append("\n".join(f"- {escaped(name)}: **{escaped(value)}**" for name, value in document.facts))
    parts += [f"Note: {sentence(note)}." for note in document.notes]
    for section in document.sections:
        parts.append(f"## {escaped(section.title)}")
        parts += [sentence(words) for words in section.words]
        if section.commands:
            parts.append("\n".join(["```bash", *map(printable, section.commands), "```"]))
        for block in section.blocks:
            parts += _block(block)
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> list[str]:
    if block.table is None or not block.table.rows or block.detail:
        return []
    table = block.table.first(MOST_ROWS)
    parts = [f"### {escaped(block.title)}", *([sentence(block.finding)] if block.finding else []), _table(table)]
    if table.more:
        parts.append(f"{table.more} more rows; `doratune report --json` has all.")
    return parts


def _table(table: Table) -> str:
    head = [escaped(name) for name, _ in table.columns]
    rule = ["---:" if kind == NUMBER else "---" for _, kind in table.columns]
    kinds = [kind for _, kind in table.columns]
    body = [[_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True)] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def _cell(text: str, kind: str) -> str:
    text = printable(text)
    plain = text and not re.search(r"[`|<>\\]", text)
    return f"`{text}`" if kind == CODE and plain else escaped(text)


def sentence(text: str) -> str:
    """A sentence, escaped but for what stands between backticks, which is code."""
    parts = re.split(r"(`[^`]+`)", printable(text))
    return "".join(
        part if place % 2 and not re.search(r"[<>|]", part) else escaped(part) for place, part in enumerate(parts)
    )


def escaped(text: str) -> str:
    """A text that Markdown shows letter by letter."""
    text = _SPECIAL.sub(r"\\\1", printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    return _UNDERSCORE.sub(r"\\_", text).replace("@", "&#64;")  # which would mention somebody
