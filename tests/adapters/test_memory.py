"""Checkpoints are examined in pieces: memory does not grow with their size.

``DORATUNE_SPARSE_GB=16`` runs it at the size of an 8B model.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .world import write_sparse

GIGABYTES = float(os.environ.get("DORATUNE_SPARSE_GB", "1.5"))
MOST_MB, MOST_ADDED_MB = 1000, 200
"""In all, with a PyTorch for CPUs (importing one for GPUs may take 850 MB by itself); and beyond the import."""

CODE = """
import re, sys
from pathlib import Path
from doratune.adapters.checkpoint import Checkpoint
from doratune.adapters.examine_checkpoint import examine_checkpoint
peak = lambda: int(re.search("VmHWM: *\\t *([0-9]+)", Path("/proc/self/status").read_text())[1]) // 1024
before = peak()
with Checkpoint(Path(sys.argv[1])) as checkpoint:
    faults = examine_checkpoint(checkpoint)
print(len(faults[0].places), peak(), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak since the start is read from Linux")
def test_a_large_checkpoint_needs_less_than_a_gigabyte(folder: Path) -> None:
    shape = (15100, 4096)  # no whole number of pieces: sizes that differ are what a heap cannot reuse
    count = round(GIGABYTES * 1e9 / (2 * shape[0] * shape[1]))
    file = folder / "model.safetensors"
    write_sparse(file, {f"model.layers.{index}.mlp.up_proj.weight": shape for index in range(count)})
    assert file.stat().st_size > 1e6 * MOST_ADDED_MB
    done = subprocess.run([sys.executable, "-c", CODE, str(folder)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found, megabytes, added = map(int, done.stdout.split())
    assert found == count, "every row is zero"
    assert added < MOST_ADDED_MB
    assert megabytes < MOST_MB or torch.version.cuda is not None
