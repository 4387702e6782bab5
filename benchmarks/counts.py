"""What one call is made of: kernels, copies and fills on a GPU, how long it is busy with them, and the host's calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch

from .results import Row

_DEVICE = ("launches", "copies", "fills", "busy_us")
COUNTS = (*_DEVICE, "calls")


def host_calls(call: Callable[[], object]) -> int:
    """The calls of Python and C functions that Python makes in one ``call``, in this thread.

    Unlike the host's time they do not depend on the machine. PyTorch's backward pass on a GPU runs in another thread.
    """
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
    return calls


def device_work(call: Callable[[], object], device: torch.device) -> Row:
    """The fields ``launches``, ``copies``, ``fills`` and ``busy_us`` of one call, from CUPTI; None without a GPU.

    Two kernels that overlap count once in ``busy_us``. Afterwards every launch of this process costs the host more (a
    third more was measured on an H100): time before, count last.
    """
    if device.type != "cuda":
        return dict.fromkeys(_DEVICE)
    from torch.profiler import DeviceType, ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        call()
        torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
    names = [str(event.name) for event in events]
    copies = sum(name.startswith("Memcpy") for name in names)
    fills = sum(name.startswith("Memset") for name in names)
    spans = [(float(event.time_range.start), float(event.time_range.end)) for event in events]
    return {"launches": len(names) - copies - fills, "copies": copies, "fills": fills, "busy_us": covered(spans)}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
