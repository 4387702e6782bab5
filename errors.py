"""The errors that a user can cause or meet, as types.

Each message says what was wrong, where, and what to do. The command line prints only the message, without a traceback,
and exits with the class's ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DoratuneError(Exception):
    """A failure, explained by the message; exit code 1."""

    exit_code = 1


class UsageError(DoratuneError):
    """The request is wrong, for example an unknown name; exit code 2."""

    exit_code = 2


def near_names(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean a, b?`` for the known names close to ``name``, or an empty string."""
    close = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
