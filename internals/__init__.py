"""What belongs to others: the private names of PyTorch (:mod:`.torch`) and Triton (:mod:`.triton`), guarded."""

from __future__ import annotations

import importlib
from typing import Any


def find(name: str) -> Any:
    """The object with a dotted name; None where the installed version has none."""
    path, _, attribute = name.rpartition(".")
    owner: Any
    try:
        owner = importlib.import_module(path)
    except ImportError:  # the path may go on in attributes
        owner = find(path) if "." in path else None
    return getattr(owner, attribute, None)
