"""Text for terminals and messages: what came from a store, a path or a config file is shown, and never acts.

A control character in a GPU's name could clear a terminal or forge a line of output, a lone surrogate cannot be
encoded, and marks that reverse the direction of text hide what it says. All of them are shown escaped.
"""

from __future__ import annotations

import re
import reprlib

MOST_MESSAGE = 1000
"""Characters of a message to the user at most."""
_TAIL = 400
"""Of a message that is too long, the characters kept at the end: what to do is said there."""

_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb]"
)
"""Control characters, line and paragraph separators, invisible marks, marks of direction, lone surrogates."""
_ASCII = bytes(range(0x20, 0x7F))
_ASCII_IN_LINES = b"\t\n" + _ASCII
_UNPRINTABLE_IN_LINES = re.compile(_UNPRINTABLE.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


def printable(text: object, *, lines: bool = False) -> str:
    """Return ``text`` with everything escaped that a terminal would not print, as in ``\\x1b``.

    With ``lines``, line breaks and tabs stay, as in a kernel's source.
    """
    text = str(text)
    if text.isprintable():  # the usual case, at a tenth of the time
        return text
    return (_UNPRINTABLE_IN_LINES if lines else _UNPRINTABLE).sub(_escaped, text)


def is_printable(text: str, *, lines: bool = False) -> bool:
    """Whether :func:`printable` would leave ``text`` as it is."""
    # Without the characters of ASCII that print there is little left, of which the rest takes long.
    plain = text.encode("utf-8", "surrogatepass").translate(None, _ASCII_IN_LINES if lines else _ASCII)
    left = plain.decode("utf-8", "surrogatepass")
    return left.isprintable() or (_UNPRINTABLE_IN_LINES if lines else _UNPRINTABLE).search(left) is None


def shortened(text: str, most: int = MOST_MESSAGE) -> str:
    """Return ``text`` with its middle left out if it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    tail = min(_TAIL, most // 3)
    return f"{text[: most - tail - 3]} … {text[-tail:]}"


def brief(value: object) -> str:
    """The ``repr`` of a value of any size, depth and type, in at most 120 characters."""
    try:
        return printable(shortened(_BRIEF.repr(value), 120))
    except Exception:  # of numbers with too many digits, for instance
        return f"a value of type {type(value).__name__}"


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2
_BRIEF.maxdict = _BRIEF.maxlist = _BRIEF.maxtuple = 4
_BRIEF.maxstring = _BRIEF.maxother = 100


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "backslashreplace").decode("ascii")
