"""A stage for the blocks of each page."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import pages


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pages.Stage:
    """Where the blocks of one page run on the CPU."""
    return pages.Stage.set(tmp_path, monkeypatch)
