"""Where there is no GPU, kernels run in Triton's interpreter; the switch must be set before Triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", ".hypothesis")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="Write the emitted texts to tests/goldens.")
    parser.addoption("--peft-tests", metavar="PATH", help="A PEFT checkout whose DoRA tests to run accelerated.")
