"""Check that the installed PEFT is tested: its variant hook is a private interface and may change."""

from __future__ import annotations

from ...errors import DoratuneError
from ...internals.versions import installed, is_tested, tested_range


class PeftVersionError(DoratuneError):
    """PEFT is missing, or the drop-in is not tested with its version."""


def check_peft() -> None:
    """Raise a PeftVersionError unless a tested version of PEFT is installed."""
    version, tested = installed("peft"), tested_range("peft")
    if version is None:
        raise PeftVersionError(
            f"accelerate() needs PEFT, which is not installed: pip install 'doratune[peft]' (PEFT {tested})"
        )
    if not is_tested("peft", version):
        raise PeftVersionError(
            f"expected PEFT {tested}, found {version}: doratune replaces a private part of PEFT. Install a tested "
            "version, or train without doratune.accelerate"
        )
