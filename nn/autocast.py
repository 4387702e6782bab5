"""Ask for the state of ``torch.autocast``, and switch it off for a block, at little cost.

On the meta device autocast is off, except in a rehearsal (:mod:`.rehearsal`): there it is that of the rehearsed device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .rehearsal import META, rehearsed_device


class _AutocastOff:
    """Switches autocast off on one device type. Unlike ``torch.autocast`` it sets only that flag."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._device_type, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self._device_type, True)


_NOTHING = nullcontext()


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is on for tensors on ``device``."""
    kind = device.type
    if kind == META:
        kind = rehearsed_device(device).type
    return kind != META and torch.is_autocast_enabled(kind)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast rounds the factors of products on ``device``; None if it is off."""
    kind = device.type
    if kind == META:
        kind = rehearsed_device(device).type
    return torch.get_autocast_dtype(kind) if kind != META and torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off on ``device``; does nothing if it is off already."""
    if not autocast_is_on(device):
        return _NOTHING
    kind = rehearsed_device(device).type
    if torch.compiler.is_compiling():
        return torch.autocast(kind, enabled=False)
    return _AutocastOff(kind)
