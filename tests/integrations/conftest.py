from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

collect_ignore = [] if find_spec("peft") and find_spec("transformers") else ["peft"]
"""A folder whose libraries are missing is left out; in the environments of test_versions.py that is a failure."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
