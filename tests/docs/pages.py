"""The pages of the documentation and the code blocks on them: what is run, where, and what is checked of the rest.

Every code block is fenced and names its language. What happens to it is told by the language and by a comment on the
line before:

==============================  ======================================================================================
``python``                      executed; the blocks of a page share their names
``bash``                        every command is run, in a folder that the blocks of a page share
``console``                     commands after ``$``; what they print must be what stands below, ``…`` being any text
``json``                        must be JSON
``text``, ``jinja``             not code that runs by itself
``<!-- prints -->``             the next block is what the block before prints on a CPU
``<!-- file: NAME -->``         the next block is written to the file NAME in the page's folder
``<!-- append: NAME -->``       it is added to the end of that file
``<!-- replace: NAME: OLD -->`` it takes the place of OLD, which stands there exactly once
``<!-- gpu: WHY -->``           the next block needs a GPU: ``tests/gpu`` runs it, and elsewhere its syntax is checked
``<!-- not run: WHY -->``       the syntax of the next block is checked, and that commands, options and files exist
==============================  ======================================================================================

A file in the folder ``doratune`` is one of a copy of the package; once there is one, the page's commands use the copy.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from doratune.cli import main

from ..command_line import RUNNER

ROOT = Path(__file__).parents[2]

PAGES = tuple(
    path.relative_to(ROOT).as_posix()
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "templates/README.md", "benchmarks/README.md")),
        *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
    )
)
"""Every page with code blocks, relative to the repository."""

LANGUAGES = ("python", "bash", "console", "json", "text", "jinja")
MARKS = ("prints", "file", "append", "replace", "gpu", "not run")

_MARK = re.compile(r"<!-- (?P<mark>[a-z ]+?)(?:: (?P<text>[^\n]*))? -->\n[ ]*\Z")
_fences = FencedCodeBlockLexer(language=r"[^\n]*", mapping={"language": "arguments", "source": "source"})
_python = PythonEvaluator()


@dataclass(frozen=True)
class Block:
    """One code block: its language, what it holds, and the comment before it."""

    language: str
    source: Any  # Sybil's text, which knows its line
    mark: str
    remark: str

    @classmethod
    def of(cls, example: Example) -> Block:
        language, source, before = example.parsed
        found = _MARK.search(before)
        mark, remark = (found["mark"], found["text"] or "") if found else ("", "")
        return cls(language, source, mark, remark)

    def commands(self) -> list[tuple[str, str]]:
        """The commands of a ``bash`` or ``console`` block, each with the text that it is to print."""
        if self.language == "bash":
            joined = self.source.replace("\\\n", " ")
            return [(line, "") for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        found: list[tuple[str, str]] = []
        for part in re.split(r"^\$ ", self.source, flags=re.MULTILINE)[1:]:
            command, _, printed = re.sub(r"\\\n", " ", part).partition("\n")
            found.append((command, printed.rstrip("\n")))
        return found


def blocks(document: Document) -> Iterable[Region]:
    """Sybil's parser: every fenced block, but for those that are directives of Sphinx."""
    for region in _fences(document):
        language = region.lexemes["arguments"]
        if not language.startswith("{"):
            source = region.lexemes["source"]
            yield Region(region.start, region.end, (language, source, document.text[: region.start]))


def read(page: str | Path) -> Document:
    """The code blocks of a page."""
    return Document.parse(str(ROOT / page), blocks)


@dataclass
class Stage:
    """Runs the blocks of one page, in order, in one folder and with one set of names.

    Where a page speaks of ``model`` without making one, it is a tiny Llama. ``gpu`` says where this is: on a GPU the
    blocks with that mark run, and of the others those in Python, which they may build on.
    """

    folder: Path
    gpu: bool = False
    printed: str = ""

    @classmethod
    def set(cls, folder: Path, monkeypatch: pytest.MonkeyPatch, *, gpu: bool = False) -> Stage:
        """An empty page folder that sees the repository's examples and results, and nothing of the user's."""
        home, page = folder / "home", folder / "page"
        for made in (home, page):
            made.mkdir()
        for name in ("examples", "benchmarks"):
            (page / name).symlink_to(ROOT / name)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("DORATUNE_HOME", str(home / "doratune"))
        monkeypatch.setenv("TRITON_CACHE_DIR", str(home / "triton"))
        monkeypatch.delenv("DORATUNE_CACHE_PATH", raising=False)
        monkeypatch.chdir(page)
        if not gpu:
            monkeypatch.setattr("doratune.tuner.workers.default_jobs", lambda: 1)  # other tests use the other cores
        return cls(page, gpu)

    def play(self, document: Document) -> None:
        """Run the blocks of a page, or check what can be checked of them.

        Raises:
            AssertionError: a block does not do what the page says.
        """
        for example in document:
            try:
                self._run(example)
            except Exception as error:
                raise AssertionError(f"{document.path}:{example.line}: {error}") from error

    def _run(self, example: Example) -> None:
        block = Block.of(example)
        assert block.language in LANGUAGES, f"a code block names its language ({', '.join(LANGUAGES)})"
        assert block.mark in ("", *MARKS), f"unknown comment <!-- {block.mark} --> before a code block"
        assert block.mark in ("", "prints") or block.remark, f"<!-- {block.mark} --> needs a reason or a name"
        if block.mark == "prints":
            if not self.gpu:
                _compare(block.source, self.printed)
        elif block.mark in ("file", "append", "replace"):
            self._write(block)
        elif not self._runs(block):
            check(block)
        elif block.language == "python":
            self._python(example, block)
        else:
            for command, expected in block.commands():
                printed = self._command(command)
                if block.language == "console":
                    _compare(expected, printed)

    def _runs(self, block: Block) -> bool:
        if block.mark == "not run" or block.language not in ("python", "bash", "console"):
            return False
        if self.gpu:
            return block.mark == "gpu" or block.language in ("python", "bash")  # Python may use what a command wrote
        return block.mark != "gpu"

    def _write(self, block: Block) -> None:
        name, _, old = block.remark.partition(": ")
        target = self.folder / name
        if name.startswith("doratune/") and not (self.folder / "doratune").exists():
            copy_package(self.folder / "doratune")
        target.parent.mkdir(parents=True, exist_ok=True)
        if block.mark == "file":
            target.write_text(block.source, encoding="utf-8")
        elif block.mark == "append":
            target.write_text(target.read_text(encoding="utf-8") + "\n\n" + block.source, encoding="utf-8")
        else:
            text = target.read_text(encoding="utf-8")
            assert text.count(f"\n{old}\n") == 1, f"{name} has the line {old!r} {text.count(old)} times"
            target.write_text(text.replace(f"{old}\n", block.source, 1), encoding="utf-8")

    def _python(self, example: Example, block: Block) -> None:
        example.parsed = block.source
        if re.search(r"\bmodel\b", block.source) and "model" not in example.namespace:
            example.namespace["model"] = tiny_llama()
        standard_output = io.StringIO()
        with contextlib.redirect_stdout(standard_output):
            _python(example)
        self.printed = standard_output.getvalue()

    def _command(self, command: str) -> str:
        """What a command prints. doratune's own run in this process, which spares each the start of PyTorch."""
        words = shlex.split(command, comments=True)
        changed = (self.folder / "doratune").exists()
        if not changed and simple_commands(command) == [words] and words[0] == "doratune":
            result = RUNNER.invoke(main, words[1:], catch_exceptions=False)
            assert result.exit_code == 0, f"{command}\n{result.stdout}\n{result.stderr}"
            return result.stdout + result.stderr
        environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        if changed:
            environment["PYTHONPATH"] = os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout


def copy_package(target: Path) -> None:
    """Copy what the package consists of, so that a page may change it."""
    left_out = shutil.ignore_patterns(".*", "tests", "docs", "results", "__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT, target, ignore=left_out)


def tiny_llama() -> Any:
    """A Llama of two small layers with random weights, as a page's ``model``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads))


def _compare(expected: str, printed: str) -> None:
    """Hold what is printed against what the page shows; ``…`` is any text, also of several lines."""
    pattern = ".*?".join(re.escape(part) for part in _lines(expected).split("…"))
    assert re.fullmatch(pattern, _lines(printed), re.DOTALL), f"expected:\n{expected}\nprinted:\n{printed}"


def _lines(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def check(block: Block) -> None:
    """Check what can be checked of a block without running it.

    Raises:
        AssertionError, SyntaxError, ValueError: it cannot be right.
    """
    if block.language == "python":
        ast.parse(block.source)
    elif block.language == "json":
        json.loads(block.source)
    elif block.language in ("bash", "console"):
        for command, _ in block.commands():
            check_command(command)


def check_command(command: str) -> None:
    """Check a command's syntax, and that what it names exists: doratune's options, make's targets, files, extras."""
    syntax = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
    assert syntax.returncode == 0, syntax.stderr
    for words in simple_commands(command):
        if words[0] == "doratune":
            check_options(words[1:])
        elif words[0] == "make":
            done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "Nothing to be done" not in done.stdout, done.stdout  # for a folder of that name
        elif words[0] == "pytest":
            for word in words[1:]:
                assert "/" not in word or word.startswith("..") or (ROOT / word).exists(), f"{word} does not exist"
    for extra in re.findall(r"(?:doratune|\.)\[([a-z,]+)\]", command):
        given = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for name in extra.split(","):
            assert re.search(rf"^{name} = \[", given, re.MULTILINE), f"there is no extra {name!r}"


def simple_commands(command: str) -> list[list[str]]:
    """The words of each command of a line, without assignments before it and redirections."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    redirected = False
    for word in lexer:
        if set(word) <= set("<>"):
            redirected = True
        elif redirected:
            redirected = False
        elif set(word) <= set("();|&"):
            found.append([])
        elif found[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            found[-1].append(word)
    return [words for words in found if words]


def check_options(words: list[str]) -> None:
    """Let click parse a command line of doratune without running it; files that are named need not exist."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        assert name in command.commands, f"doratune has no command {name!r} (known: {', '.join(command.commands)})"
        command = command.commands[name]
    try:
        command.make_context(command.name or "", list(words))
    except click.exceptions.Exit:
        pass  # --help and --version
    except click.UsageError as error:
        if "does not exist" not in error.message:
            raise AssertionError(error.message) from error
