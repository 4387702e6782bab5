"""The tested versions of PyTorch, Triton and PEFT, of which doratune uses private names, and of packages that quantise,
whose codes and scales it reads.
"""

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

STORAGE: dict[str, tuple[Minor, Minor]] = {
    "bitsandbytes": ((0, 48), (0, 50)),
    "torchao": ((0, 14), (0, 18)),
    "hqq": ((0, 2), (0, 2)),
}
"""The first and last minor version of each whose storage of W is tested; their pins are these two ends, too."""

TESTED_BESIDE: dict[str, tuple[Minor, Minor]] = {"transformers": ((4, 50), (5, 24))}
"""The same for what is used by its public names."""

TESTED_PAIRS: tuple[tuple[Minor, Minor], ...] = (((2, 10), (3, 6)), ((2, 13), (3, 7)), ((2, 15), (3, 9)))
"""The pairs of PyTorch and Triton that the tests run with: ``constraints*.txt``."""

_RANGES = {**TESTED, **STORAGE, **TESTED_BESIDE}


PEFT_EXTRA = "pip install 'doratune[peft]'"
"""What installs PEFT and transformers."""


def installed(package: str) -> str | None:
    """The installed version of a Python package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def import_fault(package: str, error: ImportError, install: str) -> str:
    """Why a package could not be imported, with the remedy: it is not installed, or something that it imports fails."""
    if installed(package) is None:
        return f"{package} is not installed: {install}"
    reason = " ".join(str(error).split())[:200]
    return (
        f"{package} is installed and cannot be imported ({reason}); mend that package, or install it again: {install}"
    )


def tested_range(package: str) -> str:
    """The tested versions as text, such as ``2.10 to 2.15``."""
    (first, second), (third, fourth) = _RANGES[package]
    return f"{first}.{second} to {third}.{fourth}"


def is_tested(package: str, version: str) -> bool:
    """Whether ``version`` lies in the tested range."""
    numbers = minor(version)
    oldest, newest = _RANGES[package]
    return numbers is not None and oldest <= numbers <= newest


def minor(version: str) -> Minor | None:
    """The first two numbers of a version, or None."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))
