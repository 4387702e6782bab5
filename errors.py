"""The errors that a user can cause or meet, as types.

Each message says what was wrong, where, and what to do. The command line prints only the message, without a traceback,
and exits with the class's ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from .printable import printable, shortened

_MOST_COMPARED = 200  # characters; comparing takes quadratic time


class DoratuneError(Exception):
    """A failure, explained by the message; exit code 1.

    A message may quote a store, a path or a config file: it is shortened, and what a terminal would not print is
    escaped.
    """

    exit_code = 1
    lines = True
    """Whether the message may have several lines, as a compiler's has."""

    def __init__(self, *args: object) -> None:
        texts = (printable(arg, lines=self.lines) if isinstance(arg, str) else arg for arg in args)
        super().__init__(*(shortened(text) if isinstance(text, str) else text for text in texts))


class UsageError(DoratuneError):
    """The request is wrong, for example an unknown name; exit code 2."""

    exit_code = 2
    lines = False


def near_names(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean a, b?`` for the known names close to ``name``, or an empty string."""
    close = difflib.get_close_matches(name[:_MOST_COMPARED].lower(), list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
