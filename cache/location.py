"""Where a store is: a file path or a database URL, read from text without loading SQLAlchemy."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from .errors import LocationError

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
_URL_ITEM = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^/]*(?:/[^:]*)?")
_SQLITE = ("sqlite", "sqlite+pysqlite")
_POSTGRESQL = ("postgresql", "postgres", "postgresql+psycopg")
_VALID = "use a file path, sqlite:////absolute/path or postgresql://user@host:5432/database"


@dataclass(frozen=True)
class Location:
    """A parsed location: ``path`` of a SQLite file, or the ``url`` of a PostgreSQL database.

    ``text`` is for messages and carries no password. Exactly one of ``path`` and ``url`` is set.
    """

    text: str
    path: Path | None = None
    url: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, location: str | Path) -> Location:
        """Read a path or URL.

        Raises:
            LocationError: empty, an in-memory database, or a scheme other than sqlite and postgresql.
        """
        match = _URL.fullmatch(location) if isinstance(location, str) else None
        if match is None:
            return cls._of_path(location)
        scheme, rest = match["scheme"].lower(), match["rest"]
        if scheme in _POSTGRESQL:
            return cls(text=without_password(f"postgresql://{rest}"), url=f"postgresql+psycopg://{rest}")
        if scheme not in _SQLITE:
            raise LocationError(f"store {without_password(match[0])!r}: unknown scheme {scheme!r}; {_VALID}")
        if not rest.startswith("/") or len(rest) == 1 or "?" in rest or rest.startswith(("/:memory:", "/file:")):
            raise LocationError(f"store {match[0]!r}: not a plain file (a store must outlive its process); {_VALID}")
        return cls._of_path(rest[1:])

    @classmethod
    def _of_path(cls, location: str | Path) -> Location:
        if not str(location) or str(location) == ":memory:":
            raise LocationError(f"store {str(location)!r}: not a file; {_VALID}")
        try:
            # Resolved, so that the file is created where a symbolic link points and two names are one store.
            path = Path(location).expanduser().resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise LocationError(f"store {str(location)!r}: not a valid path ({error}); {_VALID}") from None
        return cls(text=str(path), path=path)

    def __str__(self) -> str:
        return self.text


def without_password(text: str) -> str:
    """Return ``text`` with the password of a URL replaced by ``***``."""
    text = re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", text)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", text)


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
