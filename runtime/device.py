"""Which device a user means, and which GPU that is."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError

if TYPE_CHECKING:
    from ..codegen.gpu import Gpu


class DeviceError(UsageError):
    """A device was named that PyTorch does not see, or that no kernel is for."""


def find_device(device: torch.device | str | int | None) -> torch.device:
    """Return the device meant: with its index when a GPU; the current GPU, or the CPU where there is none, for None.

    Raises:
        DeviceError: neither a GPU that PyTorch sees nor the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"device {device!r} is none that PyTorch knows: use 'cuda', 'cuda:0' or 'cpu'") from error
    if where.type not in ("cuda", "cpu"):
        raise DeviceError(f"device {where} is not supported: use a CUDA or ROCm GPU ('cuda:0') or 'cpu'")
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(f"device {where}: PyTorch sees no GPU here; 'cpu' runs the eager reference")
        index = torch.cuda.current_device() if where.index is None else where.index
        if index >= torch.cuda.device_count():
            raise DeviceError(f"device cuda:{index}: PyTorch sees {torch.cuda.device_count()} GPU(s), numbered from 0")
        where = torch.device("cuda", index)
    return where


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The facts of a GPU that PyTorch sees.

    Raises:
        UnknownGpuError: its architecture is not supported.
    """
    from ..codegen.gpu import gpu_of_device

    properties = torch.cuda.get_device_properties(device)
    architecture = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return gpu_of_device(properties.name, architecture, properties.multi_processor_count)
