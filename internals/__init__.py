"""Guarded access to the private names of PyTorch (:mod:`.torch`) and Triton (:mod:`.triton`)."""

from __future__ import annotations

import importlib
from typing import Any


def find(name: str) -> Any:
    """Return the object with a dotted name; None if the installed version does not have it."""
    path, _, attribute = name.rpartition(".")
    owner: Any
    try:
        owner = importlib.import_module(path)
    except ImportError:  # the rest of the path may be attributes
        owner = find(path) if "." in path else None
    return getattr(owner, attribute, None)
