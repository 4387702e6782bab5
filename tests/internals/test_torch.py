"""If PyTorch lacks one of the private names, doratune computes the same through public APIs.

The core suite runs once for each name, in a process where doratune cannot find that name (``make test-internals``).
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from doratune.internals import torch as internals

ROOT = Path(__file__).parents[2]

PRIVATE = re.compile(r"\btorch(\.\w+)*\._(?!_version__|_torch_|foreach_|dynamo\.config)|\bforward_ad\._")
"""Documented names with a leading underscore: ``torch._foreach_…``, ``torch._dynamo.config`` and protocols."""

CORE = (
    "tests/nn/test_module.py",
    "tests/nn/test_norm_cache.py",
    "tests/nn/test_operators.py",
    "tests/integrations/peft/test_glance.py",
    "tests/integrations/peft/test_interception.py",
    "tests/integrations/peft/test_overwritten.py",
    "tests/integrations/peft/test_reinit.py",
    "tests/integrations/peft/test_selective.py",
    "tests/runtime/test_argument_memo.py",
    "tests/runtime/test_kernel.py",
    "tests/runtime/test_loader.py",
)
"""Modules and functions, training and inference, through PEFT and without, and how kernels are started."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", internals.NAMES)
def test_the_core_suite_passes_without(name: str, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--internals"):
        pytest.skip("run by make test-internals")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--without", name, *CORE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_no_other_file_names_something_private_of_pytorch() -> None:
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).parts[0]
        if part.startswith(".") or part in ("tests", "internals", "docs", "build", "benchmarks"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            code = line.split("  #")[0]
            assert not PRIVATE.search(code), f"{path}:{number}"


def test_this_pytorch_has_every_name() -> None:
    """A missing name makes calls slower, so a new version of PyTorch must not lack one unnoticed."""
    if torch.__version__.split("+")[0].split(".")[:2] in (["2", "10"], ["2", "13"], ["2", "15"]):
        assert internals.missing() == []


@pytest.mark.parametrize("name", sorted(internals._TRIALS))
def test_a_name_that_takes_other_arguments_counts_as_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "find", lambda wanted: lambda one, two, three: None)
    assert internals._find_working(name) is None


GUARDED = {
    "data of another dtype": lambda t: setattr(t, "data", t.data.double()),
    "transposed where it is": lambda t: setattr(t, "data", t.data.t()),
    "fewer rows": lambda t: setattr(t, "data", t.data[:3]),
    "frozen": lambda t: t.requires_grad_(False),
}


@pytest.mark.parametrize("how", GUARDED)
@pytest.mark.parametrize("index", [0, 1])
def test_a_guard_recognises_tensors_and_refuses_changed_ones(how: str, index: int) -> None:
    tensors = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))]
    accepts = internals.guard_of(tensors)
    assert accepts is not None
    assert accepts(*tensors)
    with torch.no_grad():
        assert accepts(*tensors)
        assert accepts(torch.nn.Parameter(torch.zeros(4, 4)), tensors[1]), "values do not matter"
        assert not accepts(torch.zeros(4, 4), tensors[1]), "the type does"
    GUARDED[how](tensors[index])
    assert not accepts(*tensors)


def test_hooks_on_what_is_saved_are_those_of_checkpoints_and_users() -> None:
    assert not internals.saving_is_hooked()
    seen: list[bool] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append(internals.saving_is_hooked())
        return x.sin()

    checkpoint(run, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [True, True], "in the forward pass and in the recompute"
    with torch.autograd.graph.save_on_cpu():
        assert internals.saving_is_hooked()
    assert not internals.saving_is_hooked()


def test_some_autocast_is_on_for_any_kind_of_device() -> None:
    assert not internals.some_autocast_is_on()
    for kind in ("cpu", "cuda"):
        before = torch.is_autocast_enabled(kind)
        torch.set_autocast_enabled(kind, True)
        try:
            assert internals.some_autocast_is_on()
        finally:
            torch.set_autocast_enabled(kind, before)
    assert not internals.some_autocast_is_on()
