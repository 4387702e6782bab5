"""The files, modules and folders that the pages name exist, and the layout is the one that the imports are held to."""

from __future__ import annotations

import pkgutil
import re

import pytest

import doratune

from ..test_import import MAY_IMPORT
from .pages import PAGES, ROOT

MADE_BY_THE_READER = {"templates/compose_forward_rows.py.j2", "tests/goldens/compose_forward_rows.py", "docs/_build"}
PUBLIC = {"__version__", "accelerate", "restore"}

FOLDERS = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")))


def named_in_code(page: str) -> set[str]:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", text))


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_exist(page: str) -> None:
    paths = {name for name in named_in_code(page) if re.fullmatch(rf"({FOLDERS})/[\w./*-]*", name)}
    missing = [name for name in paths - MADE_BY_THE_READER if not list(ROOT.glob(name.rstrip("/")))]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_the_parts_of_the_package_that_a_page_names_exist(page: str) -> None:
    for name in named_in_code(page):
        if re.fullmatch(r"doratune(\.\w+)+", name):
            pkgutil.resolve_name(name)


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    missing = [name for name in doratune.__all__ if name != "__version__" and f":: doratune.{name}" not in text]
    assert missing == []


def test_the_layout_on_the_page_is_the_one_that_imports_are_held_to() -> None:
    text = (ROOT / "docs" / "explanation" / "design.md").read_text(encoding="utf-8")
    shown = {
        place.removesuffix("/").removesuffix(".py"): {name.strip() for name in cell.split(",")} - {"nothing"}
        for place, cell in re.findall(r"^\| `([\w./]+)` \|[^|]*\| ([^|]*) \|$", text, re.MULTILINE)
    }
    for part, allowed in MAY_IMPORT.items():
        public = {"public names"} if allowed & PUBLIC else set()
        assert shown[part] == (allowed - PUBLIC) | public, part
