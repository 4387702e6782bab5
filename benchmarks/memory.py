"""The host's memory: what is not there fails where it is asked for. Linux otherwise promises it, and later kills."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

MARGIN = 0.05
"""Share of the free memory that is left to others."""


@contextlib.contextmanager
def within_free_memory() -> Iterator[None]:
    """Let what is allocated in the block beyond the memory that is free now fail, as an error of PyTorch or Python.

    Does nothing where there is no ``/proc``.
    """
    free, used = _bytes("/proc/meminfo", "MemAvailable"), _bytes("/proc/self/status", "VmData")
    if free is None or used is None:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [used + int((1.0 - MARGIN) * min(free, *_left_in_groups()))]
    limits += [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _bytes(path: str, name: str) -> int | None:
    """The bytes that a file of ``/proc`` gives under a name, in kB there; None if it does not."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return None


def _left_in_groups() -> list[float]:
    """The bytes that the control group of a container leaves, infinity where none is limited."""
    left = [float("inf")]
    for most, now in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            left.append(max(0, int(Path(most).read_text()) - int(Path(now).read_text())))
    return left
