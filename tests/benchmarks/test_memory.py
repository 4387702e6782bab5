"""Memory that is not there fails where it is asked for, as an error; Linux would end the process later."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from doratune.benchmarks.memory import within_free_memory

MEMINFO = Path("/proc/meminfo")


def free_bytes() -> int:
    lines = MEMINFO.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])


@pytest.mark.skipif(not MEMINFO.exists(), reason="no /proc")
def test_memory_that_is_not_free_is_refused_when_it_is_asked_for() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    part = int(0.6 * free_bytes())  # nothing is written to it, so that it takes none
    with within_free_memory():
        first = torch.empty(part, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="allocate memory"):
            torch.empty(part, dtype=torch.uint8)
        del first
        torch.empty(part, dtype=torch.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
