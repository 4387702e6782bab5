"""A fault on a GPU is told of the test that caused it; nothing else can run in a process whose context it broke."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _its_own_faults(request: pytest.FixtureRequest) -> Iterator[None]:
    """Wait for what a test launched; after a memory fault end the process, so that others' results stand."""
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except torch.AcceleratorError as problem:
        message = f"{request.node.nodeid} broke the GPU's context: {problem}"
        if os.environ.get("PYTEST_XDIST_WORKER"):  # told as a crash of this test; another worker takes the rest
            os.write(2, f"{message}\n".encode())
            os._exit(1)
        pytest.exit(message, returncode=1)
