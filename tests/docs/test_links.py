"""The links of the pages that are read where they lie (Sphinx checks the site's own): each leads to a file, and to a
heading of it where it names one.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from .pages import ROOT

READ_IN_PLACE = ("README.md", "CONTRIBUTING.md", "templates/README.md", "benchmarks/README.md")


def inline(text: str) -> list[Token]:
    return [child for token in MarkdownIt().enable("table").parse(text) for child in token.children or ()]


def links(text: str) -> list[str]:
    found = [token.attrs.get("href") or token.attrs.get("src") for token in inline(text)]
    return [str(link) for link in found if link]


def anchors(text: str) -> set[str]:
    """The names that a heading is linked by: lower case, without punctuation, spaces as hyphens."""
    tokens = MarkdownIt().parse(text)
    titles = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    wrong = []
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", READ_IN_PLACE)
def test_a_relative_link_leads_to_a_file_and_a_heading(page: str) -> None:
    assert broken(ROOT / page) == []


def test_a_link_that_leads_nowhere_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One, two\n[here](#one-two) [no](#three) [gone](gone.md) [out](https://example.org) [up](..)\n")
    assert broken(page) == ["#three", "gone.md"]
