"""README is a page and no manual: short, with the two commands, figures that were measured, and the versions that are
tested.
"""

from __future__ import annotations

import json
import re

import pytest

from doratune.internals import versions

from .pages import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")

CONTENDERS = ("peft_lora", "peft_dora", "doratune")


def test_it_fits_in_150_lines() -> None:
    assert len(README.splitlines()) <= 150


def test_it_names_the_test_command_that_ci_runs() -> None:
    assert re.search(r"^make test$", README, re.MULTILINE)
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)


def test_its_table_is_what_was_measured() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "h200" / "model.json").read_text(encoding="utf-8"))["rows"]
    ms = {(row["op"], row["adapter"], row["impl"]): round(row["us"] / 1000) for row in rows}
    lines = re.findall(r"^\| (\w.*?) \| (\S+) \| (\S+) \| (\S+) \|$", README, re.MULTILINE)
    assert len(lines) == 4
    adapter = ""
    for label, *cells in lines:
        op = "step" if label.startswith("training step") else "inference"
        adapter = adapter if label.endswith("the same") else re.search(r"(fp32|bf16) adapters", label)[1]  # type: ignore[index]
        times = [ms[op, adapter, name] for name in CONTENDERS]
        assert cells == [f"**{time}**" if time == min(times) else str(time) for time in times], label


def test_its_versions_are_those_that_are_tested() -> None:
    (line,) = re.findall(r"^Tested .*$", README, re.MULTILINE)
    for name, library in (("PyTorch", "torch"), ("Triton", "triton"), ("PEFT", "peft")):
        assert f"{name} {versions.tested_range(library)}" in line


@pytest.mark.parametrize("page", ["README.md", "docs/install.md"])
def test_the_python_that_a_page_asks_for_is_the_one_that_the_package_does(page: str) -> None:
    needed = re.search(r'^requires-python = ">=([\d.]+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert needed is not None
    assert f"Python {needed[1]} or later" in (ROOT / page).read_text(encoding="utf-8")
