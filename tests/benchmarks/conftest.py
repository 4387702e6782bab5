from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from doratune.benchmarks.dorafactors import Dorafactors

DORAFACTORS_PATH = "DORATUNE_DORAFACTORS_PATH"
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "vocab_size": 64,
}


@pytest.fixture(scope="session")
def dorafactors() -> Dorafactors:
    """The peer from the checkout that the environment names; its code is never part of this repository."""
    pytest.importorskip("peft")
    path = os.environ.get(DORAFACTORS_PATH)
    if not path:
        pytest.skip(f"{DORAFACTORS_PATH} names no checkout of sockeye44/dorafactors")
    return Dorafactors(Path(path))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The config.json of a model that a CPU runs at once."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path
