"""The report as one HTML file that needs nothing else: plotly.js, style and data are inside, and nothing is requested.

A policy in the page allows its own two scripts, by their digests, and no request. So a text that came through as
markup by a mistake could still not run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from .. import __version__
from ..printable import printable
from .document import Block, Document
from .theme import DARK, FONT, LIGHT, MARKS, SCHEMES, template

GENERATOR = "doratune report"
"""Begins the ``generator`` of a page, by which a later report knows that it may be replaced."""

_FOLDER = Path(__file__).parent
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def page(document: Document) -> str:
    """The HTML text. plotly must be installed where the document has a plot."""
    library = script = ""
    if document.figures:
        from plotly.offline import get_plotlyjs

        library, script = get_plotlyjs(), _read("page.js")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    css = environment.overlay(autoescape=False).get_template("page.css")
    environment.filters["code"] = _with_code
    text = environment.get_template("page.html.j2").render(
        document=document,
        generator=f"{GENERATOR} {__version__}",
        policy=_policy(library, script),
        style=Markup(css.render(schemes=SCHEMES, font=FONT)),
        figures=Markup(_data(document)),
        library=Markup(library),
        script=Markup(script),
    )
    return text.lstrip()


def figure_of(block: Block) -> dict[str, Any]:
    """The plot of a block as plain values, ready for JSON, without plotly's own template: it has colours."""
    assert block.figure is not None
    values: dict[str, Any] = json.loads(block.figure().to_json())
    values["layout"].pop("template", None)
    return values


def _with_code(sentence: str) -> Markup:
    """A sentence, escaped, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(printable(sentence)))))


def _shown(value: object) -> object:
    """A text with what is invisible or reverses its direction escaped; markup of this module as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _data(document: Document) -> str:
    """The plots as JSON that cannot end its script element."""
    data = {
        "figures": {block.key: figure_of(block) for block in document.figures},
        "marks": MARKS,
        "templates": {scheme: template(scheme) for scheme in (LIGHT, DARK)},
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter, escaped in _UNSAFE.items():
        text = text.replace(letter, escaped)
    return text


def _policy(*scripts: str) -> str:
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts if script) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
