"""What the commands share: the ``--json`` option, how results are printed, and how a failure ends a command.

Results go to standard output, everything else to standard error; with ``--json`` standard output holds one JSON object
and nothing more. Exit codes: 0 done, 1 failed, 2 usage.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from .errors import DoratuneError

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
"""Of the JSON objects that commands print."""

TABLE_WIDTH = 200
"""Characters of a table's line where the output is no terminal."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")


class Group(click.Group):
    """Commands whose failures are printed as one message, without a traceback, and give the exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DoratuneError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object with its schema number."""
    click.echo(json.dumps({"schema": SCHEMA, **data}, indent=2))


def print_table(table: Table, *, to_stderr: bool = False) -> None:
    """Print a table as wide as the terminal, or :data:`TABLE_WIDTH` where there is none."""
    from rich.console import Console

    console = Console(stderr=to_stderr)
    Console(stderr=to_stderr, width=None if console.is_terminal else TABLE_WIDTH).print(table)


def message(text: str) -> None:
    """Print a line on standard error."""
    click.echo(text, err=True)
