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

CONTENDERS = ("peft_lora", "axolotl_lora", "peft_dora", "doratune")


def test_it_fits_in_150_lines() -> None:
    assert len(README.splitlines()) <= 150


def test_it_names_the_test_command_that_ci_runs() -> None:
    assert re.search(r"^make test$", README, re.MULTILINE)
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)


def test_its_table_is_what_was_measured() -> None:
    lines = re.findall(
        r"^\| \[.*?, (\d+), (\d+)\]\((\S+)\) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", README, re.MULTILINE
    )
    assert len(lines) == 4
    for rank, tokens, file, *cells in lines:
        rows = json.loads((ROOT / file).read_text(encoding="utf-8"))["rows"]
        steps = [row for row in rows if row["op"] == "step"]
        assert {(row["rank"], row["shape"][-1], row["adapter"]) for row in steps} == {(int(rank), int(tokens), "bf16")}
        us = {row["impl"]: row["us"] for row in steps}
        assert us.keys() <= {*CONTENDERS}
        shown = [f"{us[name] / 1000:.0f}" if name in us else "–" for name in CONTENDERS]
        best = CONTENDERS.index(min(us, key=us.__getitem__))
        shown[best] = f"**{shown[best]}**"
        assert cells == shown, file


def test_its_versions_are_those_that_are_tested() -> None:
    (line,) = re.findall(r"^Tested .*$", README, re.MULTILINE)
    for name, library in (("PyTorch", "torch"), ("Triton", "triton"), ("PEFT", "peft")):
        assert f"{name} {versions.tested_range(library)}" in line


@pytest.mark.parametrize("page", ["README.md", "docs/install.md"])
def test_the_python_that_a_page_asks_for_is_the_one_that_the_package_does(page: str) -> None:
    needed = re.search(r'^requires-python = ">=([\d.]+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert needed is not None
    assert f"Python {needed[1]} or later" in (ROOT / page).read_text(encoding="utf-8")
