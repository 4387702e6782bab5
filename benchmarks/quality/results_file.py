"""The results file of the study: read again by the next call, which adds to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import UsageError
from ..results import Row, document, read_document
from .summary import SUMMARIES, summarise

MAY_DIFFER = {"date", "driver"}
"""What of the environment may change between two calls."""


def earlier_rows(path: Path | None, env: Mapping[str, str]) -> list[Row]:
    """The runs that a file has, without its summaries; none if there is no file.

    Raises:
        UsageError: it is no results file of this benchmark, or its runs were made in another environment: of another
            GPU, version, text or size, with which new ones cannot be compared.
    """
    if path is None or not path.exists() or path.stat().st_size == 0:
        return []
    theirs, rows = read_document(path)
    if not isinstance(theirs, dict) or any(row["bench"] != "quality" for row in rows):
        raise UsageError(f"{path} has results of another benchmark; name another --output")
    for name in sorted((theirs.keys() | env.keys()) - MAY_DIFFER):
        if theirs.get(name) != env.get(name):
            raise UsageError(
                f"{path} has results of another {name} ({str(theirs.get(name))[:200]}; now "
                f"{str(env.get(name))[:200]}): they cannot be added to; name another --output"
            )
    return [row for row in rows if row["op"] not in SUMMARIES]


def write(path: Path, env: Mapping[str, str], rows: Sequence[Row]) -> None:
    """Write the runs and their summaries in place of the file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(document(env, with_summaries(rows)), encoding="utf-8")
    partial.replace(path)


def with_summaries(rows: Sequence[Row]) -> list[Row]:
    """The runs, and the summaries after them."""
    return [*rows, *summarise(rows)]
