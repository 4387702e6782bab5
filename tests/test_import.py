"""Importing doratune costs nothing that its user did not ask for, and every folder imports only what DESIGN's layout
allows: data flows one way, and the runtime never reaches the tuner.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import doratune

PACKAGE = Path(doratune.__file__).parent

HEAVY = {"torch", "triton", "numpy", "jinja2", "optuna", "sqlalchemy", "alembic", "click", "rich", "platformdirs"}
HEAVY |= {"peft", "transformers"}

MAY_IMPORT = {
    "__init__": {"integrations", "nn", "runtime"},
    "printable": set(),
    "errors": {"printable"},
    "temporaries": set(),
    "text_file": set(),
    "__main__": {"terminal", "cli"},
    "terminal": {"codegen", "errors", "printable"},
    "internals": {"errors"},
    "codegen": {"errors", "internals", "printable"},
    "cache": {"codegen.spec", "codegen.digest", "errors", "printable", "temporaries"},
    "runtime": {"cache", "codegen", "errors", "internals"},
    "nn": {"runtime", "codegen", "errors", "internals"},
    "integrations": {"nn", "runtime", "codegen", "errors", "internals"},
    "tuner": {
        "cache",
        "codegen",
        "integrations",
        "runtime",
        "errors",
        "printable",
        "temporaries",
        "terminal.deadline",
        "terminal.interrupts",
        "terminal.tables",
        "text_file",
        "__version__",
    },
    "benchmarks": {
        "integrations.peft.base_layers",
        "integrations.peft.sources",
        "integrations.peft.stored",
        "nn",
        "accelerate",
        "terminal",
        "tuner",
        "cache",
        "runtime",
        "codegen",
        "internals",
        "errors",
        "printable",
        "temporaries",
        "text_file",
        "__version__",
    },
    "report": {
        "benchmarks.results",
        "tuner",
        "cache",
        "runtime",
        "codegen",
        "internals",
        "errors",
        "printable",
        "temporaries",
        "terminal.console",
        "terminal.interrupts",
        "__version__",
    },
    "adapters": {"codegen.ops", "errors", "printable", "text_file"},
    "doctor": {"adapters", "tuner", "cache", "runtime", "internals", "errors", "terminal"},
    "cache_commands": {"terminal", "tuner", "cache", "codegen", "errors", "printable"},
    "cli": {
        "adapters",
        "doctor",
        "terminal",
        "cache_commands",
        "benchmarks",
        "report",
        "tuner",
        "runtime",
        "codegen",
        "errors",
        "__version__",
    },
}
"""For each part of the package, the others it may import, anywhere in its files."""

BUDGET_MS = 50.0


def fresh(code: str, folder: Path) -> str:
    """What ``code`` prints in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement: str, folder: Path) -> set[str]:
    """The top-level packages that a new interpreter loads for ``statement``, beyond those it starts with."""
    code = f"import sys\nbefore = set(sys.modules)\n{statement}\nprint(*set(sys.modules) - before)"
    return {name.split(".")[0] for name in fresh(code, folder).split()}


@pytest.mark.parametrize(
    "statement",
    ["import doratune", "import doratune; dir(doratune); doratune.__version__", "import doratune.errors"],
)
def test_importing_doratune_loads_none_of_its_dependencies(statement: str, tmp_path: Path) -> None:
    loaded = loaded_by(statement, tmp_path)
    assert "doratune" in loaded
    assert not loaded & HEAVY


def test_the_command_line_starts_without_torch_or_a_database(tmp_path: Path) -> None:
    loaded = loaded_by("import doratune.cli", tmp_path)
    assert "click" in loaded
    assert not loaded & (HEAVY - {"click"})


def test_the_loader_is_there_without_the_template_engine_or_a_database(tmp_path: Path) -> None:
    loaded = loaded_by("import doratune; doratune.load_kernel", tmp_path)
    assert "torch" in loaded
    assert not loaded & {"jinja2", "optuna", "sqlalchemy", "alembic", "click", "rich"}


def test_importing_doratune_adds_at_most_50_ms_to_importing_torch(tmp_path: Path) -> None:
    code = "import time, torch\nstart = time.perf_counter()\nimport doratune\nprint(time.perf_counter() - start)"
    best = float("inf")
    for _ in range(5):  # the fastest of several: a busy machine only ever adds
        best = min(best, 1000.0 * float(fresh(code, tmp_path)))
        if best <= BUDGET_MS:
            return
    pytest.fail(f"import doratune took {best:.0f} ms at best")


def test_every_public_name_is_there_and_an_unknown_one_is_an_attribute_error() -> None:
    assert dir(doratune) == sorted(doratune.__all__)
    for name in doratune.__all__:
        assert getattr(doratune, name) is not None
    with pytest.raises(AttributeError, match="'doratune' has no attribute 'load_kernels'"):
        doratune.load_kernels  # noqa: B018
    with pytest.raises(ImportError, match="tune_everything"):
        exec("from doratune import tune_everything")


def modules() -> list[Path]:
    parts = [path for part in MAY_IMPORT for path in (PACKAGE / f"{part}.py", *(PACKAGE / part).rglob("*.py"))]
    return sorted(path for path in parts if path.is_file())


def imports_of(path: Path) -> Iterator[str]:
    """The modules and names of doratune that a file imports, relative to the package, wherever in the file."""
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "doratune")
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            yield from (".".join(filter(None, [*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "doratune":
            yield str(node.module)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_the_reader_of_imports_sees_what_the_sources_say() -> None:
    found = set(imports_of(PACKAGE / "runtime" / "loader.py"))
    assert {
        "cache.lookup.Resolution",
        "cache.stack.open_stack",
        "codegen.spec.KernelSpec",
        "runtime.kernel.Kernel",
    } <= found
    assert "errors.near_names" in set(imports_of(PACKAGE / "codegen" / "variants" / "__init__.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_the_layout_allows(path: Path) -> None:
    part = part_of(path)
    allowed = MAY_IMPORT[part] | ({part} if (PACKAGE / part).is_dir() else set())
    for name in imports_of(path):
        assert name.split(".")[0] != "doratune", f"{name}: inside the package imports are relative"
        assert any(f"{name}.".startswith(f"{place}.") for place in allowed), f"{part} may not import {name}"


def test_every_module_of_the_package_falls_under_the_layout() -> None:
    parts = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {path.stem for path in PACKAGE.glob("*.py")}
    assert parts - {"tests"} == MAY_IMPORT.keys()


def test_templates_are_templates_and_no_python() -> None:
    names = {path.name for path in (PACKAGE / "templates").rglob("*") if path.is_file()}
    assert names
    assert {name for name in names if not name.endswith(".j2")} <= {"README.md"}
