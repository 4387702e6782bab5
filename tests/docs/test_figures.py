"""The site shows every committed measurement, and its tables say what the files do."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .pages import ROOT

RESULTS = ROOT / "benchmarks" / "results"
FILES = sorted(RESULTS.rglob("*.json"))


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["figures"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_result_file_is_shown() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "results").glob("*.md"))
    patterns = re.findall(r"^```{figures} (\S+)$", text, re.MULTILINE)
    shown = {file for pattern in patterns for file in RESULTS.glob(pattern)}
    assert shown == set(FILES), "a page in docs/results shows each file with a {figures} block"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(RESULTS).as_posix())
def test_every_measurement_of_a_file_is_in_a_table(file: Path, figures: ModuleType) -> None:
    _, rows = figures.read(file)
    tables = figures.tables(rows)
    for row in rows:
        named = [table for table in tables if table.title.startswith(f"{row['op']}:")]
        assert any(row["impl"] == figures.OURS or row["impl"] in table.lines[0] for table in named), row


def test_a_table_has_ours_in_microseconds_and_peers_as_multiples_of_it(figures: ModuleType) -> None:
    def row(impl: str, us: float) -> dict[str, object]:
        shape = {"bench": "kernels", "op": "lora_compose", "shape": [16, 4096], "rank": 8, "dtype": "bf16", "run": ""}
        return {**shape, "impl": impl, "us": us, "floor_us": 1.0, "peak_mb": 0.5, "config": "tile:block_n=16"}

    (table,) = figures.tables([row("doratune", 2.0), row("copy", 3.0)])
    head, line = table.lines
    assert dict(zip(head, line, strict=True)) == {
        "sizes": "16×4096, r = 8",
        "dtypes": "bf16",
        "µs": "2.0",
        "floor µs": "1.0",
        "copy": "1.50",
        "doratune, MB": "0.5",
        "variant": "tile",
    }
