"""Each word has one meaning, and sentences are plain: files of the package use no phrase of the table below."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import doratune

ROOT = Path(doratune.__file__).parent

SUFFIXES = {".py", ".md", ".j2"}

NOT_THE_PACKAGE = {"tests", "build", "dist", "_build"}

EVERYWHERE = ("",)
PACKAGE_IS_PYTHONS = (
    *("nn/", "integrations/", "internals/", "cache/", "tuner/", "doctor.py", "terminal/", "cli.py", "CONTRIBUTING.md"),
    *("docs/install.md", "docs/reference/peft.md"),
)

WORDS: list[tuple[str, tuple[str, ...], str]] = [
    (r"[Tt]imed beside", EVERYWHERE, "timed side by side with …, or timed against …"),
    (r"[Kk]nowing arguments again", EVERYWHERE, "memoise argument checks"),
    (r"what it calls in the end", EVERYWHERE, "probe … for its C function"),
    (r"[Dd]evice meant", EVERYWHERE, "resolve the device"),
    (r"with little ado", EVERYWHERE, "fast path when …"),
    (r"taken again where", EVERYWHERE, "reused while its inputs are unchanged"),
    (r"shard(s? is| is never|) taken for", EVERYWHERE, "so a shard is never mistaken for the full weight"),
    (r"whatever is stored", EVERYWHERE, "why stored binaries are disabled, or None"),
    (r"is none (that|of)\b", EVERYWHERE, "X must be one of …, got Y; or: unknown X 'y'; use …"),
    (r"holds no JSON", EVERYWHERE, "expected a JSON object, found …"),
    (r"lets? go of", EVERYWHERE, "releases, frees"),
    (r"[Nn]obody (looked|tuned)", EVERYWHERE, "never tuned"),
    (r"the story of", EVERYWHERE, "where … comes from"),
    (r"\b(it|so it) is told\b", EVERYWHERE, "a warning says …, or … is reported"),
    (r"such as it is", EVERYWHERE, "say what it is"),
    (
        r"(?<!neural\s)(?<![\".])\b[Ll]ayers?\b(?![:\"])",
        ("cache/",),
        "store or stack: a layer is a neural one, and a column of entries counts those",
    ),
    (
        r"\b[Pp]rograms?\b",
        ("runtime/", "nn/", "integrations/", "cache/"),
        "recording or graph: a program is one instance of a Triton kernel",
    ),
    (r"(?<!torch\.)(?<!\.)\blibrar(y|ies)\b", PACKAGE_IS_PYTHONS, "package: a library is cuBLAS or the like"),
]
"""A pattern, where it is forbidden (the beginning of a path), and what to write instead."""

NAMED_ONCE = ("weight_norm", "dora_linear")
"""Names that one Python function each may have; PyTorch's operators and kernels have others."""


def texts() -> Iterator[tuple[str, str]]:
    """The path, relative to the root, and the text of every source and document of the package."""
    for path in sorted(ROOT.rglob("*")):
        place = path.relative_to(ROOT)
        if path.suffix in SUFFIXES and not (place.parts[0].startswith(".") or NOT_THE_PACKAGE & {*place.parts}):
            yield place.as_posix(), path.read_text(encoding="utf-8")


def line_of(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


@pytest.mark.parametrize(("pattern", "places", "instead"), WORDS, ids=[pattern for pattern, *_ in WORDS])
def test_a_phrase_is_not_used(pattern: str, places: tuple[str, ...], instead: str) -> None:
    forbidden = re.compile(pattern.replace(" ", r"\s+"))
    found = [
        f"{place}:{line_of(text, match.start())}: {match[0]!r}; write instead: {instead}"
        for place, text in texts()
        if place.startswith(places)
        for match in forbidden.finditer(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", NAMED_ONCE)
def test_a_public_function_shares_its_name_with_no_other(name: str) -> None:
    found = [
        f"{place}:{line_of(text, match.start())}"
        for place, text in texts()
        if place.endswith(".py")
        for match in re.finditer(rf"^\s*def {name}\(", text, re.MULTILINE)
    ]
    assert len(found) == 1, f"def {name} stands at {', '.join(found)}; name the others after what they do, as row_norm"
