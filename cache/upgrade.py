"""What has changed since an entry was measured: the versions of Triton, PyTorch and the driver, and the GPU's name.

The entry is used all the same: its config is rendered and compiled again. What may have changed is whether it is still
the fastest; ``doratune cache drift`` measures that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .entry import MEASURED, Entry, Environment

_SOFTWARE = {"triton": "Triton", "torch": "PyTorch"}
_MACHINE = {"driver": "driver", "gpu_name": "GPU"}
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Change:
    """A version or name that was ``then`` when the entry was measured, and is another ``here``."""

    what: str
    then: str
    here: str


def changes(then: Environment, here: Environment) -> tuple[Change, ...]:
    """Return what differs between the environment of an entry and the present one.

    Driver and GPU name are compared only where both are for the same GPU model. What one of them does not know, an
    empty text or one that begins with ``unknown``, is no difference.
    """
    compared = {**_SOFTWARE, **(_MACHINE if then.gpu == here.gpu else {})}
    pairs = [(what, getattr(then, name), getattr(here, name)) for name, what in compared.items()]
    return tuple(Change(*pair) for pair in pairs if pair[1] != pair[2] and _is_known(pair[1]) and _is_known(pair[2]))


def describe(found: Sequence[Change]) -> str:
    """The changes as text: ``Triton 3.6.0, driver 550.54; here 3.7.1, 580.1``."""
    return f"{', '.join(f'{one.what} {one.then}' for one in found)}; here {', '.join(one.here for one in found)}"


def warning(entry: Entry, here: Environment) -> str | None:
    """Say under which other versions ``entry`` was measured, and what that may cost.

    None if nothing differs, or if the entry was never measured.
    """
    found = changes(entry.environment, here)
    if not found or entry.evaluation.provenance != MEASURED:
        return None
    return f"measured under {describe(found)}. {_risk(entry)}"


def _risk(entry: Entry) -> str:
    if entry.final is None:
        return "Its lead over other configs was not recorded, so what the change may cost is unknown"
    if not entry.final.beaten:
        return "No other config was timed against it, so what the change may cost is unknown"
    margin = 100.0 * entry.final.margin
    if margin <= 0:
        return "Its runner-up was as fast within the noise, and may be the faster one now"
    return f"Its runner-up took {margin:.2g} % longer: a larger shift between the two makes that the faster one"


def _is_known(text: str) -> bool:
    return bool(text) and not text.startswith(_UNKNOWN)
