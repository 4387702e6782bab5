"""Switch ``torch.autocast`` off for a block, at little cost."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class _AutocastOff:
    """Switches autocast off on one device type. Unlike ``torch.autocast`` it sets only that flag."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._device_type, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self._device_type, True)


_NOTHING = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off on ``device``; does nothing if it is off already."""
    if not torch.is_autocast_enabled(device.type):
        return _NOTHING
    if torch.compiler.is_compiling():
        return torch.autocast(device.type, enabled=False)
    return _AutocastOff(device.type)
