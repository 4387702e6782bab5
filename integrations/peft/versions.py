"""The check that PEFT has a tested version. The variant hook is PEFT's private interface and may change."""

from __future__ import annotations

from ...errors import DoratuneError
from ...internals.versions import installed, is_tested, tested_range


class PeftVersionError(DoratuneError):
    """PEFT is missing, or is a version that the drop-in is not tested with."""


def check_peft() -> None:
    """Raise a PeftVersionError unless a tested version of PEFT is installed."""
    version, tested = installed("peft"), tested_range("peft")
    if version is None:
        raise PeftVersionError(
            f"accelerate() needs PEFT, which is not installed: pip install 'doratune[peft]' (PEFT {tested})"
        )
    if not is_tested("peft", version):
        raise PeftVersionError(
            f"PEFT {version} is installed; doratune replaces a private part of PEFT and is tested with {tested}: "
            "install one of those, or train without doratune.accelerate"
        )
