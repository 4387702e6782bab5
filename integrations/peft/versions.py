"""Which versions of PEFT the drop-in is tested with. The variant hook is PEFT's private interface and may change."""

from __future__ import annotations

import importlib.metadata
import re

from ...errors import DoratuneError

OLDEST, NEWEST = (0, 17), (0, 21)
"""The first and last minor version whose DoRA layers the tests have run through doratune."""


class PeftVersionError(DoratuneError):
    """PEFT is missing, or is a version that the drop-in is not tested with."""


def check_peft() -> None:
    """Raise a PeftVersionError unless a tested version of PEFT is installed."""
    tested = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise PeftVersionError(
            f"accelerate() needs PEFT, which is not installed: pip install 'doratune[peft]' (PEFT {tested})"
        ) from None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        raise PeftVersionError(
            f"PEFT {version} is installed; doratune replaces a private part of PEFT and is tested with {tested}: "
            "install one of those, or train without doratune.accelerate"
        )
