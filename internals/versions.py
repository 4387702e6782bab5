"""The tested versions of PyTorch, Triton and PEFT. doratune uses private names of each."""

from __future__ import annotations

import importlib.metadata
import re

Minor = tuple[int, int]

TESTED: dict[str, tuple[Minor, Minor]] = {
    "torch": ((2, 10), (2, 15)),
    "triton": ((3, 6), (3, 9)),
    "peft": ((0, 17), (0, 21)),
}
"""The first and last tested minor version of each. The pins in tests/versions are these two ends."""


def installed(package: str) -> str | None:
    """The installed version of a Python package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tested_range(package: str) -> str:
    """The tested versions as text, such as ``2.10 to 2.15``."""
    (first, second), (third, fourth) = TESTED[package]
    return f"{first}.{second} to {third}.{fourth}"


def is_tested(package: str, version: str) -> bool:
    """Whether ``version`` lies in the tested range."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    oldest, newest = TESTED[package]
    return numbers is not None and oldest <= (int(numbers[1]), int(numbers[2])) <= newest
