"""PEFT's own DoRA tests pass with every model passed through ``doratune.accelerate``: pytest --peft-tests CHECKOUT.

A test that fails is run again on stock PEFT: one that fails there too (most often for want of a download) proves
nothing about doratune.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import doratune

FILES = ("test_lora_variants.py", "test_helpers.py", "test_initialization.py", "test_custom_models.py")
PLUGIN = "accelerate_everything"


def run(checkout: Path, *arguments: str) -> str:
    """What pytest prints for these tests of the checkout."""
    places = [str(Path(__file__).parent), str(Path(doratune.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "--tb=short", "-rf"]
    done = subprocess.run(
        [*command, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def failures(output: str) -> set[str]:
    return set(re.findall(r"^FAILED (\S+)", output, flags=re.MULTILINE))


@pytest.mark.timeout(3600)
def test_pefts_dora_tests_pass_with_every_model_accelerated(request: pytest.FixtureRequest) -> None:
    path = request.config.getoption("--peft-tests")
    if path is None:
        pytest.skip("needs a PEFT checkout: --peft-tests PATH")
    checkout = Path(path).resolve()
    output = run(checkout, "-p", PLUGIN, "-k", "dora or Dora", *(f"tests/{name}" for name in FILES))
    summary = "\n".join(line for line in output.splitlines() if re.search(r"^doratune:|\d+ passed", line))
    print(summary)
    counted = re.search(r"doratune: (\d+) calls accelerated", output)
    assert counted, f"no call was accelerated:\n{summary}"
    assert int(counted[1]) >= 300, summary
    failed = failures(output)
    if failed:
        broken = failed - failures(run(checkout, *sorted(failed)))
        assert not broken, f"these pass on stock PEFT:\n{sorted(broken)}\n{output[-20000:]}"
