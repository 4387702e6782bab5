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


def test_where_it_was_measured_is_a_gpu_or_a_processor(figures: ModuleType) -> None:
    env = {"gpu": "none", "driver": "none", "torch": "2.13.0", "doratune_commit": "abcdef0123", "date": "2026-12-01"}
    said = figures.environment([{**env, "cpu": "Abacus"}])
    assert said == "Abacus processor, no GPU, PyTorch 2.13.0; doratune abcdef0, 2026-12-01."
    assert figures.environment([{**env, "gpu": "H100", "driver": "580"}]).startswith("H100, driver 580, PyTorch")


def test_a_model_has_tables_of_what_was_measured_and_none_without_cells(figures: ModuleType) -> None:
    def row(op: str, impl: str, **values: object) -> dict[str, object]:
        shape = {
            "bench": "model",
            "model": "m",
            "shape": [2, 8],
            "rank": 8,
            "dtype": "bf16",
            "adapter": "bf16",
            "run": "",
        }
        return {**shape, "op": op, "impl": impl, "us": 2000.0, "flags": ["liger"], **values}

    rows = [row("step", "doratune", launches=7, host_us=1500.0, peak_mb=3.0), row("step", "peft_lora", launches=9)]
    found = {table.title: table.lines[1:] for table in figures.tables([*rows, row("first-step", "doratune")])}
    case = ("m, 2×8, r = 8", "bf16, bf16 adapters, liger")
    assert found == {
        "step: time, ms": ((*case, "2.0", "2.0"),),
        "step: peak memory above the weights, MB": ((*case, "3", ""),),
        "step: the host's own time, ms": ((*case, "1.5", ""),),
        "step: kernel launches": ((*case, "7", "9"),),
        "first-step: time, ms": ((*case, "2.0"),),
    }
