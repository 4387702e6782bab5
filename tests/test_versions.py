"""Every library that doratune is used with, at the oldest and the newest version that it may have.

``make test-versions`` makes an environment for each column of pinned versions and runs the core suite in it, with
``--versions COLUMN``: a library that is missing there, or has another version than the column, is a failure.
``make test`` checks the columns against ``pyproject.toml``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from doratune.internals.versions import import_fault

ROOT = Path(__file__).parents[1]
ON_TOP = {path.stem: path for path in (Path(__file__).parent / "versions").glob("*.txt")}
"""The columns that change single versions of the newest ones, by the library that they change."""
COLUMNS = {"oldest": ROOT / "constraints-oldest.txt", "newest": ROOT / "constraints-newest.txt", **ON_TOP}

TOOLS = {"pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "ruff", "mypy", "build", "twine", "sybil"}
TOOLS |= {"sphinx", "myst-parser", "furo", "sphinx-click", "playwright"}
UNBOUNDED = {"hqq", "numpy", "psycopg-binary"}
"""In the columns, but not in ``pyproject.toml`` under this name."""


def pins(column: str) -> dict[str, str]:
    """The versions by library of a column."""
    versions = pins("newest") if column in ON_TOP else {}
    for line in COLUMNS[column].read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            if pin.operator == "==":
                versions[requirement.name] = pin.version
    return versions


def installed(name: str) -> str | None:
    """The version of a library here, without the build that a CPU's or a CUDA version's wheel names after a plus."""
    try:
        return Version(importlib.metadata.version(name)).public
    except importlib.metadata.PackageNotFoundError:
        return None


def required() -> dict[str, Requirement]:
    """What ``pyproject.toml`` asks for, extras included, without tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    found = [Requirement(line) for line in lines]
    for one in found:
        assert all(one.specifier == other.specifier for other in found if other.name == one.name), one
    return {one.name: one for one in found if one.name not in TOOLS}


def test_the_oldest_column_is_the_lower_bound_of_every_library() -> None:
    oldest, bounds = pins("oldest"), {}
    for name, requirement in required().items():
        (bounds[name],) = (Version(one.version) for one in requirement.specifier if one.operator == ">=")
    assert {name: Version(version) for name, version in oldest.items() if name not in UNBOUNDED} == bounds


@pytest.mark.parametrize("column", sorted(COLUMNS.keys() - {"oldest"}))
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
    for name in pins(column).keys() - {"psycopg-binary"}:
        importlib.import_module(name)


def test_a_package_that_is_installed_and_fails_is_not_said_to_be_missing() -> None:
    broken = ModuleNotFoundError("No module named 'hqq.core'")
    said = import_fault("torch", broken, "pip install torch")
    assert said.startswith("torch is installed and cannot be imported (No module named 'hqq.core')")
    assert said.endswith("pip install torch")
    assert import_fault("no-such-package", broken, "pip install x") == (
        "no-such-package is not installed: pip install x"
    )
