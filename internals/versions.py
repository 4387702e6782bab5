"""The versions of PyTorch, Triton and PEFT that the tests have run with. doratune uses private names of each."""

from __future__ import annotations

import importlib.metadata
import re

Minor = tuple[int, int]

TESTED: dict[str, tuple[Minor, Minor]] = {
    "torch": ((2, 10), (2, 15)),
    "triton": ((3, 6), (3, 9)),
    "peft": ((0, 17), (0, 21)),
}
"""The first and last minor version of each; the pins of tests/versions are at both ends."""


def installed(library: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def tested_range(library: str) -> str:
    """The tested versions as text, such as ``2.10 to 2.15``."""
    (first, second), (third, fourth) = TESTED[library]
    return f"{first}.{second} to {third}.{fourth}"


def is_tested(library: str, version: str) -> bool:
    """Whether ``version`` lies in the tested range."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    oldest, newest = TESTED[library]
    return numbers is not None and oldest <= (int(numbers[1]), int(numbers[2])) <= newest
