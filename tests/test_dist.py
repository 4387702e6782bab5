"""What is released: the wheel holds every file that the package needs and nothing else, and runs far from the tree.

``make test-dist`` builds the sdist, the wheel from the sdist, and an environment that has the wheel, and passes that as
``--installed PYTHON``. ``make test`` checks the list of packages in ``pyproject.toml`` and the version.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.version import Version

import doratune
from doratune.cli import main

from .command_line import RUNNER

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = {
    name.removeprefix("doratune").replace(".", "/").lstrip("/") for name in PYPROJECT["tool"]["setuptools"]["packages"]
}
"""The folders of the packages, relative to the root; the root itself is ``""``."""

DIST_INFO = f"doratune-{doratune.__version__}.dist-info"
NO_PACKAGES = {"tests", "build", "dist"}
NOT_IN_THE_WHEEL = ("benchmarks/README.md", "benchmarks/results/")
SPEC = "lora_compose/d_out=4096/rank=384/tokens=4096/activation=bf16/adapter=bf16@h200"
"""One that the prebuilt store has."""

FIRST_KERNEL = """
import doratune, torch
torch.manual_seed(0)
x, lora_b = torch.randn(16, 64), torch.randn(64, 8)
kernel = doratune.load_kernel("lora_compose", d_out=64, d_in=64, rank=8, tokens=16, dtype=torch.float32, device="cpu")
y = kernel(x, x[:, :8].contiguous(), lora_b, torch.full((64,), 2.0), scaling=0.5)
assert torch.allclose(y, 2.0 * (x + 0.5 * x[:, :8] @ lora_b.T), atol=1e-5)
print(doratune.__version__, doratune.__file__)
"""


def tracked() -> list[str]:
    """The files that git tracks or would track, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


def test_every_folder_with_an_init_is_in_the_list_of_packages() -> None:
    tops = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in NO_PACKAGES]
    found = {init.parent.relative_to(ROOT).as_posix() for top in tops for init in top.rglob("__init__.py")}
    assert found | {""} == PACKAGES


def test_the_newest_released_version_in_the_changelog_is_not_newer_than_the_code() -> None:
    headings = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    for version, rest in headings[1:]:
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), version
        assert re.fullmatch(r" - \d{4}-\d\d-\d\d", rest), rest
    numbers = [Version(version) for version, _ in headings[1:]]
    assert numbers == sorted(set(numbers), reverse=True)
    assert all(number <= Version(doratune.__version__) for number in numbers)


def test_a_tagged_commit_has_the_tags_version() -> None:
    tracked()
    command = ["git", "tag", "--points-at", "HEAD", "--list", "v[0-9]*"]
    for tag in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
        assert tag == f"v{doratune.__version__}"
        assert f"\n## [{doratune.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture
def python(pytestconfig: pytest.Config) -> Path:
    """The Python of the environment that has the wheel."""
    path = pytestconfig.getoption("--installed")
    if not path:
        pytest.skip("run by make test-dist")
    return Path(os.path.abspath(path))  # a link to the Python that made the environment is not followed


@pytest.fixture
def wheel(python: Path) -> zipfile.ZipFile:
    (path,) = (ROOT / "dist").glob("*.whl")
    assert path.name == f"doratune-{doratune.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def run(python: Path, home: Path, *command: str) -> str:
    """The standard output of a program of the environment, which knows neither the tree nor a store of the user."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DORATUNE"))}
    environment |= {"DORATUNE_HOME": str(home / "doratune"), "HOME": str(home)}
    done = subprocess.run(
        [str(python.parent / command[0]), *command[1:]],
        cwd=home, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def from_the_tree(home: Path, *command: str) -> str:
    """What the same command prints in this environment."""
    result = RUNNER.invoke(main, command, env={"DORATUNE_HOME": str(home / "doratune")})
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_the_wheel_holds_the_trees_files_to_the_byte(wheel: zipfile.ZipFile) -> None:
    expected = {
        name
        for name in tracked()
        if not name.startswith(NOT_IN_THE_WHEEL)
        and (name.split("/")[0] in {*PACKAGES, "templates"} or (name.endswith((".py", "py.typed")) and "/" not in name))
    }
    held = {name.removeprefix("doratune/") for name in wheel.namelist() if name.startswith("doratune/")}
    assert held == expected
    assert {name.split("/")[0] for name in wheel.namelist()} == {
        "doratune",
        f"doratune-{doratune.__version__}.dist-info",
    }
    for name in expected:
        assert wheel.read(f"doratune/{name}") == (ROOT / name).read_bytes(), name


def test_the_wheels_metadata_has_version_licence_and_readme(wheel: zipfile.ZipFile) -> None:
    metadata = message_from_string(wheel.read(f"{DIST_INFO}/METADATA").decode())
    assert metadata["Version"] == doratune.__version__
    assert metadata["Requires-Python"] == PYPROJECT["project"]["requires-python"]
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert wheel.read(f"{DIST_INFO}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_is_the_tree(python: Path) -> None:
    (path,) = (ROOT / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    made = {name for name in names if name.split("/")[0] in ("PKG-INFO", "setup.cfg", "doratune.egg-info")}
    assert names - made == {name for name in tracked() if not name.startswith(".")}


def test_the_package_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    version, file = run(python, tmp_path, "python", "-c", FIRST_KERNEL).split()
    assert version == doratune.__version__
    assert Path(file).is_relative_to(python.parents[1])
    assert not Path(file).is_relative_to(ROOT) or python.is_relative_to(ROOT)


def test_the_command_line_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    assert run(python, tmp_path, "doratune", "--version") == f"doratune, version {doratune.__version__}\n"
    assert run(python, tmp_path, "doratune", "models", "--json") == from_the_tree(tmp_path, "models", "--json")


def test_the_wheel_has_the_templates(python: Path, tmp_path: Path) -> None:
    assert run(python, tmp_path, "doratune", "emit", SPEC) == from_the_tree(tmp_path, "emit", SPEC)


def test_the_wheel_has_the_prebuilt_store(python: Path, tmp_path: Path) -> None:
    told = json.loads(run(python, tmp_path, "doratune", "explain", SPEC, "--json"))
    assert told["provenance"] == "measured"
    assert Path(told["store"]).is_relative_to(python.parents[1])
