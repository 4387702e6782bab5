"""A stage for the blocks of each page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from . import pages


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pages.Stage]:
    """Where the blocks of one page run on the CPU, on one thread: small operations only wait for other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield pages.Stage.set(tmp_path, monkeypatch)
    torch.set_num_threads(threads)
