"""A study takes as many calls as it needs: a run is made once, and added only to runs that it can be compared with."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("peft")
pytest.importorskip("transformers")

from doratune.benchmarks.commands import bench
from doratune.benchmarks.quality import bench as quality_bench
from doratune.benchmarks.quality.arms import PEFT_DORA
from doratune.benchmarks.quality.bench import bench_quality
from doratune.benchmarks.quality.runs import ADAPT, PRECISION, RATE
from doratune.benchmarks.quality.sizes import SIZES
from doratune.benchmarks.quality.study import arms
from doratune.benchmarks.quality.summary import CURVES_APART, EQUAL_STEPS, SUMMARIES
from doratune.benchmarks.quality.training import Deadline
from doratune.errors import UsageError

from .planted import TINY, planted

FIGURES = Path(__file__).parents[3] / "docs" / "figures.py"


@pytest.fixture(scope="module")
def calls(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]]:
    """The file of a study, and its rows after a call that ran out of time, and after a second one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", TINY)
        patch.setattr(quality_bench, "documentation", lambda: planted("words"))
        patch.setattr(quality_bench, "code", lambda: planted("code"))
        output = tmp_path_factory.mktemp("quality") / "quality.json"
        count = itertools.count()

        def until_the_tenth(line: str) -> None:
            if next(count) == 10:
                stop.setattr(Deadline, "left", property(lambda self: -1.0))

        with pytest.MonkeyPatch.context() as stop:
            outcome, _ = call(output, progress=until_the_tenth)
        (note,) = outcome.notes
        assert "the time is over; left: the learning rates of 4 methods, 12 adaptations, 12 runs of precisions" in note
        assert "run the same command again" in note
        first = json.loads(output.read_text())["rows"]
        outcome, _ = call(output)
        assert outcome.notes == []
        yield output, first, json.loads(output.read_text())["rows"]


def call(output: Path | None, **options: Any) -> Any:
    return bench_quality(**{"size": "tiny", "seeds": 2, "device": "cpu", "commit": "abc", "output": output, **options})


def runs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["op"] not in SUMMARIES]


def test_a_second_call_adds_what_the_first_had_no_time_for(calls: Any) -> None:
    _, first, second = calls
    assert runs(second)[: len(runs(first))] == runs(first), "what was done is kept as it was"
    keys = [
        tuple(str(row.get(k)) for k in ("op", "impl", "rank", "dtype", "adapter", "flags", "seed", "exponent"))
        for row in runs(second)
    ]
    assert len(set(keys)) == len(keys), "nothing was run twice"
    ops = [row["op"] for row in second]
    assert ops.count(ADAPT) == 2 * (len(arms(TINY)) + 1)
    assert ops.count(PRECISION) == 2 * 6
    assert ops.count(RATE) >= 3 * len(arms(TINY))
    assert ops.count(EQUAL_STEPS) == 6
    adapted = [row for row in second if row["op"] == ADAPT]
    for name in {row["impl"] for row in adapted} - {PEFT_DORA}:
        losses = {row["exponent"]: row["loss"] for row in second if row["op"] == RATE and row["impl"] == name}
        assert {row["rate"] for row in adapted if row["impl"] == name} == {
            1e-3 * 2.0 ** min(losses, key=losses.__getitem__)
        }
    (base,) = [row for row in second if row["op"] == "pretrain"]
    for row in runs(second):
        if row["op"] in (RATE, ADAPT):  # chosen on one split, reported on the other
            split = "validation" if row["op"] == RATE else "test"
            assert row["start_loss"] == pytest.approx(base[f"code_{split}_loss"], rel=1e-6)
    assert base["code_validation_loss"] != pytest.approx(base["code_test_loss"], rel=1e-4)
    for row in (row for row in second if row["op"] == "corpus"):  # planted texts have few different pairs of bytes
        assert 0.0 < row["bigram_loss"] < row["unigram_loss"] < math.log(256)
    assert {row["seed"] for row in adapted}.isdisjoint({row["seed"] for row in second if row["op"] == RATE})


def test_a_call_with_nothing_left_runs_nothing_and_a_run_is_the_same_in_any_call(calls: Any) -> None:
    output, _, second = calls
    said: list[str] = []
    before = output.read_text()
    call(output, progress=said.append)
    assert said == ["reading the text", "nothing was left to run"]
    assert output.read_text() == before
    kept = [row for row in second if row["op"] in ("corpus", "pretrain")]
    output.write_text(json.dumps({**json.loads(before), "rows": kept}))
    try:
        with pytest.MonkeyPatch.context() as stop:

            def until_the_second(line: str) -> None:
                if "0.001" in line:
                    stop.setattr(Deadline, "left", property(lambda self: -1.0))

            call(output, progress=until_the_second)
        (again,) = [row for row in runs(json.loads(output.read_text())["rows"]) if row["op"] == RATE]
        assert again == next(row for row in second if row["op"] == RATE)
    finally:
        output.write_text(before)


@pytest.mark.slow
def test_processes_find_what_runs_one_after_another_find(calls: Any, tmp_path: Path) -> None:
    output, _, second = calls
    again = tmp_path / "quality.json"
    with pytest.raises(UsageError, match="give --output or --base"):
        call(None, processes=2)
    outcome, _ = call(again, processes=2, base=output.with_suffix(".base.safetensors"))
    assert outcome.notes == []

    def losses(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], Any]:
        names = ("op", "impl", "rank", "dtype", "adapter", "flags", "seed", "exponent")
        return {tuple(str(row.get(name)) for name in names): row["loss"] for row in runs(rows) if row["op"] != "corpus"}

    assert losses(json.loads(again.read_text())["rows"]) == losses(second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["env"].update(torch="1.0"), r"has results of another torch \(1\.0; now "),
        (lambda data: data["env"].update(code_sha256="0"), "has results of another code_sha256"),
        (lambda data: data["env"].update(gpu="another"), "has results of another gpu"),
        (lambda data: data["rows"][0].update(bench="model"), "has results of another benchmark; name another --output"),
        (lambda data: data["rows"][2].update(base_sha256="0"), "has other weights than the results are of"),
        (lambda data: data.update(schema=7), "this doratune reads schema 1"),
    ],
)
def test_results_that_cannot_be_added_to_are_refused(calls: Any, change: Any, message: str) -> None:
    output, _, _ = calls
    before = output.read_text()
    data = json.loads(before)
    change(data)
    output.write_text(json.dumps(data))
    try:
        with pytest.raises(UsageError, match=message):
            call(output)
    finally:
        output.write_text(before)


def test_the_weights_of_the_results_must_be_there_and_be_theirs(calls: Any, tmp_path: Path) -> None:
    output, _, _ = calls
    with pytest.raises(UsageError, match="is not here; name it with --base"):
        call(output, base=tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    with pytest.raises(UsageError, match="is no safetensors file"):
        call(output, base=broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", replace(TINY, steps=3))
        with pytest.raises(UsageError, match="was trained on another text or at another size"):
            call(None, base=output.with_suffix(".base.safetensors"))


def test_the_command_prints_the_summaries_and_its_json_is_the_file(calls: Any) -> None:
    output, _, _ = calls
    assert json.loads(output.read_text())["env"]["cpu"], "without a GPU the processor is named"
    options = [
        "quality",
        "--size",
        "tiny",
        "--seeds",
        "2",
        "--device",
        "cpu",
        "--commit",
        "abc",
        "--output",
        str(output),
    ]
    done = CliRunner().invoke(bench, options)
    assert done.exit_code == 0, done.output
    assert "held-out loss at equal steps, r=2: doratune − peft_lora" in done.stdout
    assert "equal time: not measured: a GPU times steps, after the runs" in done.stdout
    as_json = CliRunner().invoke(bench, [*options, "--json"])
    assert json.loads(as_json.stdout) == json.loads(output.read_text())


def test_the_tables_of_the_site_have_every_row(calls: Any) -> None:
    spec = importlib.util.spec_from_file_location("figures", FIGURES)
    assert spec is not None
    assert spec.loader is not None
    figures = sys.modules["figures"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    _, rows = figures.read(calls[0])
    tables = {table.title.split(":")[0]: table for table in figures.tables(rows)}
    for op, table in tables.items():
        cells = [cell for line in table.lines[1:] for cell in line[2:] if cell]
        assert len(cells) == sum(row["op"] == op for row in rows), op
    assert {*tables} == {row["op"] for row in rows}
    for op in (EQUAL_STEPS, CURVES_APART):
        for row in (row for row in rows if row["op"] == op):
            assert any(row["says"] in cell for line in tables[op].lines[1:] for cell in line), row
    head, line = tables["reached"].lines[:2]
    row = next(row for row in rows if row["op"] == "reached" and row["impl"] == head[2])
    assert line[2].startswith(f"{row['mean']:.4f} ({row['low']:.4f} to {row['high']:.4f}), rate {row['rate']:g}")
