"""Where there is no GPU, kernels run in Triton's interpreter; the switch must be set before Triton is imported."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .postgresql import postgresql_server, postgresql_url  # noqa: F401

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", ".hypothesis")
torch.set_num_threads(1)  # tests run beside each other, and the threads of small products wait for each other


_SETTINGS = ("DORATUNE_HOME", "DORATUNE_CACHE_PATH", "DORATUNE_TRUST", "DORATUNE_NO_JIT", "DORATUNE_COMPILE_PROCESSES")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="Write the emitted texts to tests/goldens.")
    parser.addoption("--peft-tests", metavar="PATH", help="A PEFT checkout whose DoRA tests to run accelerated.")
    parser.addoption("--without", metavar="NAME", help="Run as if PyTorch did not have this private name.")
    parser.addoption("--internals", action="store_true", help="Run the core suite without each private name.")
    parser.addoption("--mutations", type=int, default=0, metavar="N", help="Damage N files and N rows of a store.")
    parser.addoption("--kills", type=int, default=0, metavar="N", help="Kill N processes that work on stores.")
    parser.addoption("--interrupts", type=int, default=0, metavar="N", help="Interrupt N tuning runs.")
    parser.addoption("--races", type=int, default=0, metavar="N", help="Have sixteen processes make N stores.")
    parser.addoption("--versions", metavar="COLUMN", help="The column of versions that this environment has.")
    parser.addoption("--installed", metavar="PYTHON", help="The Python of an environment that has the wheel in dist.")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--versions"):
        pytest.importorskip = _import  # type: ignore[assignment]
    if config.getoption("--without"):
        _hide(config.getoption("--without"))


def pytest_report_header(config: pytest.Config) -> list[str]:
    column = config.getoption("--versions")
    if not column:
        return []
    from .test_versions import installed, pins

    return [f"column {column}: " + ", ".join(f"{name} {installed(name)}" for name in pins(column))]


@pytest.fixture(scope="session", autouse=True)
def _nobodys_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither see nor touch the stores and the settings of who runs them."""
    kept = {name: os.environ.pop(name) for name in _SETTINGS if name in os.environ}
    os.environ["DORATUNE_HOME"] = str(tmp_path_factory.mktemp("nobody") / "home")
    yield
    os.environ.pop("DORATUNE_HOME")
    os.environ.update(kept)


def _import(name: str, *_: object, **__: object) -> Any:
    """In place of ``pytest.importorskip``: in an environment of the table, a package that is missing is a failure."""
    return importlib.import_module(name)


def _hide(name: str) -> None:
    """Have doratune find no ``name``; PyTorch itself keeps it."""
    from doratune import internals

    assert "doratune.internals.torch" not in sys.modules, "it has looked its names up"
    find = internals.find
    internals.find = lambda wanted: None if wanted == name else find(wanted)
    from doratune.internals.torch import missing

    assert name in missing() or "_cuda_" in name
