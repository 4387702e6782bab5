"""What the tests of the templates share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def interpreter() -> None:
    """Skip the test where Triton's interpreter is off: tests/gpu runs the kernels there."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is here: tests/gpu runs the kernels on it")
