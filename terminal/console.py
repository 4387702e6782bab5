"""What the commands share: options, how results are printed, and how a failure ends a command.

Texts may come from a store, a path or a config file: they are printed by :func:`line`, :func:`message` and
:func:`print_table`, which let nothing through that is markup or acts on a terminal.

Results go to standard output, everything else to standard error; with ``--json`` standard output holds one JSON object
and nothing more. Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import DoratuneError
from ..printable import MOST_MESSAGE, printable, shortened
from .interrupts import INTERRUPTED, printing

if TYPE_CHECKING:
    from .tables import Table

    _TextType = click.ParamType[str]
else:
    _TextType = click.ParamType  # a generic class since click 8.4

SCHEMA = 1
"""Of the JSON objects that commands print."""

LINE_SECONDS = 15.0
"""Seconds between two lines of progress where standard error is no terminal."""

MOST_STYLED = 500
"""Rows of a table that is printed with styles: laying it out takes a millisecond for each."""


class NamedPath(click.Path):
    """A path. An empty one, as of an unset variable in a script, is a mistake: it does not mean the current folder."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(path_type=Path, **settings)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value).strip():
            self.fail("it is empty and no path; name one, or leave the option out", param, ctx)
        return super().convert(value, param, ctx)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
config_option = click.option(
    "--config",
    type=NamedPath(),
    metavar="FILE",
    help="A Hugging Face config.json (or its folder) instead of a known model.",
)


class LocationText(_TextType):
    """A path or URL. An empty one, as of an unset variable in a script, is a mistake: it does not mean the default."""

    name = "location"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).strip():
            self.fail("it is empty and not a file; use a file path or a URL, or leave the option out", param, ctx)
        return str(value)


class FiniteRange(click.FloatRange):
    """A number in a range. "not a number" compares with nothing, and is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


class Seconds(FiniteRange):
    """A finite number of seconds of at least 0."""

    def __init__(self) -> None:
        super().__init__(min=0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is not a number of seconds; leave the option out for no limit", param, ctx)
        return seconds


store_option = click.option(
    "--store",
    type=LocationText(),
    metavar="PATH|URL",
    help="A store to use: a SQLite file, or sqlite:///… or postgresql://…",
)
trust_option = click.option(
    "--trust",
    "trusted",
    multiple=True,
    metavar="PATH|URL",
    help="Use the binaries of this store, of the stores in this folder, or signed by this public key; repeatable.",
)
jobs_range = click.IntRange(min=1, max=1024)
rank_range = click.IntRange(min=1, max=2**16)
tokens_range = click.IntRange(min=1, max=2**31)


class Dtype(_TextType):
    """The name of a dtype in specs, or PyTorch's."""

    name = "dtype"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from ..codegen.ops import DTYPE_BYTES

        names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
        name = names.get(str(value).lower(), str(value).lower())
        if name not in DTYPE_BYTES:
            self.fail(f"unsupported dtype {value!r}; use one of {', '.join(DTYPE_BYTES)}", param, ctx)
        return name


class Group(click.Group):
    """Commands whose failures are printed as one message, without a traceback, and give the exit code."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command or a group, with ``-h`` also where it is called without this group first: click keeps that."""
        _add_short_help(cmd)
        super().add_command(cmd, name)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=PRINTABLE)
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if error.filename is not None or error.errno not in _NOT_WRITTEN:
                raise
            _give_up_output()
            text = f"{error.strerror}: the output was not written whole; check the space there, and run this again"
            click.echo(f"Error: {text}", err=True)
            sys.exit(1)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _short_messages():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _short_messages():
                return super().invoke(ctx)
        except DoratuneError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if error.errno == errno.EPIPE or error.filename is None:
                raise
            reason = f"{error.strerror}: {error.filename}; check the path and its permissions"
            click.echo(f"Error: {printable(shortened(reason))}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Of an error that names no file: a stream such as standard output could not be written."""


def _give_up_output() -> None:
    """Send what is left of standard output nowhere: Python would fail again at its end, with a traceback."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _add_short_help(command: click.Command) -> None:
    command.context_settings.setdefault("help_option_names", ["-h", "--help"])
    for each in command.commands.values() if isinstance(command, click.Group) else ():
        _add_short_help(each)


@contextmanager
def _short_messages() -> Iterator[None]:
    """Shorten click's own messages, which quote what was typed, as errors of doratune are."""
    try:
        yield
    except click.UsageError as error:
        text = error.format_message()
        if len(text) <= MOST_MESSAGE:
            raise
        raise click.UsageError(shortened(text), error.ctx) from None


PRINTABLE = "doratune.printable"
"""The codec error handler for output that has fewer characters than Unicode, such as ASCII."""


def _printable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    plain = (_PLAIN.get(letter, letter) for letter in error.object[error.start : error.end])
    return "".join(each.encode("ascii", "backslashreplace").decode() for each in plain), error.end


_PLAIN = {"µ": "u", "×": "x", "…": "...", "–": "-", "—": "-", "≤": "<=", "≥": ">=", "→": "->", "±": "+-", "’": "'"}
codecs.register_error(PRINTABLE, _printable)


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object with its schema number."""
    text = json.dumps({"schema": SCHEMA, **data}, indent=2)
    with printing():
        click.echo(text)


def print_table(table: Table, *, to_stderr: bool = False) -> None:
    """Print a table no wider than the terminal. Where there is none, each row is one line. No text is cut.

    On a terminal that is too narrow for the columns each row is printed as a block of lines.
    """
    from rich.console import Console

    console = Console(stderr=to_stderr, markup=False, emoji=False)
    width = console.width
    fits = not console.is_terminal or table.fits(width)
    if console.is_terminal and table.row_count <= MOST_STYLED:
        console.print(table.styled(width) if fits else table.records(width))
        return
    lines = table.lines(width if console.is_terminal else None) if fits else table.record_lines(width)
    with printing():
        click.echo("\n".join(lines), err=to_stderr)


@contextmanager
def counting(doing: str) -> Iterator[Callable[[int, int], None]]:
    """Show on standard error how many of all things are done: call what this yields with both numbers.

    On a terminal it is a bar, elsewhere a line every :data:`LINE_SECONDS`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not (console.is_terminal and sys.stderr.isatty()) or console.is_dumb_terminal:
        last = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal last
            if done == total or time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                message(f"{doing}: {done} of {total}")

        yield tell
        return
    columns = (TextColumn(doing), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def line(text: object) -> None:
    """Print one line on standard output."""
    click.echo(printable(text))


def message(text: object) -> None:
    """Print a line on standard error."""
    click.echo(printable(text), err=True)
