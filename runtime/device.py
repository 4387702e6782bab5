"""Resolve a user's device argument, and find the facts of a GPU."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError

if TYPE_CHECKING:
    from ..codegen.gpu import Gpu


class DeviceError(UsageError):
    """The device is unknown to PyTorch, not present, or of a type without kernels."""


def find_device(device: torch.device | str | int | None) -> torch.device:
    """Return ``device`` with its index; None means the current GPU, or the CPU if there is no GPU.

    Raises:
        DeviceError: ``device`` is neither the CPU nor a GPU that PyTorch sees.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except (RuntimeError, ValueError, TypeError) as error:
        raise DeviceError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from error
    if where.type not in ("cuda", "cpu"):
        raise DeviceError(f"device must be cpu, cuda or cuda:N (a CUDA or ROCm GPU), got {where}")
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(f"device {where} needs a GPU, and PyTorch sees none; cpu runs the eager reference")
        index = torch.cuda.current_device() if where.index is None else where.index
        if index >= torch.cuda.device_count():
            raise DeviceError(
                f"device cuda:{index} does not exist: PyTorch sees {torch.cuda.device_count()} GPU(s), numbered from 0"
            )
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
