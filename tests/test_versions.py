"""Every library that doratune is used with, at the oldest and the newest version that it may have.

A column of the table is a file of pinned versions in tests/versions. ``make test-versions`` makes an environment for
each and runs the tests of what uses these libraries in it, with ``--versions COLUMN``: a library that is missing there,
or has another version than the column, is a failure. ``make test`` holds the table against ``pyproject.toml``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

COLUMNS = Path(__file__).parent / "versions"
TOOLS = {"pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "ruff", "mypy", "sybil"}
TOOLS |= {"sphinx", "myst-parser", "furo", "sphinx-click"}
PINNED = {"torch", "triton"}
"""The same in every column: constraints.txt."""
UNUSED = {"plotly"}
"""Nothing imports it yet."""


def pins(column: str) -> dict[str, str]:
    """The versions by library of a column; one that is named after a library stands on top of ``newest``."""
    versions = {} if column in ("oldest", "newest") else pins("newest")
    for line in (COLUMNS / f"{column}.txt").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            versions[requirement.name] = pin.version
    return versions


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def required() -> dict[str, Requirement]:
    """What ``pyproject.toml`` asks for, extras included, without tools."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 does not read TOML")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    found = [Requirement(line) for line in lines]
    for one in found:
        assert all(one.specifier == other.specifier for other in found if other.name == one.name), one
    return {one.name: one for one in found if one.name not in TOOLS | PINNED | UNUSED}


def test_the_oldest_column_is_the_lower_bound_of_every_library() -> None:
    oldest, bounds = pins("oldest"), {}
    for name, requirement in required().items():
        (bounds[name],) = (Version(one.version) for one in requirement.specifier if one.operator == ">=")
    assert {name: Version(version) for name, version in oldest.items() if name != "hqq"} == bounds


@pytest.mark.parametrize("column", sorted(file.stem for file in COLUMNS.glob("*.txt") if file.stem != "oldest"))
def test_every_other_column_has_every_library_in_its_range(column: str) -> None:
    versions = pins(column)
    assert versions.keys() == pins("oldest").keys()
    for name, requirement in required().items():
        assert versions[name] in requirement.specifier, name


def test_the_environment_is_that_of_the_column(pytestconfig: pytest.Config) -> None:
    column = pytestconfig.getoption("--versions")
    if not column:
        pytest.skip("run by make test-versions")
    assert {name: installed(name) for name in pins(column)} == pins(column)
    for name in pins(column):
        importlib.import_module(name)
