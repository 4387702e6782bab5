"""Sound adapters and their checkpoints, made by PEFT itself: a tiny model that was trained for a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from .world import Trained, train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A DoRA adapter in fp32 on all linear layers of a tiny Llama, and its sharded checkpoint. Not to be changed."""
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
