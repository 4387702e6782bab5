"""No text acts on a terminal: what a store, a path or a config file says is printed as it is, or escaped, whatever
command prints it; and no message is longer than a screen."""

from __future__ import annotations

import ast
import io
import json
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.cells import cell_len
from rich.console import Console

import doratune
from doratune import printable as printable_module
from doratune.cache.store import Store
from doratune.cli import main
from doratune.errors import DoratuneError, UsageError
from doratune.printable import MOST_MESSAGE, brief, is_printable, printable, shortened
from doratune.terminal.console import line, message, print_table
from doratune.terminal.tables import Table

from .cache.world import a_spec, an_entry

PACKAGE = Path(doratune.__file__).parent

ACTING = [
    "\x1b[2J\x1b[H",  # clears the screen
    "\x1b]0;owned\x07",  # sets the title
    "a\nstep      exact: forged",
    "a\rforged",
    "\x9b31m",
    "\x00",
    "\u202edesrever",
    "\u2028",
    "\u200b",
    "\ud800",
]
MARKUP = ["[/b]", "[bold]NVIDIA", "[link=http://x]y[/link]", ":warning:", "[red"]


@pytest.mark.parametrize("text", ACTING)
def test_what_acts_is_escaped(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown.isascii()
    assert not is_printable(text)
    assert is_printable(shown)
    assert printable(shown) == shown


@pytest.mark.parametrize("text", ["", "plain", "⊙ µs × é 日本", "a b", *MARKUP])
def test_what_does_not_act_stays(text: str) -> None:
    assert printable(text) == text
    assert is_printable(text)


def test_a_source_keeps_its_lines() -> None:
    assert printable("def f():\n\treturn 1\x1b\r", lines=True) == "def f():\n\treturn 1\\x1b\\r"


def test_a_brief_of_anything_is_short_and_printable() -> None:
    deep: list[object] = []
    for _ in range(2000):
        deep = [deep]
    for value in (deep, 10**5000, "x" * 10**6, b"\xff" * 10**6, dict.fromkeys(range(10**5), "\x1b"), *ACTING):
        assert len(brief(value)) <= 140
        assert brief(value).isprintable()


def test_a_message_is_short_and_keeps_its_remedy() -> None:
    error = UsageError(f"bad {'x' * 10**6}\x1b[2J\nforged; do this instead")
    assert len(str(error)) <= MOST_MESSAGE
    assert str(error).isprintable()
    assert str(error).endswith("do this instead")
    assert str(DoratuneError("several\nlines\x07")) == "several\nlines\\x07"
    assert shortened("short") == "short"


def test_the_quick_ways_find_what_the_characters_say() -> None:
    chance = random.Random(0)
    letters = [*map(chr, range(0x3000)), *"\ud800\udfff\ufeff\ufffb\U0001f600µ日", *"abc \t\n" * 300]
    for _ in range(3000):
        text = "".join(chance.choices(letters, k=chance.choice((0, 1, 3, 40))))
        for lines in (False, True):
            acts = (printable_module._UNPRINTABLE_IN_LINES if lines else printable_module._UNPRINTABLE).search(text)
            assert is_printable(text, lines=lines) == (acts is None), repr(text)
            assert (printable(text, lines=lines) == text) == (acts is None), repr(text)


@pytest.mark.parametrize("text", [*ACTING, *MARKUP])
def test_a_table_prints_texts_as_they_are(text: str) -> None:
    table = Table("column", title=text)
    table.add_row(text)
    for made in (table.styled(120), table.records(120)):
        out = io.StringIO()
        Console(file=out, width=120, markup=False, emoji=False).print(made)
        assert out.getvalue().replace("\n", "").isprintable()
        assert out.getvalue().count(printable(text)) == 2


@pytest.mark.parametrize("text", [*ACTING, *MARKUP])
def test_the_lines_of_a_table_are_plain_text(text: str) -> None:
    table = Table("column", title=text)
    table.add_row(text)
    lines = [*table.lines()]
    assert all(each.isprintable() for each in lines)
    assert "\n".join(lines).count(printable(text)) == 2


def _three_rows() -> Table:
    table = Table("spec", title="entries")
    table.add_column("µs", justify="right")
    table.add_row("x" * 300, "1.5")
    table.add_row("日本", "20.25")
    table.add_section()
    table.add_row("only one cell")
    table.caption = "two\nlines"
    return table


def test_without_a_terminal_a_row_is_one_line_and_no_text_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """So that a spec of a listing can be given to another command."""
    print_table(_three_rows())
    title, *body, first, second = capsys.readouterr().out.splitlines()
    assert (title, first, second) == ("entries", "two", "lines")
    assert {cell_len(line) for line in body} == {300 + 5 + 7}
    rows = [line for line in body if line.startswith("│")]
    assert [[cell.strip() for cell in row.split("│")[1:-1]] for row in rows] == [
        ["x" * 300, "1.5"],
        ["日本", "20.25"],
        ["only one cell", ""],
    ]
    assert rows[0].endswith("│   1.5 │")
    assert [line[0] for line in body] == ["┏", "┃", "┡", "│", "│", "├", "│", "└"]


def test_a_long_table_fits_the_terminal_too_and_only_folds_its_texts() -> None:
    lines = [*_three_rows().lines(60)]
    assert {cell_len(line) for line in lines[1:-1]} == {60}
    folded = "".join(line.split("│")[1].strip() for line in lines if line.startswith("│") and "x" in line)
    assert folded == "x" * 300


def test_lines_and_messages_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for text in (*ACTING, *MARKUP):
        line(text)
        message(text)
    out, err = capsys.readouterr()
    assert out == err == "".join(f"{printable(text)}\n" for text in (*ACTING, *MARKUP))


def test_every_table_is_one_of_plain_texts() -> None:
    """rich's own would read markup in what a store says."""
    others = {"tests", "build", "dist", "docs", "examples"}
    folders = [each for each in PACKAGE.iterdir() if each.is_dir() and each.name[0] != "." and each.name not in others]
    found = [*PACKAGE.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    assert len(found) > 100
    for path in found:
        if path == PACKAGE / "terminal" / "tables.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich"):
                assert "Table" not in [alias.name for alias in node.names], path
                assert node.module != "rich.table", path


ECHOED = {
    "cli.py": {"source.text", "resolution.explain(binaries.explain(), upgrade_warning(resolution))"},
    "cache_commands.py": {"f'\\n{printable(one.entry.source, lines=True)}'"},
    "benchmarks/commands.py": {"text", "document(env, outcome.rows)", "f'\\n{markdown(found, env)}'"},
}
"""What is printed as it stands: sources and JSON in several lines, and texts whose parts were escaped."""


def test_commands_print_lines_by_the_functions_that_escape() -> None:
    for file, allowed in ECHOED.items():
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        calls = [
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "click.echo"
        ]
        assert {ast.unparse(call.args[0]) for call in calls} == allowed


def _run(*args: str) -> Result:
    result = CliRunner().invoke(main, args)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    for printed in (result.stdout, result.stderr):
        assert printed.replace("\n", "").isprintable()
        assert "\nstep      exact: forged" not in printed
    return result


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DORATUNE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
    monkeypatch.setattr("doratune.cache.stack.prebuilt_paths", list)


LISTINGS = (("cache", "ls"), ("cache", "show", str(a_spec())), ("explain", str(a_spec(rank=64))), ("cache", "path"))


@pytest.mark.parametrize("text", [text for text in (*ACTING, *MARKUP) if not set(text) & {"\x00", "\ud800"}])
@pytest.mark.usefixtures("alone")
def test_every_listing_prints_a_hostile_store_as_it_is(text: str, tmp_path: Path) -> None:
    """The text is in every column of text in turn, and in the name of the file."""
    path = tmp_path / f"a{text.replace('/', '|')}.sqlite"
    with Store.open(path, create=True) as store:
        store.put_all([an_entry(), an_entry(a_spec(rank=16))])
    with closing(sqlite3.connect(path)) as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(doratune_entries)") if row[2] == "TEXT"]
    for column in columns:
        with closing(sqlite3.connect(path)) as connection:
            old = connection.execute(f"SELECT {column} FROM doratune_entries WHERE id = 1").fetchone()
            connection.execute(f"UPDATE doratune_entries SET {column} = ? WHERE id = 1", (text,))
            connection.commit()
        with Store.open(path, readonly=True) as store:
            assert all(problem.isprintable() for problem in store.verify())
            assert store.neighbours(a_spec(rank=64), "sm_90", count=8)
        if column in ("gpu_name", "spec", "config"):
            for args in LISTINGS:
                _run(*args, "--store", str(path))
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(f"UPDATE doratune_entries SET {column} = ? WHERE id = 1", old)
            connection.commit()


@pytest.mark.usefixtures("alone")
def test_a_listing_names_damaged_rows(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with Store.open(path, create=True) as store:
        store.put_all([an_entry(), an_entry(a_spec(rank=16))])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE doratune_entries SET us = -1 WHERE id = 1")
        connection.commit()
    listed = _run("cache", "ls", "--store", str(path))
    assert listed.exit_code == 0
    assert "1 entries" in listed.stderr
    assert "damaged: " in listed.stderr
    assert "us must be a finite number" in listed.stderr
    listed = _run("cache", "ls", "--json", "--store", str(path))
    values = json.loads(listed.stdout)
    assert (len(values["rows"]), len(values["damaged"])) == (1, 1)
    shown = _run("cache", "show", str(a_spec()), "--store", str(path))
    assert shown.exit_code == 1
    assert "damaged: " in shown.stderr
