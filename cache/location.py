"""Where a store is: a file path or a database URL, read from text without loading SQLAlchemy."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, unquote_plus

from .errors import LocationError

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
_URL_ITEM = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^/]*(?:/[^:]*)?")
_SQLITE = ("sqlite", "sqlite+pysqlite")
_POSTGRESQL = ("postgresql", "postgres", "postgresql+psycopg")
_VALID = "use a file path, sqlite:////absolute/path or postgresql://user@host:5432/database"
_ENCODE = (
    "write these characters of a user or password percent-encoded: / as %2F, @ as %40, : as %3A, ? as %3F, # as %23"
)
_SCHEMES = r"(?:sqlite|postgres|postgresql|mysql|mariadb|mssql|oracle|redis)(?:\+\w+)?:"
_LOOKS_LIKE_URL = re.compile(_SCHEMES, re.IGNORECASE)
_MASK = "***"
_USERINFO = re.compile(rf"((?:[a-z][a-z0-9+.-]+:/+|\b{_SCHEMES})[^/@:\s]*):[^\s'\"]*@", re.IGNORECASE)
_PASSWORD_FIELD = re.compile(
    r"((?:^|[?&;\s])(?:\w|%[0-9a-f]{2})*pass(?:\w|%[0-9a-f]{2})*\s*=\s*)(?:'[^']*'|[^&;\s'\")]*)", re.IGNORECASE
)


@dataclass(frozen=True)
class Location:
    """A parsed location: ``path`` of a SQLite file, or the ``url`` of a PostgreSQL database.

    ``text`` is for messages and carries no password. Exactly one of ``path`` and ``url`` is set.
    """

    text: str
    path: Path | None = None
    url: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, location: str | Path, what: str = "store") -> Location:
        """Read a path or URL; ``what`` names it in messages.

        Raises:
            LocationError: empty, an in-memory database, or a scheme other than sqlite and postgresql.
        """
        match = _URL.fullmatch(location) if isinstance(location, str) else None
        if match is None:
            return cls._of_path(location, what)
        scheme, rest = match["scheme"].lower(), match["rest"]
        if scheme in _POSTGRESQL:
            _check_server(match[0], rest)
            return cls(text=without_password(f"postgresql://{rest}"), url=f"postgresql+psycopg://{rest}")
        if scheme not in _SQLITE:
            raise LocationError(f"{what} {without_password(match[0])!r}: unknown scheme {scheme!r}; {_VALID}")
        if not rest.startswith("/") or len(rest) == 1 or "?" in rest or rest.startswith(("/:memory:", "/file:")):
            named = without_password(match[0])
            raise LocationError(f"{what} {named!r}: not a plain file (it must outlive its process); {_VALID}")
        return cls._of_path(rest[1:], what)

    @classmethod
    def _of_path(cls, location: str | Path, what: str) -> Location:
        named = without_password(str(location))
        if not str(location).strip() or str(location).startswith((":memory:", "file:")):
            raise LocationError(f"{what} {named!r}: not a file; {_VALID}")
        if isinstance(location, str) and (_LOOKS_LIKE_URL.match(location) or _PASSWORD_FIELD.search(location)):
            raise LocationError(f"{what} {named!r}: a URL has two slashes after its scheme; {_VALID}")
        try:
            # Resolved, so that the file is created where a symbolic link points and two names are one store.
            path = Path(location).expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise LocationError(f"{what} {named!r}: not a valid path ({_reason(error)}); {_VALID}") from None
        return cls(text=str(path), path=path)

    def __str__(self) -> str:
        return self.text


def _check_server(text: str, rest: str) -> None:
    """Refuse a URL whose user or password has characters that end it: another part would be read as the host.

    Raises:
        LocationError: the message has no part of the password.
    """
    if re.search(r"[\s'\"<>\\\x00-\x1f]", rest):
        scheme = text.partition("://")[0]
        raise LocationError(
            f"store {scheme}://{_MASK}: a URL has no spaces, quotes or backslashes; percent-encode them"
        )
    before, _, query = rest.partition("?")
    server, _, database = before.partition("/")
    if before.count("@") > 1 or "@" in database or "#" in before or ("@" in query and "@" not in server):
        raise LocationError(f"store {without_password(text)!r}: cannot tell the password from the host; {_ENCODE}")


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def without_password(text: str) -> str:
    """Return ``text``, a URL or a message that quotes some, with every password in it replaced by ``***``.

    Where the end of a password cannot be known, as with a slash or an at-sign in it, more is replaced.
    """
    return _PASSWORD_FIELD.sub(rf"\1{_MASK}", _USERINFO.sub(rf"\1:{_MASK}@", text))


def passwords_of(url: str) -> set[str]:
    """The passwords in a URL, as they are written and decoded: what no message may hold."""
    rest = url.partition("://")[2]
    before, _, query = rest.partition("?")
    _, colon, password = before.rpartition("@")[0].partition(":")
    found = [password] if colon else []
    found += [value for name, value in parse_qsl(query, keep_blank_values=True) if "pass" in name.lower()]
    return {text for one in found for text in (one, unquote(one), unquote_plus(one)) if text}


def split_locations(text: str) -> list[str]:
    """Split a search path at ``os.pathsep``, keeping URLs whole although they contain colons.

    A URL ends at the first colon after its database name, so a colon in a name or query is written ``%3A`` and a
    URL inside a list must name its database. Empty items are dropped.
    """
    if os.pathsep != ":":
        return [item.strip() for item in text.split(os.pathsep) if item.strip()]
    items: list[str] = []
    start = 0
    while start < len(text):
        url = _URL_ITEM.match(text, start)
        end = url.end() if url else text.find(":", start)
        end = len(text) if end < 0 else end
        items.append(text[start:end].strip())
        start = end + 1
    return [item for item in items if item]
