"""The text: English documentation and Python code that ship with Python and with doratune's dependencies.

Two domains. ``documentation`` has the help topics of ``pydoc``, the docstrings of the standard library and of packages,
and the descriptions and licences of their distributions. ``code`` has the standard library's source without its
docstrings. A file's name decides whether its text is trained on or held out, for both domains alike.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...errors import DoratuneError

PACKAGES = (
    "alembic",
    "click",
    "jinja2",
    "optuna",
    "peft",
    "platformdirs",
    "rich",
    "sqlalchemy",
    "torch",
    "transformers",
)
"""Whose docstrings and descriptions are read: what doratune needs to run, and what this benchmark needs."""
PARTS_OF = {
    "torch": ("nn", "optim", "distributions", "utils", "distributed"),
    "transformers": ("generation", "utils"),
}
"""Of the largest packages only these folders."""
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "pydoc_data"}
LEFT_OUT |= {"idlelib", "lib2to3", "ensurepip", "turtledemo"}
"""Folders of the standard library that some distributions of Python do not ship, tests, and English kept as code."""

SEPARATOR = b"\0"
SHORTEST_DOCSTRING = 120
"""Characters; shorter ones are mostly signatures in words."""
LONGEST = 2**16
MOST_PARTS = 8
"""Of a long document the middle is taken: so many characters, and of one held out such a part of what is wanted."""
LINE = 30
"""Characters of a stripped line from which on it is taken for one of its document's own."""
MOST_KNOWN = 0.5
MOST_LEAKED = 0.1
"""Share of a document's distinct long lines that earlier ones may have: of one that is trained on, of one held out."""

TRAIN, VALIDATION, TEST = "train", "validation", "test"


class Document(NamedTuple):
    """Its name, the same on every machine, and what reads its text."""

    name: str
    read: Callable[[], str]


@dataclass(frozen=True)
class Domain:
    """The text of a domain as bytes: ``parts`` by split, documents separated by a zero byte."""

    name: str
    parts: dict[str, bytes]
    documents: dict[str, int]
    dropped: int
    """Documents left out since others have most of their lines."""
    leaked: float
    """Share of the distinct long lines of the held-out parts that are in the trained part too."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(b"\1".join(self.parts[split] for split in (TRAIN, VALIDATION, TEST))).hexdigest()


class CorpusError(DoratuneError):
    """The installed packages have too little text."""


def split_of(name: str) -> str:
    """The split of a document, from its name alone: two tenths are held out."""
    first = hashlib.sha256(name.encode()).digest()[0]
    return TEST if first < 26 else VALIDATION if first < 52 else TRAIN


def make_domain(name: str, found: Iterable[Document], *, train_bytes: int, held_out_bytes: int) -> Domain:
    """Read documents, in an order that their names give, until each split has its bytes; near-copies are left out.

    Raises:
        CorpusError: a held-out split would have less than ``held_out_bytes``, or the trained one less than those.
    """
    ordered = sorted(found, key=lambda document: hashlib.sha256(document.name.encode()).digest())
    wanted = {TRAIN: train_bytes, VALIDATION: held_out_bytes, TEST: held_out_bytes}
    parts, documents, dropped = dict.fromkeys(wanted, b""), dict.fromkeys(wanted, 0), 0
    seen: set[str] = set()
    trained: set[str] = set()
    held_out: set[str] = set()
    for split in wanted:  # the trained part first: held-out documents are compared with all of it
        texts, size = [], 0
        longest = LONGEST if split == TRAIN else max(1, held_out_bytes // MOST_PARTS)
        for document in ordered:
            if split_of(document.name) != split or size >= wanted[split]:
                continue
            text = _middle(document.read(), longest)
            lines = long_lines(text)
            if not text.strip():
                continue
            if _share(lines, seen) > (MOST_KNOWN if split == TRAIN else MOST_LEAKED):
                dropped += 1
                continue
            seen |= lines
            (trained if split == TRAIN else held_out).update(lines)
            data = text.encode("utf-8", errors="replace") + SEPARATOR
            texts.append(data)
            size += len(data)
            documents[split] += 1
        parts[split] = b"".join(texts)[: wanted[split]]
        if len(parts[split]) < held_out_bytes:
            raise CorpusError(
                f"the installed packages have {len(parts[split])} bytes of {name} for the {split} split, and "
                f"{held_out_bytes} are needed; choose a smaller --size, or a Python with its standard library as files"
            )
    return Domain(name, parts, documents, dropped, _share(held_out, trained))


def _middle(text: str, most: int) -> str:
    begin = max(0, len(text) - most) // 2
    return text[begin : begin + most]


def long_lines(text: str) -> set[str]:
    """The distinct lines of a text that are long enough to be its own, without their indents."""
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= LINE}


def _share(lines: set[str], known: set[str]) -> float:
    return len(lines & known) / len(lines) if lines else 0.0


def documentation() -> Iterator[Document]:
    """The documents in English."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(f"pydoc/{name}", functools.partial(str, text))
    for name, path in _standard_library():
        yield Document(name, functools.partial(docstrings, path))
    for package in PACKAGES:
        for name, path in _package_files(package):
            yield Document(name, functools.partial(docstrings, path))
        yield from _descriptions(package)


def code() -> Iterator[Document]:
    """The standard library's modules."""
    for name, path in _standard_library():
        yield Document(name, functools.partial(without_docstrings, path))


def package_versions() -> dict[str, str]:
    """The versions of the packages that the text is from."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _standard_library() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    yield from _python_files(root, "stdlib")


def _package_files(package: str) -> Iterator[tuple[str, Path]]:
    found = importlib.util.find_spec(package)
    for place in (found.submodule_search_locations or ()) if found else ():
        for part in PARTS_OF.get(package, ("",)):
            yield from _python_files(Path(place) / part, "/".join(filter(None, [package, part])))


def _python_files(root: Path, name: str) -> Iterator[tuple[str, Path]]:
    for folder, folders, files in os.walk(root):
        folders[:] = [each for each in folders if each not in LEFT_OUT]  # os.walk does not enter the others
        for file in files:
            path = Path(folder, file)
            if path.suffix == ".py":
                yield f"{name}/{path.relative_to(root).as_posix()}", path


def _descriptions(package: str) -> Iterator[Document]:
    """The description and the licences of a distribution."""
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return
    yield Document(f"{package}/METADATA", lambda: found.read_text("METADATA") or "")
    for file in found.files or ():
        parts = file.parts
        if len(parts) > 1 and parts[0].endswith(".dist-info") and parts[1] == "licenses":
            name = f"{package}/{'/'.join(parts[1:])}"
            yield Document(name, functools.partial(_text, Path(str(file.locate()))))


def docstrings(path: Path) -> str:
    """The docstrings of a module that are not short, in the order of the file."""
    found = [(node.lineno, ast.literal_eval(node.value)) for node in _docstring_nodes(_text(path))]
    return "\n\n".join(inspect.cleandoc(text) for _, text in sorted(found) if len(text) >= SHORTEST_DOCSTRING)


def without_docstrings(path: Path) -> str:
    """The source of a module without the lines of its docstrings; comments stay."""
    text = _text(path)
    gone: set[int] = set()
    for node in _docstring_nodes(text):
        gone.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [line for number, line in enumerate(text.split("\n"), start=1) if number not in gone]
    return "\n".join(lines).strip("\n") + "\n"


def _docstring_nodes(text: str) -> list[ast.Expr]:
    """The statements that are docstrings; none where this Python cannot parse the text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return []
    places = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    firsts = [node.body[0] for node in ast.walk(tree) if isinstance(node, places) and node.body]
    return [
        first
        for first in firsts
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    ]


def _text(path: Path) -> str:
    """The text of a file; empty where it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
