"""The pages on what doratune brings and where it does not help say what the committed files say, whichever there are: a
new file appears in them as soon as it is committed, and what no file has is named as not measured.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .pages import ROOT

DOCS = ROOT / "docs"
PAGES = ("results/benefits.md", "results/where-it-does-not-help.md")
Row = dict[str, Any]


@pytest.fixture(scope="module")
def benefits() -> Iterator[ModuleType]:
    """The script, as the site's directives load it."""
    sys.path.insert(0, str(DOCS))
    try:
        spec = importlib.util.spec_from_file_location("benefits", DOCS / "benefits.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(DOCS))


def model(impl: str, us: float, **more: Any) -> Row:
    """A row as ``bench model`` writes it."""
    case = {"bench": "model", "model": "llama-8b", "op": "step", "shape": [32, 4096], "rank": 16, "dtype": "bf16"}
    times = {"us": us, "us_p20": us, "us_p80": us, "cpu_us": us / 2, "host_us": us / 2, "peak_mb": 100.0, "rounds": 5}
    return {**case, "adapter": "bf16", "flags": ["checkpointing"], "impl": impl, **times, "floor_us": None, **more}


def pair(ratio: float, **more: Any) -> list[Row]:
    """doratune, and PEFT's LoRA in whose time's ``ratio`` it runs."""
    return [model("doratune", 1000.0 * ratio, **more), model("peft_lora", 1000.0, ratio=ratio, **more)]


def compiled(ratio: float) -> list[Row]:
    return [{**row, "impl": f"{row['impl']}_compiled", "shape": [4, 4096]} for row in pair(ratio)]


def norms(impl: str, us: float) -> Row:
    case = {"bench": "norms", "model": "llama-8b", "op": "weight_norm_group", "shape": [64, 64, 32], "rank": 16}
    return {**case, "dtype": "bf16", "adapter": "bf16", "flags": [], "impl": impl, "us": us, "floor_us": 1.0}


def kernel(impl: str, us: float) -> Row:
    case = {"bench": "kernels", "op": "compose_forward", "shape": [4096, 4096], "rank": None, "dtype": "bf16"}
    facts = {"adapter": None, "flags": [], "config": "tile:block_n=16" if impl == "doratune" else None}
    return {**case, **facts, "impl": impl, "us": us, "floor_us": 4.0, "peak_mb": 0.0}


def packed(dtype: str, us: float) -> Row:
    case = {"bench": "packed", "op": "weight_norm", "shape": [4096, 4096], "rank": 16, "dtype": dtype}
    return {**case, "adapter": "fp32", "flags": ["autocast"], "impl": "doratune", "us": us, "floor_us": 1.0}


def host(impl: str, us: float) -> Row:
    case = {"bench": "host", "op": "lora_compose", "shape": [16, 512], "rank": 4, "dtype": "bf16", "adapter": "bf16"}
    return {**case, "flags": [], "impl": impl, "us": None, "cpu_us": us, "floor_us": None}


FILES: dict[str, list[Row]] = {
    "model-8b": [*pair(0.91), *pair(1.02, rank=384, op="inference", flags=[])],
    "model-1b": pair(1.12, model="llama-1b", shape=[16, 2048], flags=[]),
    "model-0.5b": [
        *pair(1.23, model="qwen2.5-0.5b", shape=[24, 2048], flags=[]),
        *pair(1.31, model="qwen2.5-0.5b", op="decode", shape=[24, 4], flags=["cache=256"]),
    ],
    "first-step": pair(2.5, op="first-step", model="qwen2.5-0.5b", flags=["cold"], host_us=None, peak_mb=None),
    "model-compiled": compiled(1.07),
    "kernels": [
        kernel("doratune", 10.0),
        kernel("peft_compiled", 8.0),
        kernel("copy", 5.0),
        kernel("peft_eager", 30.0),
    ],
    "norms": [norms("doratune", 11.0), norms("alone", 10.0), norms("read", 5.0)],
    "ddp": pair(1.04, shape=[6, 4096], flags=["ddp", "processes=2"]),
    "fsdp2": pair(0.97, shape=[6, 4096], flags=["fsdp2", "processes=2"]),
    "host": [host("doratune", 12.0), host("prebound", 8.0), host("launch", 5.0)],
    "packed": [packed("bf16", 10.0), packed("nf4.nested", 14.0), packed("int8", 9.0)],
    "model-nf4": pair(1.09, dtype="nf4"),
    "model-fp8": pair(0.99, dtype="fp8"),
}
"""By the names of ``benchmarks/evidence.sh``: what is at 1 or above is where it does not help."""


def write(root: Path, files: dict[str, list[Row]], gpu: str = "h100-sxm", **env: str) -> Path:
    folder = root / gpu
    folder.mkdir(parents=True, exist_ok=True)
    values = {"gpu": f"NVIDIA {gpu}", "doratune_commit": "f" * 40, "date": "2026-12-01", **env}
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"schema": 1, "env": values, "rows": rows}))
    return root


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_every_kind_of_file_appears_in_the_page_of_what_doratune_brings(benefits: ModuleType, tmp_path: Path) -> None:
    said = benefits.brings(benefits.read_results(write(tmp_path, FILES)))
    overview = {line[0]: line[1] for line in cells(said.split("**")[0])}
    measured = "2026-12-01, fffffff"
    lacking = {what for what, cell in overview.items() if cell == "not measured"}
    assert {cell for cell in overview.values() if cell not in ("not measured", "---", "NVIDIA h100-sxm")} == {measured}
    for what in ("llama-8b, training step", "llama-1b, training step", "qwen2.5-0.5b, one more token", "first step"):
        assert overview[what] == measured
    for what in ("under torch.compile", "several GPUs, DDP", "several GPUs, FSDP2", "base weights in nf4"):
        assert overview[what] == measured
    assert {"llama-1b, one more token", "with Liger's kernels", "base weights in hqq"} <= lacking
    steps = said.split("**NVIDIA h100-sxm: training step**")[1].split("**")[0]
    (head, _, *lines) = cells(steps)
    place = head.index("time / PEFT LoRA")
    ratios = {(line[0], line[3], "compiled" in line[4], "ddp" in line[4]): line[place] for line in lines}
    assert ratios["llama-8b", "nf4", False, False] == "1.09"
    assert ratios["llama-8b", "bf16", True, False] == "1.07"
    assert ratios["llama-8b", "bf16", False, True] == "1.04"
    assert [line[0] for line in lines][:2] == ["qwen2.5-0.5b", "llama-1b"], "the smallest model first"


@pytest.mark.parametrize(
    ("section", "ratios", "count"),
    [
        ("models", ["1.31", "1.23", "1.12", "1.07", "1.04", "1.02"], "6 of 8"),
        ("quantised", ["1.09", "1.40"], "1 of 2"),
        ("kernels", ["1.25", "1.10"], "2 of 3"),
        ("first-step", ["2.50"], "1 of 1"),
    ],
)
def test_where_it_does_not_help_lists_every_ratio_of_1_and_above(
    section: str, ratios: list[str], count: str, benefits: ModuleType, tmp_path: Path
) -> None:
    said = benefits.SHORTFALLS[section](benefits.read_results(write(tmp_path, FILES)))
    assert [line[3] for line in cells(said) if line[0] == "h100-sxm"] == ratios
    assert said.startswith(count)


def test_every_file_of_the_script_has_its_tables_on_the_page_of_the_gpu(benefits: ModuleType, tmp_path: Path) -> None:
    import figures

    page = (DOCS / "results" / "h100.md").read_text(encoding="utf-8")
    patterns = re.findall(r"^```{figures} (\S+)\n:if-measured:$", page, re.MULTILINE)
    script = (ROOT / "benchmarks" / "evidence.sh").read_text(encoding="utf-8")
    written = set()
    for parts, commands in re.findall(r"^    ([\w. |-]+)\)(.*?);;", script, re.MULTILINE | re.DOTALL):
        (name,) = re.findall(r"(?:bench \d+|without_compiler) \"?([\w.$-]+)", commands)
        written |= {name.replace("$part", part) for part in parts.split(" | ")}
    assert {"model-8b", "first-step", "fsdp2"} <= written
    for name in written | FILES.keys():
        assert any(fnmatch(f"h100-sxm/{name}.json", pattern) for pattern in patterns), name
    for name, rows in FILES.items():
        _, read = figures.read(write(tmp_path, {name: rows}) / "h100-sxm" / f"{name}.json")
        shown = "".join(table.markdown() for table in figures.tables(read))
        assert all(row["impl"] in shown for row in rows), name


def test_losses_of_methods_are_no_comparison_of_times(benefits: ModuleType, tmp_path: Path) -> None:
    losses = [{**each, "bench": "quality", "us": None} for each in pair(0.91)]
    with_losses = write(write(tmp_path, FILES), {"quality": losses}, gpu="cpu")
    assert {source.file.split("/")[0] for source, _ in benefits.read_results(with_losses).rows} == {"h100-sxm"}


def test_host_time_and_memory_have_sections_of_their_own(benefits: ModuleType, tmp_path: Path) -> None:
    rows = [model("doratune", 900.0, host_us=600.0, peak_mb=130.0), model("peft_lora", 1000.0, host_us=500.0)]
    root = write(tmp_path, {"model-1b": rows, "host": FILES["host"]})
    measured = benefits.read_results(root)
    assert [line[3] for line in cells(benefits.host(measured)) if line[0] == "h100-sxm"] == ["1.20", "1.50"]
    assert [line[3] for line in cells(benefits.memory(measured)) if line[0] == "h100-sxm"] == ["1.30"]


def test_what_no_file_has_is_not_measured_and_what_helps_everywhere_says_so(
    benefits: ModuleType, tmp_path: Path
) -> None:
    nothing = benefits.read_results(tmp_path)
    for section in benefits.SHORTFALLS.values():
        assert "not measured" in section(nothing)
        assert not cells(section(nothing))
    fast = benefits.models(benefits.read_results(write(tmp_path, {"model-8b": pair(0.9)})))
    assert fast == "None of 1 comparisons of models and layers are at 1 or above."


def test_an_interval_is_shown_and_the_mean_of_the_rounds_is_the_ratio(benefits: ModuleType, tmp_path: Path) -> None:
    rows = pair(1.5)
    rows[1] |= {"ratio_mean": 1.4, "ratio_low": 1.3, "ratio_high": 1.45}
    (line,) = cells(benefits.models(benefits.read_results(write(tmp_path, {"model-8b": rows}))))[2:]
    assert line[3:5] == ["1.40", "1.300 to 1.450 (95 %)"]


def test_a_newer_measurement_takes_the_place_of_an_older_one_on_the_same_gpu(
    benefits: ModuleType, tmp_path: Path
) -> None:
    write(tmp_path, {"a": pair(1.8), "z": pair(1.9)}, date="2026-11-24")
    write(tmp_path, {"model-8b": pair(1.2), "model-8b-again": pair(1.3)})
    write(tmp_path, {"model": pair(1.6)}, "h200", date="2026-11-24")
    found = cells(benefits.models(benefits.read_results(tmp_path)))[2:]
    assert [(line[0], line[3]) for line in found] == [("h200", "1.60"), ("h100-sxm", "1.30"), ("h100-sxm", "1.20")]
    assert found[0][-1].startswith("2026-11-24"), "an old figure says how old it is"


def test_the_age_of_a_figure_is_counted_in_commits(benefits: ModuleType) -> None:
    import comparisons

    assert comparisons.commits_since("HEAD") in (0, None), "outside of a checkout nobody knows"
    assert comparisons.commits_since("no such commit") is None
    source = comparisons.Source("h200/model.json", "NVIDIA H200", "HEAD", "2026-11-24")
    assert source.measured in ("2026-11-24, HEAD, 0 commits since", "2026-11-24, HEAD")


def test_the_committed_files_make_the_pages_and_no_figure_is_typed_on_them(benefits: ModuleType) -> None:
    measured = benefits.read_results()
    assert measured.comparisons
    assert cells(benefits.brings(measured))
    for section in benefits.SHORTFALLS.values():
        assert section(measured)
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        prose = "".join(letter for letter in text if letter.isdigit())
        assert prose in ("", "1"), f"{page} types a figure: {prose}"
    used = (DOCS / PAGES[1]).read_text(encoding="utf-8")
    assert all(f"```{{shortfalls}} {section}\n" in used for section in benefits.SHORTFALLS)
