from __future__ import annotations

import os
from pathlib import Path

import pytest

from doratune.benchmarks.dorafactors import Dorafactors

DORAFACTORS_PATH = "DORATUNE_DORAFACTORS_PATH"


@pytest.fixture(scope="session")
def dorafactors() -> Dorafactors:
    """The peer from the checkout that the environment names; its code is never part of this repository."""
    pytest.importorskip("peft")
    path = os.environ.get(DORAFACTORS_PATH)
    if not path:
        pytest.skip(f"{DORAFACTORS_PATH} names no checkout of sockeye44/dorafactors")
    return Dorafactors(Path(path))
