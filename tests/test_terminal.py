"""What commands print fits the terminal and loses no text, has no colours under NO_COLOR or in a pipe, and ends quietly
when nobody reads it.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result

import doratune
from doratune.cache.stack import prebuilt_paths
from doratune.cli import main
from doratune.terminal import console
from doratune.terminal.console import print_table
from doratune.terminal.tables import Table, bar

from .command_line import RUNNER

PACKAGE = Path(doratune.__file__).parent
COMMAND = [sys.executable, "-m", "doratune.cli"]
ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
COLOURS = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7])(?:;[0-9;]*)?m")
WIDTH = 60


def on_a_terminal(home: Path, *command: str, **environment: str) -> str:
    """What a command prints on a terminal of :data:`WIDTH` columns."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    variables = {**clean, "TERM": "xterm-256color", "DORATUNE_HOME": str(home), **environment}
    with subprocess.Popen([*COMMAND, *command], stdin=side, stdout=side, stderr=side, env=variables) as running:
        os.close(side)
        parts = []
        try:
            while part := os.read(main, 1 << 16):
                parts.append(part)
        except OSError:  # Linux says so where the other side is closed
            pass
        os.close(main)
        assert running.wait(timeout=120) == 0
    return b"".join(parts).decode()


def test_tables_fit_the_terminal_and_no_color_is_heeded(tmp_path: Path) -> None:
    printed = on_a_terminal(tmp_path, "models", NO_COLOR="1")
    lines = [ESCAPE.sub("", line).rstrip("\r") for line in printed.split("\n")]
    assert any("llama-3.1-8b" in line for line in lines)
    assert max(map(len, lines)) <= WIDTH
    assert not COLOURS.search(printed)


def test_a_closed_pipe_ends_a_command_without_a_message(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, "models", "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        env={**os.environ, "DORATUNE_HOME": str(tmp_path)},
        text=True,
        timeout=120,
    )
    os.close(write)
    assert done.stderr == ""


# In process: what prints a table, and every other command that lists.

SPEC = "weight_norm/d_out=4096/d_in=4096/rank=384/weight=bf16/adapter=bf16@h200"
STORE = str(next(path for path in prebuilt_paths() if path.name == "h200.sqlite"))
RESULTS = str(PACKAGE / "benchmarks" / "results" / "h200" / "kernels.json")
TABLES = [
    ["models"],
    ["doctor", "--store", STORE],
    ["cache", "ls", "--store", STORE, "--op", "weight_norm"],
    ["cache", "show", SPEC, "--store", STORE],
    ["bench", "targets", RESULTS],
    ["bench", "coverage", "--gpu", "h200", "--draws", "1", "--kernels", "2"],
]
LISTINGS = [*TABLES, ["cache", "path"], ["cache", "verify", "--store", STORE], ["explain", SPEC], ["emit", SPEC]]
LINES = {"cache show"}
"""Of these only the tables fit the terminal: their other lines are values in full."""


def name(args: list[str]) -> str:
    return " ".join(args[: 2 if args[0] in ("cache", "bench") else 1])


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "DORATUNE_CACHE_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TERM", "xterm-256color")


def run(args: list[str], **environment: str) -> Result:
    result = RUNNER.invoke(main, args, env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 1), result.output
    return result


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("args", TABLES, ids=name)
def test_no_table_is_wider_than_the_terminal_and_none_is_cut(args: list[str]) -> None:
    for width in (40, 80, 200):
        said = ESCAPE.sub("", run(args, FORCE_COLOR="1", COLUMNS=str(width)).stdout)
        lines = [line for line in said.splitlines() if name(args) not in LINES or line[:1] in "┏┃┡│├└"]
        assert max(map(len, lines), default=0) <= width
        assert "…" not in said


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("args", TABLES, ids=name)
def test_no_word_is_broken_on_a_narrow_terminal(args: list[str]) -> None:
    rows = [line for line in run(args).stdout.splitlines() if line.startswith("│")]
    in_a_pipe = {word for row in rows for word in row.split() if word != "│"}
    for width in (60, 80):
        printed = ESCAPE.sub("", run(args, FORCE_COLOR="1", COLUMNS=str(width)).stdout).split()
        assert {word for word in in_a_pipe if len(word) <= (width // 3 if "/" in word else width // 2)} <= {*printed}


@pytest.mark.usefixtures("alone")
def test_the_coverage_is_a_table_on_a_usual_terminal() -> None:
    args = ["bench", "coverage", "--gpu", "h200", "--draws", "40"]
    assert run(args, FORCE_COLOR="1", COLUMNS="80").stdout.count("┏") == 1


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("args", LISTINGS, ids=name)
def test_piped_output_has_no_colours_and_no_broken_word(args: list[str]) -> None:
    result = run(args)
    assert "\x1b" not in result.output
    assert "…" not in result.stdout
    if args[:2] == ["cache", "ls"]:
        assert result.stdout.count(SPEC) == 1, "grep finds a spec"


@pytest.mark.usefixtures("alone")
def test_no_color_is_heeded_where_colours_are_forced() -> None:
    for args in TABLES[:2]:
        assert not COLOURS.search(run(args, FORCE_COLOR="1", NO_COLOR="1").stdout)


@pytest.fixture
def closed_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.TextIOWrapper]:
    """Standard output is a pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    stream = io.TextIOWrapper(io.FileIO(write, "w"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    yield stream
    monkeypatch.undo()
    with contextlib.suppress(BrokenPipeError):
        stream.close()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("args", LISTINGS, ids=name)
def test_a_closed_pipe_ends_every_listing_quietly(
    args: list[str], closed_pipe: io.TextIOWrapper, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.stdout = closed_pipe
    with contextlib.suppress(SystemExit):
        main.main(args, prog_name="doratune")
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "Broken pipe" not in said
    assert "Error" not in said


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("styled", [True, False])
@pytest.mark.parametrize("width", [20, 40, 80, 200, None])
@pytest.mark.parametrize("columns", [1, 4, 9, 15])
def test_any_table_fits_any_terminal_with_all_of_its_text(
    columns: int, width: int | None, styled: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "MOST_STYLED", 500 if styled else 0)
    texts = ["a" * 150, "[bold]b[/bold]", "µs × 3", "", "c d " * 60, "e" * 11]
    table = Table(*(f"column{place}" for place in range(columns)), title="its title")
    rows = [[texts[(place + shift) % len(texts)] for place in range(columns)] for shift in range(3)]
    for row in rows:
        table.add_row(*row)
    if width is not None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", str(width))
    print_table(table)
    said = ESCAPE.sub("", capsys.readouterr().out)
    if width is not None:
        assert max(map(len, said.splitlines())) <= width
    for letter in "ade":
        wanted = sum(text.count(letter) for row in rows for text in row)
        assert said.count(letter) >= wanted, f"{letter!r} is cut"
    if width is None:
        assert all(text in said for row in rows for text in row if " " not in text), "no word is broken in a pipe"


@pytest.mark.usefixtures("alone")
def test_a_bar_is_drawn_in_a_table_and_in_a_block(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for width in ("30", "80"):
        table = Table("what", "how long", "", "more", "and more")
        table.add_row("contender", "2.0", bar(0.5, 12), "x" * 20, "y" * 20)
        monkeypatch.setenv("COLUMNS", width)
        print_table(table)
        assert ESCAPE.sub("", capsys.readouterr().out).count("█") == 6


def test_every_table_is_printed_by_one_function() -> None:
    """Else it could be wider than the terminal, or markup could act."""
    allowed = {"terminal/console.py", "terminal/tables.py", "tuner/progress.py"}  # tables.py measures
    folders = [each for each in PACKAGE.iterdir() if each.name[0] != "." and each.name not in ("tests", "docs")]
    for path in [*PACKAGE.glob("*.py"), *(file for each in folders for file in each.rglob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        if "rich.console" in text and path.relative_to(PACKAGE).as_posix() not in allowed:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and node.module == "rich.console":
                    assert "Console" not in {alias.name for alias in node.names}, path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_its_completion(shell: str) -> None:
    result = RUNNER.invoke(main, [], env={"_DORATUNE_COMPLETE": f"{shell}_source"}, prog_name="doratune")
    assert result.exit_code == 0
    assert "_DORATUNE_COMPLETE" in result.stdout
    words = {"COMP_WORDS": "doratune cache ", "COMP_CWORD": "" if shell == "fish" else "2"}
    found = RUNNER.invoke(main, [], env={**words, "_DORATUNE_COMPLETE": f"{shell}_complete"}, prog_name="doratune")
    assert {"ls", "show", "verify"} <= {*re.split(r"[,\s]", found.stdout)}
