"""A report says for every entry what it is and how its time is known; nothing predicted passes for measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from doratune.cache.entry import MEASURED, PREDICTED, Entry, Environment, Evaluation
from doratune.codegen.spec import Config, KernelSpec
from doratune.tuner.projections import LeftOut, Model, Projection
from doratune.tuner.report import layer_lines, report, report_table
from doratune.tuner.search import FAILED, TUNED, Tuned, TuneResult

CONFIG = Config.create("tile", block_t=4, block_n=1024, num_warps=4, num_stages=2)
ENTRY = Entry(
    spec=KernelSpec.create("compose_forward", d_out=4096, tokens=512, dtype="fp16", gpu="h200"),
    config=CONFIG,
    template_digest="t",
    source_digest="s",
    source="",
    evaluation=Evaluation(PREDICTED, us=12.34, floor_us=9.0, registers=40, spills=0, shared_bytes=4096),
    environment=Environment("h200", "sm_90", "3.7.1"),
)
NORM = replace(
    ENTRY,
    spec=KernelSpec.create("weight_norm", d_out=4096, d_in=1024, rank=16, dtype="bf16", adapter="fp32", gpu="h200"),
    evaluation=Evaluation(MEASURED, us=5.0, floor_us=4.0, unfused_us=6.0),
)


def test_the_json_rows_hold_every_field_and_null_where_one_does_not_apply() -> None:
    result = TuneResult((Tuned(ENTRY.spec, TUNED, ENTRY), Tuned(NORM.spec, TUNED, NORM)))
    document = json.loads(json.dumps(report(result, model=MODEL, gpu="h200", store="/s")))
    rows = document.pop("rows")
    about = {"model": "tiny", "gpu": "h200", "store": "/s"}
    for name in ("projections", "not_tuned", "notes"):
        assert document.pop(name)
    assert document == {**about, "failed": [], "stopped": "", "fault": ""}
    assert rows[0] == {
        "op": "compose_forward",
        "spec": str(ENTRY.spec),
        "d_out": 4096,
        "d_in": None,
        "rank": None,
        "tokens": 512,
        "dtype": "fp16",
        "variant": "tile",
        "config": str(CONFIG),
        "registers": 40,
        "spills": 0,
        "shared_bytes": 4096,
        "us": 12.34,
        "floor_us": 9.0,
        "unfused_us": None,
        "provenance": "predicted",
    }
    assert list(rows[1]) == list(rows[0])
    assert rows[1]["unfused_us"] == 6.0
    assert (rows[1]["d_in"], rows[1]["tokens"], rows[1]["dtype"], rows[1]["registers"]) == (1024, None, "bf16", None)
    assert KernelSpec.parse(rows[1]["spec"]) == NORM.spec
    assert Config.parse(rows[0]["config"]) == CONFIG


def test_the_json_says_which_kernels_failed_and_why_the_run_ended() -> None:
    rows = (Tuned(ENTRY.spec, TUNED, ENTRY), Tuned(NORM.spec, FAILED, None, "the disk is full"))
    result = TuneResult(rows, "fault", "the disk is full: free space")
    document = json.loads(json.dumps(report(result, model=MODEL, gpu="h200", store="/s")))
    assert [row["spec"] for row in document["rows"]] == [str(ENTRY.spec)]
    assert document["failed"] == [{"spec": str(NORM.spec), "reason": "the disk is full"}]
    assert (document["stopped"], document["fault"]) == ("fault", "the disk is full: free space")


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([ENTRY], "times predicted by a model, not measured"),
        ([NORM], "times measured"),
        ([ENTRY, NORM], "not all times are measured"),
        ([], "no kernels"),
    ],
)
def test_the_title_says_how_the_times_are_known(entries: list[Entry], says: str) -> None:
    assert says in str(report_table(entries, model="llama-8b", gpu="h200").title)


@pytest.mark.parametrize(
    ("entries", "name"), [([ENTRY], "predicted µs"), ([NORM], "measured µs"), ([ENTRY, NORM], "µs"), ([], "µs")]
)
def test_the_time_column_says_how_its_times_are_known(entries: list[Entry], name: str) -> None:
    headers = [column.header for column in report_table(entries, model="llama-8b", gpu="h200").columns]
    assert headers[-3:] == [name, "floor µs", "provenance"]


def test_the_table_shows_shapes_resources_and_times() -> None:
    console = Console(width=200, record=True, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        console.print(report_table([ENTRY, NORM], model="llama-8b", gpu="h200"))
    text = captured.get()
    for part in ("4096x1024, r 16", "40/0/4096", "-/-/-", "12.3", "9.0", "512", "predicted", "measured"):
        assert part in text


MODEL = Model(
    "tiny",
    "",
    2,
    (
        Projection("q", 64, 32, True, 2, ("a.q", "b.q")),
        Projection("k", 64, 32, True, 1),
        Projection("o", 8, 64, False, 4),
    ),
    ("as its class has it",),
    (LeftOut("lm_head", (99, 32), False, 1, True, "the output head"),),
)


def test_the_layers_of_a_run_are_in_its_json() -> None:
    document = json.loads(json.dumps(report(TuneResult(()), model=MODEL, gpu="h200", store="/s")))
    assert document["projections"][0] == {
        "name": "q",
        "d_out": 64,
        "d_in": 32,
        "bias": True,
        "count": 2,
        "modules": ["a.q", "b.q"],
    }
    assert document["not_tuned"][0]["shape"] == [99, 32]
    assert document["not_tuned"][0]["why"] == "the output head"
    assert document["notes"] == ["as its class has it"]


def test_the_layers_of_a_run_are_told_in_lines() -> None:
    assert layer_lines(MODEL) == [
        "tiny: 7 linear layers to put DoRA on",
        "  [64, 32] with bias: q ×2, k ×1",
        "  [8, 64]: o ×4",
        "not tuned: lm_head [99, 32] ×1: the output head",
        "note: as its class has it",
    ]
